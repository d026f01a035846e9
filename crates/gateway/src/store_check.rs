//! Looking into a store that nobody has open, and mending what can be mended.

use std::path::Path;
use std::sync::Arc;

use ringstone_blockdev::{Direct, DriveError, FileDrive};
use ringstone_store::{Figures, Keeper, Mend, Verified, VolumeInfo, BLOCK};

use crate::error::EngineError;
use crate::stores::boot_id;

/// What a check has found.
pub struct StoreReport {
    pub uuid: [u8; 16],
    /// Bytes of an extent.
    pub extent: u64,
    pub figures: Figures,
    pub volumes: Vec<VolumeInfo>,
    /// What cannot be.
    pub faults: Vec<String>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// What [`repair_store`] mends.
    pub mendable: Vec<String>,
    /// What the blocks in use hold, if they were looked at.
    pub blocks: Option<Verified>,
}

/// Hears of the bytes that were read and all that there are; false ends the check.
pub type CheckProgress<'a> = &'a mut (dyn FnMut(u64, u64) -> bool + Send);

/// All that the store at `path` holds, and what in it cannot be. Nothing is changed. `blocks`: those in use are read too, and held
/// against their checksums. None if `blocks` ended it.
///
/// # Errors
/// There is no store, somebody has it open, or it is damaged.
pub fn check_store(
    path: &Path,
    blocks: Option<CheckProgress<'_>>,
) -> Result<Option<StoreReport>, EngineError> {
    // Read-only, and locked against a keeper.
    let drive = FileDrive::open(path, 0, BLOCK as u32, true, Direct::Auto)?;
    Ok(look_into(&drive, blocks)?.map(|(report, _)| report))
}

/// Write bad copies anew beside which there are good ones that say all that they said. Returns what was mended; the report has what
/// was found before.
///
/// # Errors
/// As [`check_store`]. Where there are faults that it cannot mend it changes nothing, and says so; or the drive fails.
pub fn repair_store(path: &Path) -> Result<StoreReport, EngineError> {
    let drive = FileDrive::open(path, 0, BLOCK as u32, false, Direct::Auto)?;
    let found = look_into(&drive, None)?;
    let (report, mends) = found.ok_or(EngineError::Stopped)?;
    if !report.faults.is_empty() {
        return Err(EngineError::Unmendable { path: path.to_owned(), faults: report.faults.len() });
    }
    ringstone_store::mend(&drive, &mends).map_err(DriveError::from)?;
    Ok(report)
}

fn look_into(
    drive: &FileDrive,
    blocks: Option<CheckProgress<'_>>,
) -> Result<Option<(StoreReport, Vec<Mend>)>, EngineError> {
    let boot = boot_id()?;
    let recovered = ringstone_store::recover(drive, boot).map_err(DriveError::from)?;
    let mut faults = ringstone_store::check(&recovered);
    let copies = ringstone_store::copies(drive, &recovered.superblock).map_err(DriveError::from)?;
    faults.extend(copies.faults);
    let blocks = match blocks {
        None => None,
        Some(progress) => match ringstone_store::verify(drive, &recovered, progress) {
            None => return Ok(None),
            found => found,
        },
    };
    if let Some(found) = &blocks {
        let more = found.bad + found.unreadable - found.faults.len() as u64;
        faults.extend(found.faults.iter().cloned());
        faults.extend((more > 0).then(|| format!("{more} more blocks are like these")));
    }
    let (uuid, extent) = (recovered.superblock.uuid, recovered.superblock.layout.extents.bytes());
    let mut keeper = Keeper::new(recovered, boot, Arc::default()).map_err(DriveError::from)?;
    let notes = std::iter::from_fn(|| keeper.next_event()).chain(copies.notes).collect();
    let mendable = copies.mends.iter().map(|mend| mend.what().to_owned()).collect();
    let (figures, volumes) = (keeper.figures(), keeper.volumes());
    let report = StoreReport { uuid, extent, figures, volumes, faults, notes, mendable, blocks };
    Ok(Some((report, copies.mends)))
}
