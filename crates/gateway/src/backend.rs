//! What a volume's JSON description opens.

use std::fs::File;
use std::path::PathBuf;

use ringstone_blockdev::{
    lives_in_memory, Direct, Drive, DriveError, Faults, FileDrive, HugePages, MappedDrive,
};
use ringstone_rbd::{Cluster, ClusterSpec, Image, ImageSpec};
use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::handover::VolumeState;

/// A drive as the control side describes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum BackendSpec {
    Memory {
        #[serde(default)]
        path: Option<PathBuf>,
        #[serde(default)]
        hugepages: Choice,
    },
    File {
        path: PathBuf,
        #[serde(default)]
        direct: Choice,
    },
    /// An image of a Ceph cluster.
    Rbd {
        conf: PathBuf,
        #[serde(default = "admin")]
        user: String,
        #[serde(default)]
        keyring: Option<PathBuf>,
        pool: String,
        #[serde(default)]
        namespace: String,
        image: String,
        #[serde(default)]
        epoch: u64,
        /// Addresses of clients that are shut out before the first request.
        #[serde(default)]
        predecessors: Vec<String>,
        /// Another host owns it still; it is listened for, and served once it is owned.
        #[serde(default)]
        incoming: bool,
    },
    /// A volume of a store, by its name there.
    Store {
        path: PathBuf,
        volume: String,
    },
    Null,
    Faulty {
        inner: Box<BackendSpec>,
        #[serde(default)]
        seed: u64,
        #[serde(default)]
        error_per_million: u32,
        #[serde(default)]
        torn_per_million: u32,
        #[serde(default)]
        lost_per_million: u32,
        #[serde(default)]
        delay_us: u32,
    },
}

fn admin() -> String {
    "client.admin".into()
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    #[default]
    Auto,
    On,
    Off,
}

impl BackendSpec {
    pub fn parse(json: &str) -> Result<Self, EngineError> {
        serde_json::from_str(json).map_err(EngineError::Backend)
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Memory { .. } => "memory",
            Self::File { .. } => "file",
            Self::Rbd { .. } => "rbd",
            Self::Store { .. } => "store",
            Self::Null => "null",
            Self::Faulty { .. } => "faulty",
        }
    }

    pub fn is_incoming(&self) -> bool {
        matches!(self, Self::Rbd { incoming: true, .. })
    }

    /// Open the drive for a volume of `size` bytes.
    pub fn open(
        &self,
        size: u64,
        block_size: u32,
        read_only: bool,
    ) -> Result<(Drive, Option<Faults>), EngineError> {
        let drive = match self {
            Self::Memory { path: Some(path), .. } => Drive::Mapped(MappedDrive::open(path, size, read_only)?),
            Self::Memory { path: None, hugepages } => {
                let huge = match hugepages {
                    Choice::Auto => HugePages::Auto,
                    Choice::On => HugePages::On,
                    Choice::Off => HugePages::Off,
                };
                Drive::Mapped(MappedDrive::anonymous(size, huge)?)
            }
            Self::File { path, direct } => {
                let in_memory = lives_in_memory(path)
                    .map_err(|source| DriveError::Open { path: path.clone(), source })?;
                if in_memory {
                    Drive::Mapped(MappedDrive::open(path, size, read_only)?)
                } else {
                    let direct = match direct {
                        Choice::Auto => Direct::Auto,
                        Choice::On => Direct::On,
                        Choice::Off => Direct::Off,
                    };
                    Drive::File(FileDrive::open(path, size, block_size, read_only, direct)?)
                }
            }
            Self::Rbd { incoming, .. } => Drive::Rbd(self.open_image(size, read_only, *incoming)?),
            Self::Null => Drive::Null,
            // Opened by the engine, which has the store.
            Self::Store { .. } => return Err(EngineError::FaultyInner("store".into())),
            Self::Faulty { inner, .. } => {
                if matches!(**inner, Self::Null | Self::Rbd { .. } | Self::Store { .. } | Self::Faulty { .. })
                {
                    return Err(EngineError::FaultyInner(inner.kind().into()));
                }
                inner.open(size, block_size, read_only)?.0
            }
        };
        Ok((drive, self.faults()))
    }

    /// The drive of a process that hands it over: what that has open, with the locks on it. `image`: its image, owned.
    pub fn adopt(
        &self,
        state: &VolumeState,
        file: Option<File>,
        presence: Option<&[u8]>,
        image: Option<Image>,
    ) -> Result<(Drive, Option<Faults>), EngineError> {
        let path = self.path();
        let drive = match (state.drive.as_str(), file, image) {
            ("null", ..) => Drive::Null,
            ("rbd", _, Some(image)) => Drive::Rbd(image),
            ("mapped", Some(file), _) => {
                Drive::Mapped(MappedDrive::adopt(file, path.cloned(), state.size, presence)?)
            }
            ("file", Some(file), _) => {
                let path = path.cloned().unwrap_or_default();
                Drive::File(FileDrive::adopt(file, &path, state.size, state.block_size, state.read_only)?)
            }
            (other, ..) => {
                return Err(EngineError::Handover(format!(
                    "volume {:?} comes without its {other}",
                    state.name
                )))
            }
        };
        Ok((drive, self.faults()))
    }

    /// The file or device under it, if it has a name.
    fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Memory { path, .. } => path.as_ref(),
            Self::File { path, .. } => Some(path),
            Self::Rbd { .. } | Self::Store { .. } | Self::Null => None,
            Self::Faulty { inner, .. } => inner.path(),
        }
    }

    /// The cluster of an image.
    pub fn cluster(&self) -> Result<ClusterSpec, EngineError> {
        match self {
            Self::Rbd { conf, user, keyring, .. } => {
                Ok(ClusterSpec { conf: conf.clone(), user: user.clone(), keyring: keyring.clone() })
            }
            _ => Err(self.no_image()),
        }
    }

    /// Open the image; `incoming`: without its lock.
    pub fn open_image(&self, size: u64, read_only: bool, incoming: bool) -> Result<Image, EngineError> {
        let Self::Rbd { pool, namespace, image, epoch, predecessors, .. } = self else {
            return Err(self.no_image());
        };
        let spec = ImageSpec {
            pool: pool.clone(),
            namespace: namespace.clone(),
            image: image.clone(),
            epoch: *epoch,
            predecessors: predecessors.clone(),
            incoming,
        };
        let cluster = Cluster::shared(&self.cluster()?).map_err(DriveError::from)?;
        Ok(Image::open(&cluster, &spec, size, read_only).map_err(DriveError::from)?)
    }

    /// Take the lock of an image that is open without; `from`: a client that has it and is shut out.
    pub fn own_image(&self, image: &Image, from: Option<&String>) -> Result<(), EngineError> {
        let Self::Rbd { epoch, predecessors, .. } = self else {
            return Err(self.no_image());
        };
        let before: Vec<String> = predecessors.iter().chain(from).cloned().collect();
        Ok(image.own(*epoch, &before).map_err(DriveError::from)?)
    }

    fn no_image(&self) -> EngineError {
        EngineError::Handover(format!("a volume on {} is handed over as an image", self.kind()))
    }

    fn faults(&self) -> Option<Faults> {
        match *self {
            Self::Faulty {
                seed, error_per_million, torn_per_million, lost_per_million, delay_us, ..
            } => Some(Faults { seed, error_per_million, torn_per_million, lost_per_million, delay_us }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_with_unknown_words_are_refused() {
        assert!(BackendSpec::parse(r#"{"type":"null"}"#).is_ok());
        assert!(BackendSpec::parse(r#"{"type":"memory","path":null,"hugepages":"off"}"#).is_ok());
        for bad in
            [r#"{"type":"tape"}"#, r#"{"type":"file"}"#, r#"{"type":"file","path":"x","dirct":"on"}"#, "{"]
        {
            assert!(matches!(BackendSpec::parse(bad), Err(EngineError::Backend(_))), "{bad}");
        }
        let nested = r#"{"type":"faulty","inner":{"type":"null"}}"#;
        assert!(matches!(
            BackendSpec::parse(nested).unwrap().open(4096, 512, false),
            Err(EngineError::FaultyInner(_))
        ));
    }
}
