//! Where everything lies on the drive: see docs/formats/store.md.

use crate::error::StoreError;

/// Bytes of the unit that the drive writes atomically, or torn at 512 bytes.
pub const BLOCK: u64 = 4096;
/// Where the two superblocks are.
pub const SUPERBLOCKS: [u64; 2] = [0, 512 << 10];
const JOURNAL_AT: u64 = 1 << 20;
/// Data begins on this boundary.
const DATA_ALIGN: u64 = 1 << 20;
/// Entries of a table page behind its header.
pub const ENTRIES_PER_PAGE: u32 = 252;
/// Checksums of a page of them, behind its header: a page of the table has whole pages of checksums, whatever the extents.
pub const SUMS_PER_PAGE: u64 = 1008;
/// Granules of an extent at most: the bits of a mask.
const MOST_GRANULES: u64 = 16;
/// Zones of a store at most: it grew this often, and once was made.
pub const MOST_ZONES: usize = 64;
/// One tombstone's room for this many extents.
const EXTENTS_PER_TOMB: u32 = 16;
pub const SMALLEST_STORE: u64 = 16 << 20;
/// Slots are numbered with 32 bits, and the highest is never given out.
const MOST_SLOTS: u64 = u32::MAX as u64 - 1;

/// Sizes that follow from the extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    /// log2 of the bytes of an extent.
    pub shift: u32,
    /// log2 of the bytes of a granule, the part of an extent that has a place of its own: a block, or a 16th of the extent
    /// where that is more.
    pub granule_shift: u32,
}

impl Extents {
    /// # Errors
    /// Not a power of two from 16 KiB to 1 MiB.
    pub fn new(bytes: u64) -> Result<Self, StoreError> {
        if !bytes.is_power_of_two() || !(16 << 10..=1 << 20).contains(&bytes) {
            return Err(StoreError::Impossible(format!(
                "an extent has a power of two of bytes from 16 KiB to 1 MiB, not {bytes}"
            )));
        }
        let granule = (bytes / MOST_GRANULES).max(BLOCK);
        Ok(Self { shift: bytes.trailing_zeros(), granule_shift: granule.trailing_zeros() })
    }

    pub fn bytes(&self) -> u64 {
        1 << self.shift
    }

    /// Blocks of an extent.
    pub fn blocks(&self) -> u32 {
        1 << (self.shift - BLOCK.trailing_zeros())
    }

    /// Pages of checksums for what one page of the table describes.
    pub fn sum_pages(&self) -> u32 {
        self.blocks() * ENTRIES_PER_PAGE / SUMS_PER_PAGE as u32
    }

    pub fn granule(&self) -> u64 {
        1 << self.granule_shift
    }

    /// Granules of an extent.
    pub fn granules(&self) -> u32 {
        1 << (self.shift - self.granule_shift)
    }

    /// A mask of all granules.
    pub fn full(&self) -> u16 {
        u16::MAX >> (16 - self.granules())
    }

    /// Bits of the granules that `len` bytes from `within` in an extent touch. `len` is not 0 and ends in the extent.
    pub fn mask(&self, within: u64, len: u64) -> u16 {
        let first = within >> self.granule_shift;
        let last = (within + len - 1) >> self.granule_shift;
        self.full() >> (u64::from(self.granules()) - 1 - last) & (u16::MAX << first)
    }
}

/// A part of the drive with a table and the extents it describes. A store has one when it is made, and one more each time
/// that it grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Byte of the first copy of the table; the second follows it.
    pub table: u64,
    /// As that, of the checksums.
    pub sums: u64,
    /// Byte of the first extent.
    pub data: u64,
    /// Number of its first slot. Slots with a place come first, then those without.
    pub first: u32,
    pub extents: u32,
    /// Slots without a place, for tombstones.
    pub tombs: u32,
}

impl Zone {
    /// What fits between `start` and `end`; None where no extent does.
    pub fn between(start: u64, end: u64, extents: Extents, first: u32) -> Option<Self> {
        let room = end.checked_sub(start)?;
        let mut count = room >> extents.shift;
        count = count.min(MOST_SLOTS.saturating_sub(u64::from(first)) / 17 * 16);
        while count > 0 {
            let tombs = Self::tombs_for(count as u32);
            let zone = Self { table: start, sums: 0, data: 0, first, extents: count as u32, tombs };
            let sums = start + 2 * u64::from(zone.pages()) * BLOCK;
            let data = (sums + 2 * zone.sum_pages(extents) * BLOCK).next_multiple_of(DATA_ALIGN);
            let fits = end.saturating_sub(data) >> extents.shift;
            if fits >= count {
                return Some(Self { sums, data, ..zone });
            }
            count = fits.min(count - 1);
        }
        None
    }

    /// Slots without a place beside so many extents.
    pub fn tombs_for(extents: u32) -> u32 {
        extents.div_ceil(EXTENTS_PER_TOMB)
    }

    pub fn slots(&self) -> u32 {
        self.extents + self.tombs
    }

    /// Table pages of one copy.
    pub fn pages(&self) -> u32 {
        self.slots().div_ceil(ENTRIES_PER_PAGE)
    }

    /// Pages of checksums of one copy.
    pub fn sum_pages(&self, extents: Extents) -> u64 {
        u64::from(self.pages()) * u64::from(extents.sum_pages())
    }

    /// Byte of page `page` of copy `copy` of the table.
    pub fn page_at(&self, page: u32, copy: u8) -> u64 {
        self.table + (u64::from(copy) * u64::from(self.pages()) + u64::from(page)) * BLOCK
    }
}

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub extents: Extents,
    /// Bytes of the drive in use.
    pub size: u64,
    pub journal_at: u64,
    pub journal_blocks: u32,
    /// Two copies, one behind the other.
    pub catalog_at: u64,
    pub catalog_len: u64,
    pub zones: Vec<Zone>,
}

impl Layout {
    /// Of a new store on `size` bytes.
    ///
    /// # Errors
    /// Too small.
    pub fn new(size: u64, extent: u64) -> Result<Self, StoreError> {
        let extents = Extents::new(extent)?;
        let size = size / BLOCK * BLOCK;
        if size < SMALLEST_STORE {
            return Err(StoreError::Impossible(format!(
                "a store takes {SMALLEST_STORE} bytes or more, not {size}"
            )));
        }
        let journal = (size / 256).clamp(1 << 20, 256 << 20) / BLOCK;
        let catalog_at = JOURNAL_AT + journal * BLOCK;
        let catalog_len = (size / 1024).clamp(256 << 10, 16 << 20) / BLOCK * BLOCK;
        let zone = Zone::between(catalog_at + 2 * catalog_len, size, extents, 0)
            .ok_or_else(|| StoreError::Impossible(format!("no extent of {extent} bytes fits into {size}")))?;
        Ok(Self {
            extents,
            size,
            journal_at: JOURNAL_AT,
            journal_blocks: journal as u32,
            catalog_at,
            catalog_len,
            zones: vec![zone],
        })
    }

    /// Of this store on `size` bytes.
    ///
    /// # Errors
    /// Not larger by an extent, or grown too often.
    pub fn grown(&self, size: u64) -> Result<Self, StoreError> {
        let size = size / BLOCK * BLOCK;
        let start = self.size.next_multiple_of(DATA_ALIGN);
        let zone = (self.zones.len() < MOST_ZONES)
            .then(|| Zone::between(start, size, self.extents, self.slots()))
            .flatten()
            .ok_or_else(|| {
                StoreError::Impossible(format!(
                    "growing from {} to {size} bytes adds no extent, or the store grew {MOST_ZONES} times already",
                    self.size
                ))
            })?;
        let mut grown = self.clone();
        grown.size = size;
        grown.zones.push(zone);
        Ok(grown)
    }

    pub fn slots(&self) -> u32 {
        self.zones.last().map_or(0, |zone| zone.first + zone.slots())
    }

    /// Extents on the drive.
    pub fn capacity(&self) -> u64 {
        self.zones.iter().map(|zone| u64::from(zone.extents)).sum()
    }

    /// Table pages of one copy in all zones.
    pub fn pages(&self) -> u32 {
        self.zones.iter().map(Zone::pages).sum()
    }

    /// The page that describes `slot`, counted over all zones.
    pub fn page_of(&self, slot: u32) -> u32 {
        let mut before = 0;
        for zone in &self.zones {
            if slot < zone.first + zone.slots() {
                return before + (slot - zone.first) / ENTRIES_PER_PAGE;
            }
            before += zone.pages();
        }
        before
    }

    /// Zone, page in it, and first slot of page `page`, counted over all zones.
    pub fn page(&self, page: u32) -> (&Zone, u32, u32) {
        let mut in_zone = page;
        for zone in &self.zones {
            if in_zone < zone.pages() {
                return (zone, in_zone, zone.first + in_zone * ENTRIES_PER_PAGE);
            }
            in_zone -= zone.pages();
        }
        unreachable!("a page has a number below pages()")
    }

    /// Byte of copy `copy` of page `page` of checksums, counted over all zones.
    pub fn sum_page_at(&self, page: u32, copy: u8) -> u64 {
        let each = self.extents.sum_pages();
        let (zone, in_zone, _) = self.page(page / each);
        let page = u64::from(in_zone) * u64::from(each) + u64::from(page % each);
        zone.sums + (u64::from(copy) * zone.sum_pages(self.extents) + page) * BLOCK
    }

    /// The slot whose extent has byte `at` of the drive, and the byte in it.
    pub fn slot_at(&self, at: u64) -> Option<(u32, u64)> {
        let zone = self.zones.iter().rev().find(|zone| at >= zone.data)?;
        let slot = (at - zone.data) >> self.extents.shift;
        (slot < u64::from(zone.extents))
            .then(|| (zone.first + slot as u32, (at - zone.data) % self.extents.bytes()))
    }

    /// Byte of the extent that `slot` stands for; None for slots without a place.
    pub fn place(&self, slot: u32) -> Option<u64> {
        let zone = self.zones.iter().rev().find(|zone| slot >= zone.first)?;
        let at = slot - zone.first;
        (at < zone.extents).then(|| zone.data + (u64::from(at) << self.extents.shift))
    }

    pub fn catalog_copy(&self, copy: u8) -> u64 {
        self.catalog_at + u64::from(copy) * self.catalog_len
    }

    pub fn journal_block(&self, seq: u64) -> u64 {
        self.journal_at + seq % u64::from(self.journal_blocks) * BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_name_the_granules_that_bytes_touch() {
        let extents = Extents::new(64 << 10).unwrap();
        assert_eq!((extents.granules(), extents.full()), (16, 0xffff));
        assert_eq!(extents.mask(0, 1), 1);
        assert_eq!(extents.mask(4095, 2), 3);
        assert_eq!(extents.mask(8192, 64 << 10 >> 1), 0x3fc);
        assert_eq!(extents.mask(0, 64 << 10), 0xffff);
        let small = Extents::new(16 << 10).unwrap();
        assert_eq!((small.granules(), small.full(), small.mask(12 << 10, 4096)), (4, 0xf, 8));
        let large = Extents::new(1 << 20).unwrap();
        assert_eq!((large.granule(), large.granules()), (64 << 10, 16));
    }

    #[test]
    fn a_layout_fills_its_drive_and_nothing_overlaps() {
        for size in [16u64 << 20, 100 << 20, (1 << 30) + 12345, 1 << 40] {
            for extent in [16u64 << 10, 64 << 10, 1 << 20] {
                let layout = Layout::new(size, extent).unwrap();
                let zone = layout.zones[0];
                assert!(zone.table >= layout.catalog_at + 2 * layout.catalog_len);
                assert_eq!(zone.page_at(zone.pages() - 1, 1) + BLOCK, zone.sums);
                let last = layout.pages() * layout.extents.sum_pages() - 1;
                assert!(layout.sum_page_at(last, 1) + BLOCK <= zone.data);
                let end = zone.data + u64::from(zone.extents) * extent;
                assert!(end <= layout.size, "{size} {extent}");
                let unused = layout.size - end;
                assert!(unused < extent + 2 * DATA_ALIGN + size / 65536, "{size} {extent}: {unused}");
            }
        }
    }

    #[test]
    fn growth_adds_a_zone_behind() {
        let layout = Layout::new(64 << 20, 64 << 10).unwrap();
        let grown = layout.grown(96 << 20).unwrap();
        assert_eq!(grown.zones[0], layout.zones[0]);
        assert_eq!(grown.zones[1].first, layout.slots());
        let first = grown.zones[1].first;
        assert_eq!(grown.place(first), Some(grown.zones[1].data));
        assert_eq!(grown.place(first - 1), None);
        assert_eq!(grown.slot_at(grown.zones[1].data + (65 << 10)), Some((first + 1, 1 << 10)));
        assert_eq!(grown.slot_at(grown.zones[1].sums), None);
        assert_eq!(grown.page_of(first), layout.pages());
        assert!(matches!(layout.grown(64 << 20), Err(StoreError::Impossible(_))));
    }
}
