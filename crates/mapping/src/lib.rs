//! Shared memory mappings that survive the other side truncating the file.
//!
//! Enters: a file descriptor from a frontend, or of a volume that lives in memory. Leaves: a [`Mapping`], whose bytes any
//! thread may touch through raw pointers for as long as it lives. A peer that shrinks the file behind a mapping turns the
//! next access into SIGBUS, which would end the whole process and with it every volume of the host. [`guard`] catches that
//! signal: it puts anonymous zero pages over the whole mapping, marks it poisoned and wakes whoever watches
//! [`guard::poison_event`], so that the one device is stopped and everything else goes on.

mod error;
pub mod guard;
mod mapping;

pub use error::MappingError;
pub use mapping::{page_size_of, Mapping};
