//! Images of a Ceph cluster, through librados and librbd.
//!
//! Enters: byte ranges that were checked against the volume, and buffers in guest memory, which librbd reads in place and
//! writes from what the cluster answered. Leaves: a [`Ticket`] per request, which librbd's threads put into the
//! [`Completions`] of the reactor that submitted it. The request's buffers, its ticket included, belong to librbd from the
//! submission until the ticket is back.
//!
//! The libraries are loaded when the first image of this process is used, so that Ringstone is built, installed and run
//! without Ceph. What may wait for the cluster (everything but submitting) is never called on a reactor.

mod admin;
mod bindings;
mod cluster;
mod completions;
mod error;
mod image;
mod library;
mod lock;

pub use admin::{Admin, Created, ImageInfo, Parent, SnapshotInfo};
pub use cluster::{Cluster, ClusterSpec, ClusterUsage, Space};
pub use completions::{Completions, Ticket};
pub use error::RbdError;
pub use image::{Image, ImageSpec, Transfer};
