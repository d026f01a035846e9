//! A vhost-user-blk frontend that drives, checks and scripts a backend, and the bare ring it is compared with.
//!
//! The virtio side (vhost-user messages, virtqueue layout and ring handling) comes from the crate `virtio-driver`,
//! which shares nothing with this project's backend; so what passes here passes with somebody else's reading of the
//! specification. The pattern job, which outlives its backend, and loads on rings that the former does not set up take the
//! messages from rust-vmm's `vhost`. A job
//! enters as JSON ([`run_json`], [`limit_json`]), runs on threads of its own that are bound to the cores it names, and
//! leaves as JSON. All payload memory belongs to this side: the backend maps it, and it is unmapped only after the
//! connection is closed.

mod affinity;
mod clock;
mod config;
mod connection;
mod error;
mod generator;
mod histogram;
mod hold;
mod limit;
mod memory;
mod pattern;
mod queue;
mod random;
mod recorder;
mod report;
mod script;
mod tracked;
mod verify;

pub use config::{HoldConfig, Job, LimitConfig, LoadConfig, PatternConfig, ScriptConfig, VerifyConfig};
pub use error::LoadError;
pub use histogram::Histogram;

/// Runs the job that `config` describes (JSON with `mode`: `load`, `verify`, `script`, `hold` or `pattern`) and
/// returns its report as JSON. Blocks until the job is done.
///
/// # Errors
/// [`LoadError`] when the configuration is wrong, the backend cannot be reached, or it stops answering. Requests that
/// the backend completes with an error are counted in the report and are no error of the job.
pub fn run_json(config: &str) -> Result<String, LoadError> {
    match serde_json::from_str::<Job>(config)? {
        Job::Load(config) => to_json(&generator::run(&config)?),
        Job::Verify(config) => to_json(&verify::run(&config)?),
        Job::Script(config) => to_json(&script::run(&config)?),
        Job::Hold(config) => to_json(&hold::run(&config)?),
        Job::Pattern(config) => to_json(&pattern::run(&config)?),
    }
}

/// Measures the bare shared-memory ring between two cores as `config` (JSON of [`LimitConfig`]) says and returns the
/// report as JSON. Blocks until the measurement is done.
///
/// # Errors
/// [`LoadError`] when the configuration is wrong, a core does not exist, or memory cannot be had.
pub fn limit_json(config: &str) -> Result<String, LoadError> {
    to_json(&limit::run(&serde_json::from_str::<LimitConfig>(config)?)?)
}

fn to_json<T: serde::Serialize>(report: &T) -> Result<String, LoadError> {
    Ok(serde_json::to_string(report)?)
}
