//! Stores, for Python's control side: JSON goes in and comes out, as commands are many and rare.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use pyo3::prelude::*;
use ringstone_blockdev::{new_seal, wrap_anew, DriveError, StoreDoor};
use ringstone_cipher::PoolKey;
use ringstone_gateway::{
    check_store, format_store, look_for_store, repair_store, store_code, CheckProgress, Engine, EngineError,
    StoreReport,
};
use ringstone_store::{
    Answer, Command, DeletionInfo, Figures, ScrubEnd, ScrubInfo, Seal, StoreError, VolumeInfo,
};
use ringstone_volume::VolumeError;
use serde::Deserialize;
use serde_json::{json, Value};
use zeroize::Zeroizing;

use crate::{engine_error, raise};

/// The engine whose reactors keep stores. A process has one at a time.
static HOST: Mutex<Weak<Engine>> = Mutex::new(Weak::new());

pub fn set_host(engine: &Arc<Engine>) {
    *HOST.lock().unwrap_or_else(|e| e.into_inner()) = Arc::downgrade(engine);
}

fn host() -> Result<Arc<Engine>, EngineError> {
    HOST.lock().unwrap_or_else(|e| e.into_inner()).upgrade().ok_or(EngineError::Stopped)
}

fn store_error(py: Python<'_>, error: &StoreError) -> PyErr {
    raise(py, store_code(error).as_str(), error.to_string())
}

pub fn drive_error(py: Python<'_>, error: DriveError) -> PyErr {
    engine_error(py, &EngineError::Volume(VolumeError::Drive(error)))
}

/// Seconds since 1970.
fn now_s() -> u64 {
    // A clock before 1970 is nobody's; it would only make dates wrong.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// As `Store.call` takes it.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Call {
    Create {
        name: String,
        size: u64,
        #[serde(default)]
        integrity: bool,
    },
    Delete {
        name: String,
    },
    Resize {
        name: String,
        size: u64,
    },
    Snapshot {
        volumes: Vec<String>,
        name: String,
    },
    DeleteSnapshot {
        volume: String,
        name: String,
    },
    KeepSnapshot {
        volume: String,
        name: String,
    },
    Reclaimable {
        volume: String,
    },
    Revert {
        volume: String,
        name: String,
    },
    Clone {
        volume: String,
        snapshot: Option<String>,
        name: String,
    },
    Flatten {
        volume: String,
    },
    List {
        name: Option<String>,
    },
    Figures,
    Diff {
        volume: String,
        from: Option<String>,
        to: Option<String>,
    },
    Grow,
    Scrub {
        rate: u64,
    },
    CancelScrub,
    ScrubStatus,
}

fn hex(uuid: [u8; 16]) -> String {
    uuid.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn volume_json(volume: &VolumeInfo) -> Value {
    let snapshot = |one: &ringstone_store::SnapshotInfo| json!({"name": one.name, "size": one.size, "created_s": one.created_s, "own": one.own});
    let deletion = |one: &DeletionInfo| json!({"name": one.name, "total": one.total, "left": one.left});
    json!({
        "name": volume.name,
        "size": volume.size,
        "created_s": volume.created_s,
        "own": volume.own,
        "inherited": volume.inherited,
        "origin": volume.origin,
        "open": volume.open,
        "integrity": volume.integrity,
        "encryption": !volume.key.is_empty(),
        "deleting": volume.deleting.iter().map(deletion).collect::<Vec<_>>(),
        "snapshots": volume.snapshots.iter().map(snapshot).collect::<Vec<_>>(),
    })
}

fn figures_json(figures: &Figures) -> Value {
    json!({
        "size": figures.size,
        "capacity": figures.capacity,
        "used": figures.used,
        "promised": figures.promised,
        "reclaiming": figures.reclaiming,
    })
}

fn scrub_json(scrub: &ScrubInfo) -> Value {
    json!({
        "started_s": scrub.started_s,
        "rate": scrub.rate,
        "total": scrub.total,
        "done": scrub.done,
        "blocks": scrub.blocks,
        "verified": scrub.verified,
        "bad": scrub.bad,
        "unreadable": scrub.unreadable,
        "mended": scrub.mended,
        "faults": scrub.faults,
        "state": match scrub.end {
            None => "running",
            Some(ScrubEnd::Done) => "done",
            Some(ScrubEnd::Cancelled) => "cancelled",
            Some(ScrubEnd::Stopped) => "stopped",
        },
        "ended_s": scrub.end.map(|_| scrub.ended_s),
    })
}

fn answer_json(answer: Answer) -> Value {
    match answer {
        Answer::Done | Answer::Opened { .. } => json!({}),
        Answer::Volumes(volumes) => json!({"volumes": volumes.iter().map(volume_json).collect::<Vec<_>>()}),
        Answer::Figures(figures) => figures_json(&figures),
        Answer::Reclaimable(found) => json!({"snapshots": found}),
        Answer::Scrub(scrub) => json!({"scrub": scrub.as_ref().map(scrub_json)}),
        Answer::Ranges(ranges) => json!({"ranges": ranges.sorted()}),
    }
}

#[pyclass(frozen)]
pub struct Store {
    path: PathBuf,
    door: Arc<dyn StoreDoor>,
}

impl Store {
    fn command(call: Call) -> Option<Command> {
        let created_s = now_s();
        Some(match call {
            Call::Create { name, size, integrity } => {
                let seal = Seal { integrity, ..Seal::default() };
                Command::Create { name, size, created_s, seal }
            }
            Call::Delete { name } => Command::Delete { name },
            Call::Resize { name, size } => Command::Resize { name, size },
            Call::Snapshot { volumes, name } => Command::Snapshot { volumes, name, created_s },
            Call::DeleteSnapshot { volume, name } => Command::DeleteSnapshot { volume, name },
            Call::KeepSnapshot { volume, name } => Command::KeepSnapshot { volume, name },
            Call::Reclaimable { volume } => Command::Reclaimable { volume },
            Call::Revert { volume, name } => Command::Revert { volume, name },
            Call::Clone { volume, snapshot, name } => Command::Clone { volume, snapshot, name, created_s },
            Call::Flatten { volume } => Command::Flatten { volume },
            Call::List { name } => Command::List { name },
            Call::Figures => Command::Figures,
            Call::Diff { volume, from, to } => Command::Diff { volume, from, to },
            Call::Scrub { rate } => Command::Scrub { rate, started_s: created_s },
            Call::CancelScrub => Command::CancelScrub,
            Call::ScrubStatus => Command::ScrubStatus,
            Call::Grow => return None,
        })
    }
}

#[pymethods]
impl Store {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let door = py.detach(|| host()?.open_store(&path)).map_err(|e| engine_error(py, &e))?;
        Ok(Self { path, door })
    }

    #[staticmethod]
    #[pyo3(signature = (path, *, size = None, extent = 65536))]
    fn format(py: Python<'_>, path: PathBuf, size: Option<u64>, extent: u64) -> PyResult<String> {
        py.detach(|| format_store(&path, size, extent)).map(hex).map_err(|e| engine_error(py, &e))
    }

    #[staticmethod]
    fn look(py: Python<'_>, path: PathBuf) -> PyResult<Option<String>> {
        let found = py.detach(|| look_for_store(&path)).map_err(|e| engine_error(py, &e))?;
        Ok(found.map(hex))
    }

    #[staticmethod]
    #[pyo3(signature = (path, *, progress = None))]
    fn check(py: Python<'_>, path: PathBuf, progress: Option<Py<PyAny>>) -> PyResult<String> {
        let mut raised = None;
        let mut tell = |done: u64, total: u64| {
            let progress = progress.as_ref();
            let told =
                progress.map_or(Ok(()), |call| Python::attach(|py| call.call1(py, (done, total)).map(drop)));
            told.map_err(|error| raised = Some(error)).is_ok()
        };
        let blocks: Option<CheckProgress<'_>> = if progress.is_some() { Some(&mut tell) } else { None };
        let report = py.detach(|| check_store(&path, blocks)).map_err(|e| engine_error(py, &e))?;
        match (report, raised) {
            (Some(report), None) => Ok(report_json(&report)),
            (_, raised) => Err(raised.unwrap_or_else(|| engine_error(py, &EngineError::Stopped))),
        }
    }

    #[staticmethod]
    fn repair(py: Python<'_>, path: PathBuf) -> PyResult<String> {
        let report = py.detach(|| repair_store(&path)).map_err(|e| engine_error(py, &e))?;
        Ok(report_json(&report))
    }

    fn call(&self, py: Python<'_>, command: &str) -> PyResult<String> {
        let call: Call =
            serde_json::from_str(command).map_err(|error| raise(py, "invalid", error.to_string()))?;
        match Self::command(call) {
            Some(command) => py
                .detach(|| self.door.call(command).map(|answer| answer_json(answer).to_string()))
                .map_err(|error| store_error(py, &error)),
            None => py
                .detach(|| host()?.grow_store(&self.path).map(|()| answer_json(Answer::Done).to_string()))
                .map_err(|e| engine_error(py, &e)),
        }
    }

    fn create_encrypted(
        &self,
        py: Python<'_>,
        name: String,
        size: u64,
        integrity: bool,
        key: &[u8],
    ) -> PyResult<()> {
        let create = || -> Result<(), DriveError> {
            let seal = new_seal(integrity, Some(&PoolKey::new(key)?))?;
            self.door.call(Command::Create { name, size, created_s: now_s(), seal })?;
            Ok(())
        };
        py.detach(create).map_err(|error| drive_error(py, error))
    }

    fn wrap_anew(&self, py: Python<'_>, before: Vec<Vec<u8>>, key: &[u8]) -> PyResult<usize> {
        let wrap = || -> Result<usize, DriveError> {
            let before = before.into_iter().map(Zeroizing::new);
            let before = before.map(|key| PoolKey::new(&key)).collect::<Result<Vec<_>, _>>()?;
            wrap_anew(&*self.door, &before, &PoolKey::new(key)?)
        };
        py.detach(wrap).map_err(|error| drive_error(py, error))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| host()?.close_store(&self.path)).map_err(|e| engine_error(py, &e))
    }
}

/// Only for measurements.
#[pyfunction]
#[pyo3(signature = (path, volume, size))]
pub fn map_without_data(py: Python<'_>, path: PathBuf, volume: &str, size: u64) -> PyResult<()> {
    py.detach(|| ringstone_gateway::map_without_data(&path, volume, size)).map_err(|e| engine_error(py, &e))
}

fn report_json(report: &StoreReport) -> String {
    let blocks = report.blocks.as_ref();
    json!({
        "uuid": hex(report.uuid),
        "size": report.figures.size,
        "extent": report.extent,
        "capacity": report.figures.capacity,
        "used": report.figures.used,
        "volumes": report.volumes.iter().map(volume_json).collect::<Vec<_>>(),
        "faults": report.faults,
        "notes": report.notes,
        "mendable": report.mendable,
        "blocks": blocks.map(|found| json!({
            "read": found.blocks,
            "verified": found.verified,
            "bad": found.bad,
            "unreadable": found.unreadable,
        })),
    })
    .to_string()
}
