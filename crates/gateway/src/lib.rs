//! The gateway's engine: volumes, the sockets they are served on, and the one control thread between frontends and reactors.
//!
//! Enters: calls from the control API (open a volume, attach it, ...) and messages from frontends. Leaves: queues for the
//! reactors to run, replies to the frontends, events for the log. The control thread waits in one epoll for its callers, for
//! every socket and for the reactors' answers; it never waits for any one of them. What takes long and concerns nobody else
//! (opening a drive, filling huge pages) is done on the caller's own thread before the control thread hears of it.
//!
//! | file | concern |
//! |---|---|
//! | `engine.rs` | the API of the whole: [`Engine`] |
//! | `control.rs` | the control thread: epoll and calls |
//! | `serve.rs` | its frontends: connecting, messages, closing |
//! | `moves.rs` | its reactors: queues that move between them, reactors that come and go |
//! | `attachment.rs`, `frontend.rs` | one attached volume, one connected frontend |
//! | `listener.rs` | an attachment's socket, and who may connect to it |
//! | `placement.rs`, `topology.rs` | which reactor a queue goes to, and on which NUMA node it is |
//! | `balancer.rs` | when a queue should move |
//! | `handover/` | going on in another process |
//! | `descriptors.rs` | room in the table of file descriptors |
//! | `device.rs` | the virtio-blk device a session shows |
//! | `stores.rs` | stores that are open, and the way to their keepers |
//! | `backend.rs` | what a volume's JSON description opens |
//! | `events.rs` | the log the control API reads |
//! | `watchdog.rs` | signs of life to the service manager |

mod attachment;
mod backend;
mod balancer;
mod control;
mod descriptors;
mod device;
mod engine;
mod error;
mod events;
mod frontend;
mod handover;
mod listener;
mod mapped;
mod moves;
mod placement;
mod serve;
mod store_check;
mod stores;
mod topology;
mod watchdog;

pub use backend::BackendSpec;
pub use engine::{AttachmentInfo, Engine, EngineSettings, QueueInfo, ReactorInfo, VolumeInfo, VolumeSpec};
pub use error::{rbd_code, store_code, Code, EngineError};
pub use events::{Event, Level};
pub use handover::{HandedOver, TakenOver, Takeover};
pub use listener::SocketRights;
pub use mapped::map_without_data;
pub use store_check::{check_store, repair_store, CheckProgress, StoreReport};
pub use stores::{format_store, look_for_store};
pub use topology::Topology;
