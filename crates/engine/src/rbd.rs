//! Images of a Ceph pool, for Python's control side.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use ringstone_gateway::rbd_code;
use ringstone_rbd::{Admin, Cluster, ClusterSpec, Created, RbdError};

use crate::raise;

fn rbd_error(py: Python<'_>, error: &RbdError) -> PyErr {
    raise(py, rbd_code(error).as_str(), error.to_string())
}

#[pyclass(frozen)]
pub struct RbdImages(Admin);

impl RbdImages {
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        step: impl FnOnce(&Admin) -> Result<T, RbdError> + Send,
    ) -> PyResult<T> {
        py.detach(|| step(&self.0)).map_err(|e| rbd_error(py, &e))
    }
}

#[pymethods]
impl RbdImages {
    #[new]
    #[pyo3(signature = (*, conf, user, keyring = None, pool, namespace = String::new()))]
    fn new(
        py: Python<'_>,
        conf: PathBuf,
        user: String,
        keyring: Option<PathBuf>,
        pool: String,
        namespace: String,
    ) -> PyResult<Self> {
        let spec = ClusterSpec { conf, user, keyring };
        py.detach(|| Admin::new(Cluster::shared(&spec)?, &pool, &namespace))
            .map(Self)
            .map_err(|e| rbd_error(py, &e))
    }

    fn identity(&self, py: Python<'_>) -> PyResult<String> {
        self.run(py, Admin::identity)
    }

    fn client(&self) -> String {
        self.0.cluster().address().into()
    }

    fn retire(&self) {
        self.0.cluster().retire();
    }

    fn usage(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        self.run(py, |admin| admin.usage().map(|usage| (usage.total, usage.free)))
    }

    #[pyo3(signature = (image, size, *, order = None, data_pool = String::new()))]
    fn create(
        &self,
        py: Python<'_>,
        image: &str,
        size: u64,
        order: Option<u8>,
        data_pool: String,
    ) -> PyResult<()> {
        self.run(py, |admin| admin.create(image, size, &Created { order, data_pool }))
    }

    fn remove(&self, py: Python<'_>, image: &str) -> PyResult<()> {
        self.run(py, |admin| admin.remove(image))
    }

    fn resize(&self, py: Python<'_>, image: &str, size: u64) -> PyResult<()> {
        self.run(py, |admin| admin.resize(image, size))
    }

    fn info<'py>(&self, py: Python<'py>, image: &str) -> PyResult<Bound<'py, PyDict>> {
        let info = self.run(py, |admin| admin.info(image))?;
        let row = PyDict::new(py);
        row.set_item("size", info.size)?;
        row.set_item("owners", info.owners)?;
        row.set_item("parent", info.parent.map(|parent| (parent.pool, parent.image, parent.snapshot)))?;
        Ok(row)
    }

    fn snapshots<'py>(&self, py: Python<'py>, image: &str) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for snapshot in self.run(py, |admin| admin.snapshots(image))? {
            let row = PyDict::new(py);
            row.set_item("name", snapshot.name)?;
            row.set_item("size", snapshot.size)?;
            row.set_item("created_s", snapshot.created_s)?;
            list.append(row)?;
        }
        Ok(list)
    }

    fn create_snapshot(&self, py: Python<'_>, image: &str, snapshot: &str) -> PyResult<()> {
        self.run(py, |admin| admin.create_snapshot(image, snapshot))
    }

    fn remove_snapshot(&self, py: Python<'_>, image: &str, snapshot: &str) -> PyResult<()> {
        self.run(py, |admin| admin.remove_snapshot(image, snapshot))
    }

    fn revert(&self, py: Python<'_>, image: &str, snapshot: &str) -> PyResult<()> {
        self.run(py, |admin| admin.revert(image, snapshot))
    }

    #[pyo3(signature = (parent, snapshot, image, *, order = None, data_pool = String::new()))]
    fn clone_image(
        &self,
        py: Python<'_>,
        parent: &str,
        snapshot: &str,
        image: &str,
        order: Option<u8>,
        data_pool: String,
    ) -> PyResult<()> {
        self.run(py, |admin| admin.clone_image(parent, snapshot, image, &Created { order, data_pool }))
    }

    fn flatten(&self, py: Python<'_>, image: &str) -> PyResult<()> {
        self.run(py, |admin| admin.flatten(image))
    }
}
