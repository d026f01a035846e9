//! `ringstone._engine`: the one module that knows Python. Every call that may wait releases the GIL; reactors never see it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use ringstone_blockdev::Key;
use ringstone_cipher::PoolKey;
use ringstone_gateway::{self as gateway, BackendSpec, EngineSettings, SocketRights, Takeover, VolumeSpec};

mod rbd;
mod store;

create_exception!(_engine, EngineError, PyException);

pub(crate) fn raise(py: Python<'_>, code: &str, message: String) -> PyErr {
    let error = EngineError::new_err(message);
    match error.value(py).setattr("code", code) {
        Ok(()) => error,
        Err(other) => other,
    }
}

fn engine_error(py: Python<'_>, error: &gateway::EngineError) -> PyErr {
    raise(py, error.code().as_str(), error.to_string())
}

/// A descriptor of our own for one that Python keeps.
fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(9).into());
    }
    // SAFETY: borrowed for the duration of the duplication only; the caller keeps it open meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fd.as_fd().try_clone_to_owned()?)
}

#[pyclass]
struct Engine(Arc<gateway::Engine>);

impl Engine {
    /// Stores of this process are opened with it.
    fn made(engine: gateway::Engine) -> Self {
        let engine = Arc::new(engine);
        store::set_host(&engine);
        Self(engine)
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (cores, *, idle_us = 200, stats_path, balance = true))]
    fn new(
        py: Python<'_>,
        cores: Vec<usize>,
        idle_us: u64,
        stats_path: PathBuf,
        balance: bool,
    ) -> PyResult<Self> {
        let settings = EngineSettings { cores, idle_us, stats_path, balance, topology: None };
        py.detach(|| gateway::Engine::start(&settings)).map(Self::made).map_err(|e| engine_error(py, &e))
    }

    #[staticmethod]
    #[pyo3(signature = (socket, cores, *, idle_us = 200, stats_path, balance = true, version))]
    fn take_over<'py>(
        py: Python<'py>,
        socket: RawFd,
        cores: Vec<usize>,
        idle_us: u64,
        stats_path: PathBuf,
        balance: bool,
        version: &str,
    ) -> PyResult<(Self, Bound<'py, PyDict>)> {
        let settings = EngineSettings { cores, idle_us, stats_path, balance, topology: None };
        let stream = UnixStream::from(duplicate(socket)?);
        let taken = py
            .detach(|| Takeover::greet(stream, version)?.run(&settings))
            .map_err(|e| engine_error(py, &e))?;
        let report = PyDict::new(py);
        report.set_item("version", taken.version)?;
        report.set_item("volumes", taken.volumes)?;
        report.set_item("stall_ns", taken.stall_ns)?;
        let extras = PyDict::new(py);
        for (name, fd) in taken.extras {
            // From here on it is Python's to close.
            extras.set_item(name, std::os::fd::IntoRawFd::into_raw_fd(fd))?;
        }
        report.set_item("extras", extras)?;
        Ok((Self::made(taken.engine), report))
    }

    #[pyo3(signature = (socket, *, version, extras, drain_ms = 10_000))]
    fn hand_over<'py>(
        &self,
        py: Python<'py>,
        socket: RawFd,
        version: &str,
        extras: std::collections::BTreeMap<String, RawFd>,
        drain_ms: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        let stream = UnixStream::from(duplicate(socket)?);
        let extras =
            extras.into_iter().map(|(name, fd)| Ok((name, duplicate(fd)?))).collect::<PyResult<Vec<_>>>()?;
        let drain = Duration::from_millis(drain_ms);
        let done = py
            .detach(|| self.0.hand_over(stream, version, extras, drain))
            .map_err(|e| engine_error(py, &e))?;
        let report = PyDict::new(py);
        report.set_item("version", done.version)?;
        report.set_item("volumes", done.volumes)?;
        report.set_item("stall_ns", done.stall_ns)?;
        report.set_item("drain_ns", done.drain_ns)?;
        Ok(report)
    }

    fn abandon(&self, py: Python<'_>) {
        py.detach(|| self.0.abandon());
    }

    #[pyo3(signature = (name, backend, *, size, block_size = 512, read_only = false, serial = String::new(), key = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python signature")]
    fn open_volume(
        &self,
        py: Python<'_>,
        name: String,
        backend: &str,
        size: u64,
        block_size: u32,
        read_only: bool,
        serial: String,
        key: Option<&[u8]>,
    ) -> PyResult<()> {
        let key = key.map(PoolKey::new).transpose().map_err(|e| store::drive_error(py, e.into()))?;
        let key = key.map_or(Key::None, Key::Pool);
        let opened = BackendSpec::parse(backend).and_then(|backend| {
            let spec = VolumeSpec { name, backend, size, block_size, read_only, serial };
            py.detach(|| self.0.open_volume(&spec, &key))
        });
        opened.map_err(|e| engine_error(py, &e))
    }

    fn close_volume(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.close_volume(name)).map_err(|e| engine_error(py, &e))
    }

    fn own_volume(&self, py: Python<'_>, name: &str, backend: &str) -> PyResult<()> {
        let own = || self.0.own_volume(name, BackendSpec::parse(backend)?);
        py.detach(own).map_err(|e| engine_error(py, &e))
    }

    fn release_volume(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.release_volume(name)).map_err(|e| engine_error(py, &e))
    }

    fn fence_volume(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        py.detach(|| self.0.fence_volume(name)).map_err(|e| engine_error(py, &e))
    }

    fn resize_volume(&self, py: Python<'_>, name: &str, size: u64) -> PyResult<()> {
        py.detach(|| self.0.resize_volume(name, size)).map_err(|e| engine_error(py, &e))
    }

    fn volumes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let volumes = py.detach(|| self.0.volumes()).map_err(|e| engine_error(py, &e))?;
        let list = PyList::empty(py);
        for volume in volumes {
            let row = PyDict::new(py);
            row.set_item("name", volume.name)?;
            row.set_item("size", volume.size)?;
            row.set_item("block_size", volume.block_size)?;
            row.set_item("read_only", volume.read_only)?;
            row.set_item("backend", volume.backend)?;
            row.set_item("detail", volume.detail)?;
            row.set_item("discard", volume.discard)?;
            row.set_item("fenced", volume.fenced)?;
            row.set_item("client", volume.client)?;
            row.set_item("attached", volume.attached)?;
            list.append(row)?;
        }
        Ok(list)
    }

    #[pyo3(signature = (name, socket_path, *, queues = 1, owner = None, group = None, mode = 0o600))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python signature")]
    fn attach(
        &self,
        py: Python<'_>,
        name: &str,
        socket_path: PathBuf,
        queues: usize,
        owner: Option<u32>,
        group: Option<u32>,
        mode: u32,
    ) -> PyResult<()> {
        let rights = SocketRights { owner, group, mode };
        py.detach(|| self.0.attach_for(name, &socket_path, queues, rights)).map_err(|e| engine_error(py, &e))
    }

    fn share(&self, py: Python<'_>, name: &str, shared: bool) -> PyResult<()> {
        py.detach(|| self.0.share(name, shared)).map_err(|e| engine_error(py, &e))
    }

    fn move_queue(&self, py: Python<'_>, name: &str, queue: usize, core: usize) -> PyResult<()> {
        py.detach(|| self.0.move_queue(name, queue, core)).map_err(|e| engine_error(py, &e))
    }

    fn reactors(&self, py: Python<'_>) -> PyResult<Vec<(usize, usize)>> {
        let all = py.detach(|| self.0.reactors()).map_err(|e| engine_error(py, &e))?;
        Ok(all.into_iter().map(|reactor| (reactor.index, reactor.core)).collect())
    }

    fn add_reactor(&self, py: Python<'_>, core: usize) -> PyResult<usize> {
        py.detach(|| self.0.add_reactor(core)).map(|info| info.index).map_err(|e| engine_error(py, &e))
    }

    fn remove_reactor(&self, py: Python<'_>, core: usize) -> PyResult<()> {
        py.detach(|| self.0.remove_reactor(core)).map_err(|e| engine_error(py, &e))
    }

    #[pyo3(signature = (name, *, force = false))]
    fn detach(&self, py: Python<'_>, name: &str, force: bool) -> PyResult<()> {
        py.detach(|| self.0.detach(name, force)).map_err(|e| engine_error(py, &e))
    }

    fn attachments<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let attachments = py.detach(|| self.0.attachments()).map_err(|e| engine_error(py, &e))?;
        let list = PyList::empty(py);
        for attachment in attachments {
            let row = PyDict::new(py);
            row.set_item("volume", attachment.volume)?;
            row.set_item("socket", attachment.socket.to_string_lossy())?;
            row.set_item("state", attachment.state)?;
            row.set_item("features", attachment.features)?;
            row.set_item("protocol_features", attachment.protocol_features)?;
            row.set_item("memory_bytes", attachment.memory_bytes)?;
            row.set_item("memory_regions", attachment.memory_regions)?;
            row.set_item("peer_pid", attachment.peer_pid)?;
            row.set_item("packed", attachment.packed)?;
            row.set_item("shared", attachment.shared)?;
            row.set_item("frontends", attachment.frontends)?;
            let queues = PyList::empty(py);
            for queue in attachment.queues {
                let entry = PyDict::new(py);
                entry.set_item("index", queue.index)?;
                entry.set_item("size", queue.size)?;
                entry.set_item("reactor", queue.reactor)?;
                entry.set_item("running", queue.running)?;
                queues.append(entry)?;
            }
            row.set_item("queues", queues)?;
            list.append(row)?;
        }
        Ok(list)
    }

    fn watchdog(&self, py: Python<'_>, socket: &str, interval_ms: u64) -> PyResult<()> {
        py.detach(|| self.0.watchdog(socket, Duration::from_millis(interval_ms)))
            .map_err(|e| engine_error(py, &e))
    }

    fn event_fd(&self) -> i32 {
        self.0.event_fd()
    }

    fn drain_events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for event in self.0.drain_events() {
            let row = PyDict::new(py);
            row.set_item("at_ns", event.at_ns)?;
            row.set_item("level", event.level.as_str())?;
            row.set_item("volume", event.volume)?;
            row.set_item("message", event.message)?;
            list.append(row)?;
        }
        Ok(list)
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.0.stop());
    }
}

#[pyfunction]
fn load(py: Python<'_>, config: &str) -> PyResult<String> {
    py.detach(|| ringstone_load::run_json(config)).map_err(|e| raise(py, "invalid", e.to_string()))
}

#[pyfunction]
fn limit(py: Python<'_>, config: &str) -> PyResult<String> {
    py.detach(|| ringstone_load::limit_json(config)).map_err(|e| raise(py, "invalid", e.to_string()))
}

#[pymodule]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("EngineError", module.py().get_type::<EngineError>())?;
    module.add_class::<Engine>()?;
    module.add_class::<rbd::RbdImages>()?;
    module.add_class::<store::Store>()?;
    module.add_function(wrap_pyfunction!(load, module)?)?;
    module.add_function(wrap_pyfunction!(store::map_without_data, module)?)?;
    module.add_function(wrap_pyfunction!(limit, module)?)
}
