//! An open volume's map: where each granule is, whatever the number of snapshots.
//!
//! One word for each extent says all of it where all that was written to the extent lies in one place; else it names a *node*, a
//! list of such words, newest first. Any reactor reads; the keeper alone changes. It writes a node before it publishes the word
//! that names it, and uses a node again only when nobody can still hold its name ([`Epochs`](crate::Epochs)).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::geometry::{Extents, Zone, MOST_ZONES};
use crate::segmented::Segmented;

/// Extents on one page of a map: memory is taken by the page.
const PAGE: u32 = 8192;
/// Tags are counted up to here, one for each snapshot since the volume was opened.
pub const TAG_MAX: u16 = (1 << 14) - 2;
/// The live tag while writes are held: no part has it.
const HELD: u16 = TAG_MAX + 1;
/// What a part has that is not the live layer's, from before the volume was opened.
pub const FROZEN: u16 = 0;

/// Some granules of an extent and the place they have in common: bits 0..32 the slot, 32..48 the granules, 48..62 the tag, 62
/// set. All zero: nothing there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part(u64);

const IS_PART: u64 = 1 << 62;
const IS_NODE: u64 = 1 << 63;

impl Part {
    pub const NONE: Self = Self(0);

    pub fn new(slot: u32, mask: u16, tag: u16) -> Self {
        Self(u64::from(slot) | u64::from(mask) << 32 | u64::from(tag) << 48 | IS_PART)
    }

    #[inline(always)]
    pub fn slot(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    pub fn mask(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// The layer it was written in: the live one's, or another.
    #[inline(always)]
    pub fn tag(self) -> u16 {
        (self.0 >> 48) as u16 & (HELD | 1)
    }

    #[inline(always)]
    fn is_there(self) -> bool {
        self.0 & IS_PART != 0
    }

    fn with_mask(self, mask: u16) -> Self {
        Self(self.0 & !(0xffff << 32) | u64::from(mask) << 32)
    }

    fn with_tag(self, tag: u16) -> Self {
        Self::new(self.slot(), self.mask(), tag)
    }
}

/// All that an extent has, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    parts: [Part; 16],
    len: usize,
}

impl Default for Parts {
    fn default() -> Self {
        Self { parts: [Part::NONE; 16], len: 0 }
    }
}

impl std::ops::Deref for Parts {
    type Target = [Part];

    fn deref(&self) -> &[Part] {
        &self.parts[..self.len]
    }
}

impl Parts {
    /// Granules in some place.
    pub fn mask(&self) -> u16 {
        self.iter().fold(0, |mask, part| mask | part.mask())
    }

    /// Take the granules in `mask` away from what has them; parts without granules go.
    pub fn remove(&mut self, mask: u16) {
        let mut kept = Self::default();
        for part in self.iter() {
            let rest = part.mask() & !mask;
            if rest != 0 {
                kept.push(part.with_mask(rest));
            }
        }
        *self = kept;
    }

    /// The granules of `part` are there from here on, together with those that the same slot has already.
    pub fn put(&mut self, part: Part) {
        self.remove(part.mask());
        if let Some(same) = self.parts[..self.len].iter_mut().find(|one| one.slot() == part.slot()) {
            *same = part.with_mask(part.mask() | same.mask());
            return;
        }
        // Masks are disjoint and not empty, so there are never more than 16.
        self.parts.copy_within(..self.len, 1);
        self.parts[0] = part;
        self.len += 1;
    }

    fn push(&mut self, part: Part) {
        self.parts[self.len] = part;
        self.len += 1;
    }

    /// The part in `slot` is of the layer with this tag from here on.
    pub fn retag(&mut self, slot: u32, tag: u16) {
        for part in &mut self.parts[..self.len] {
            if part.slot() == slot {
                *part = part.with_tag(tag);
            }
        }
    }
}

/// Where a range is, as far as it is in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// `len` bytes from byte `at` of the drive on.
    At { at: u64, len: u64 },
    /// `len` bytes that read as zeroes.
    Zero { len: u64 },
}

/// What a search that may not go on for long has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    At(u32),
    /// Nothing before this extent.
    NotYet(u32),
    Nothing,
}

/// Where slots are; grows with the store.
pub struct Places {
    zones: [OnceLock<Zone>; MOST_ZONES],
}

impl Default for Places {
    fn default() -> Self {
        Self { zones: [const { OnceLock::new() }; MOST_ZONES] }
    }
}

impl Places {
    pub fn learn(&self, zones: &[Zone]) {
        for (place, zone) in self.zones.iter().zip(zones) {
            place.get_or_init(|| *zone);
        }
    }

    /// Byte of the extent in `slot`, which has a place.
    #[inline(always)]
    fn at(&self, slot: u32, shift: u32) -> u64 {
        for zone in self.zones.iter().map_while(OnceLock::get) {
            if slot < zone.first + zone.extents + zone.tombs {
                return zone.data + (u64::from(slot - zone.first) << shift);
            }
        }
        debug_assert!(false, "slot {slot} is in no zone");
        u64::MAX >> 1
    }
}

type Words = OnceLock<Box<[AtomicU64]>>;

/// See the module.
pub struct Map {
    extents: Extents,
    places: Arc<Places>,
    /// Tag of the layer that may be written in place.
    live: AtomicU64,
    pages: Segmented<Words>,
    nodes: Nodes,
}

impl Map {
    pub fn new(extents: Extents, places: Arc<Places>) -> Self {
        let live = AtomicU64::new(u64::from(FROZEN + 1));
        Self { extents, places, live, pages: Segmented::default(), nodes: Nodes::default() }
    }

    #[inline(always)]
    fn word(&self, vextent: u32) -> u64 {
        let page = self.pages.get(vextent / PAGE).and_then(OnceLock::get);
        // Acquire: the node that the word names was written before it.
        page.map_or(0, |words| words[(vextent % PAGE) as usize].load(Ordering::Acquire))
    }

    /// The address of what says where byte `offset` is, to be prefetched; null where nothing does. Any offset may be asked.
    #[inline(always)]
    pub fn word_at(&self, offset: u64) -> *const u8 {
        let vextent = (offset >> self.extents.shift) as u32;
        let page = self.pages.get(vextent / PAGE).and_then(OnceLock::get);
        page.map_or(std::ptr::null(), |words| std::ptr::from_ref(&words[(vextent % PAGE) as usize]).cast())
    }

    /// Where the bytes from `offset` on are, up to `len` of them.
    #[inline(always)]
    pub fn read(&self, offset: u64, len: u64) -> Run {
        match self.find(offset, len, None) {
            Some(run) => run,
            None => Run::Zero { len },
        }
    }

    /// Where the bytes from `offset` on can be written in place, up to `len` of them; None where the keeper has to see to it.
    #[inline(always)]
    pub fn write(&self, offset: u64, len: u64) -> Option<Run> {
        // Acquire: a tag that the keeper set after a snapshot comes with what the maps were then.
        self.find(offset, len, Some(self.live.load(Ordering::Acquire) as u16))
    }

    /// As [`write`](Self::write), of the layer with this tag.
    pub fn owned(&self, offset: u64, len: u64, tag: u16) -> Option<Run> {
        self.find(offset, len, Some(tag))
    }

    /// `tag`: only what has it counts, and what has not ends the run.
    #[inline(always)]
    fn find(&self, offset: u64, len: u64, tag: Option<u16>) -> Option<Run> {
        let run = self.within(offset, len, tag)?;
        let (Run::At { len: found, .. } | Run::Zero { len: found }) = run;
        match found < len && (offset + found).is_multiple_of(self.extents.bytes()) {
            true => Some(self.extend(run, offset, len, tag)),
            false => Some(run),
        }
    }

    /// Go on over the ends of extents, as long as it is one piece.
    fn extend(&self, mut run: Run, offset: u64, len: u64, tag: Option<u16>) -> Run {
        loop {
            let (Run::At { len: found, .. } | Run::Zero { len: found }) = run;
            if found == len || !(offset + found).is_multiple_of(self.extents.bytes()) {
                return run;
            }
            run = match (run, self.within(offset + found, len - found, tag)) {
                (Run::At { at, len }, Some(Run::At { at: next, len: more })) if at + len == next => {
                    Run::At { at, len: len + more }
                }
                (Run::Zero { len }, Some(Run::Zero { len: more })) => Run::Zero { len: len + more },
                _ => return run,
            };
        }
    }

    /// As [`find`](Self::find), in one extent.
    #[inline(always)]
    fn within(&self, offset: u64, len: u64, tag: Option<u16>) -> Option<Run> {
        let extents = &self.extents;
        let within = offset & (extents.bytes() - 1);
        let most = len.min(extents.bytes() - within);
        let word = self.word((offset >> extents.shift) as u32);
        let first = (within >> extents.granule_shift) as u32;
        let fits = |part: Part| tag.is_none_or(|tag| part.tag() == tag);
        let part = Part(word);
        if part.is_there() && fits(part) && part.mask() == extents.full() {
            return Some(Run::At { at: self.places.at(part.slot(), extents.shift) + within, len: most });
        }
        if word & IS_NODE == 0 {
            let mask = if part.is_there() && fits(part) { part.mask() } else { 0 };
            let visible = if part.is_there() { part.mask() } else { 0 };
            return self.piece(part, mask, visible, first, within, most, tag);
        }
        let (found, visible) = self.nodes.find(word, first);
        let mask = if found.is_there() && fits(found) { found.mask() } else { 0 };
        self.piece(found, mask, visible, first, within, most, tag)
    }

    /// `mask`: the granules that `part` has and that count; `visible`: those that anything has.
    #[expect(clippy::too_many_arguments, reason = "what within() has found out, split to be compiled once")]
    fn piece(
        &self,
        part: Part,
        mask: u16,
        visible: u16,
        first: u32,
        within: u64,
        most: u64,
        tag: Option<u16>,
    ) -> Option<Run> {
        let until = |granules: u32| {
            (u64::from(first + granules) << self.extents.granule_shift).saturating_sub(within).min(most)
        };
        let here = mask >> first;
        if here & 1 == 1 {
            let at = self.places.at(part.slot(), self.extents.shift) + within;
            return Some(Run::At { at, len: until(here.trailing_ones()) });
        }
        if tag.is_some() {
            return None;
        }
        let holes = (visible >> first).trailing_zeros().min(self.extents.granules() - first);
        Some(Run::Zero { len: until(holes) })
    }

    // The keeper's side.

    /// All that extent `vextent` has.
    pub fn parts(&self, vextent: u32) -> Parts {
        let word = self.word(vextent);
        if word & IS_NODE != 0 {
            return self.nodes.read(word);
        }
        let mut parts = Parts::default();
        if Part(word).is_there() {
            parts.push(Part(word));
        }
        parts
    }

    /// Publish what extent `vextent` has now. What comes back is a node that nobody finds any more: give it back to `names`
    /// when the epoch has passed.
    pub fn publish(&self, names: &mut NodeNames, vextent: u32, parts: &Parts) -> Option<Node> {
        let before = self.word(vextent);
        let word = match &**parts {
            [] if before == 0 => return None,
            [] => 0,
            [one] => one.0,
            many => self.nodes.write(names, many),
        };
        let page = self.pages.make(vextent / PAGE);
        let words = page.get_or_init(|| (0..PAGE).map(|_| AtomicU64::new(0)).collect());
        // Release: the node is written.
        words[(vextent % PAGE) as usize].store(word, Ordering::Release);
        (before & IS_NODE != 0).then_some(Node(before))
    }

    /// Publish the first part of an extent. False where it has some.
    pub fn publish_first(&self, vextent: u32, part: Part) -> bool {
        let page = self.pages.make(vextent / PAGE);
        let words = page.get_or_init(|| (0..PAGE).map(|_| AtomicU64::new(0)).collect());
        let word = &words[(vextent % PAGE) as usize];
        let first = word.load(Ordering::Relaxed) == 0;
        if first {
            word.store(part.0, Ordering::Release);
        }
        first
    }

    /// The live layer's tag.
    pub fn live(&self) -> u16 {
        self.live.load(Ordering::Relaxed) as u16
    }

    /// From here on nothing is written in place, and every write comes to the keeper.
    pub fn hold(&self) {
        self.live.store(HELD.into(), Ordering::Release);
    }

    pub fn set_live(&self, tag: u16) {
        debug_assert!(tag <= TAG_MAX);
        self.live.store(tag.into(), Ordering::Release);
    }

    /// The first extent from `from` on, below `end`, that has anything.
    pub fn next_mapped(&self, from: u32, end: u32) -> Option<u32> {
        // There are fewer extents than that.
        match self.seek_mapped(from, end, &mut u32::MAX.clone()) {
            Sought::At(vextent) => Some(vextent),
            Sought::NotYet(_) | Sought::Nothing => None,
        }
    }

    /// As [`next_mapped`](Self::next_mapped), with a look less for each word and each page without memory that is passed, and
    /// no further than that.
    pub fn seek_mapped(&self, from: u32, end: u32, looks: &mut u32) -> Sought {
        let mut at = from;
        while at < end {
            if *looks == 0 {
                return Sought::NotYet(at);
            }
            let Some(words) = self.pages.get(at / PAGE).and_then(OnceLock::get) else {
                *looks -= 1;
                at = (at / PAGE + 1).saturating_mul(PAGE);
                continue;
            };
            let first = at % PAGE;
            let stop = PAGE.min(end - (at - first)).min(first.saturating_add(*looks));
            let rest = &words[first as usize..stop as usize];
            match rest.iter().position(|word| word.load(Ordering::Relaxed) != 0) {
                Some(n) => {
                    *looks -= n as u32 + 1;
                    return Sought::At(at + n as u32);
                }
                None => {
                    *looks -= stop - first;
                    at += stop - first;
                }
            }
        }
        Sought::Nothing
    }

    /// There is memory for what an extent has.
    pub fn has_page(&self, vextent: u32) -> bool {
        self.pages.get(vextent / PAGE).and_then(OnceLock::get).is_some()
    }
}

/// The name of a node: the number of its size in bits 32..34, and its own in 0..32.
#[derive(Debug)]
pub struct Node(u64);

/// Which nodes of a map are in use. The keeper's alone.
#[derive(Default)]
pub struct NodeNames {
    /// For each of four sizes: how many were made, and which of them are free.
    sizes: [(u32, Vec<u32>); 4],
}

impl NodeNames {
    fn take(&mut self, size: usize) -> u32 {
        let (made, free) = &mut self.sizes[size];
        free.pop().unwrap_or_else(|| {
            *made += 1;
            *made - 1
        })
    }

    pub fn give(&mut self, node: Node) {
        self.sizes[(node.0 >> 32 & 3) as usize].1.push(node.0 as u32);
    }
}

/// Lists of 2, 4, 8 and 16 parts.
#[derive(Default)]
struct Nodes {
    words: [Segmented<AtomicU64>; 4],
}

impl Nodes {
    /// The part that has granule `first`, or none; and then the granules that any part has.
    #[inline]
    fn find(&self, name: u64, first: u32) -> (Part, u16) {
        let (class, index) = ((name >> 32 & 3) as usize, name as u32);
        let len = 2u32 << class;
        let mut visible = 0;
        for n in 0..len {
            let word = self.words[class].get(index * len + n).map_or(0, |word| word.load(Ordering::Relaxed));
            let part = Part(word);
            if part.mask() >> first & 1 == 1 {
                return (part, part.mask());
            }
            visible |= part.mask();
        }
        (Part::NONE, visible)
    }

    fn read(&self, name: u64) -> Parts {
        let (class, index) = ((name >> 32 & 3) as usize, name as u32);
        let len = 2u32 << class;
        let mut parts = Parts::default();
        for n in 0..len {
            let word = self.words[class].get(index * len + n).map_or(0, |word| word.load(Ordering::Relaxed));
            if word == 0 {
                break;
            }
            parts.push(Part(word));
        }
        parts
    }

    fn write(&self, names: &mut NodeNames, parts: &[Part]) -> u64 {
        let class = parts.len().next_power_of_two().trailing_zeros() as usize - 1;
        let len = 2u32 << class;
        let index = names.take(class);
        for n in 0..len {
            let word = parts.get(n as usize).map_or(0, |part| part.0);
            self.words[class].make(index * len + n).store(word, Ordering::Relaxed);
        }
        IS_NODE | (class as u64) << 32 | u64::from(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: u64 = 64 << 10;

    fn put(map: &mut (Map, NodeNames), vextent: u32, part: Part) {
        let mut parts = map.0.parts(vextent);
        parts.put(part);
        map.0.publish(&mut map.1, vextent, &parts);
    }

    fn map() -> ((Map, NodeNames), u64) {
        let layout = crate::geometry::Layout::new(64 << 20, EXTENT).unwrap();
        let places = Arc::new(Places::default());
        places.learn(&layout.zones);
        ((Map::new(layout.extents, places), NodeNames::default()), layout.zones[0].data)
    }

    #[test]
    fn an_empty_map_reads_as_zeroes_and_is_written_by_the_keeper() {
        let (map, _) = map();
        assert_eq!(map.0.read(5 * EXTENT + 512, 3 * EXTENT), Run::Zero { len: 3 * EXTENT });
        assert_eq!(map.0.write(0, 4096), None);
        assert_eq!(map.0.next_mapped(0, u32::MAX), None);
    }

    #[test]
    fn a_read_goes_on_over_extents_that_lie_together() {
        let (mut map, data) = map();
        put(&mut map, 0, Part::new(3, 0xffff, 1));
        put(&mut map, 1, Part::new(4, 0xffff, 1));
        put(&mut map, 2, Part::new(9, 0xffff, 1));
        assert_eq!(
            map.0.read(512, 4 * EXTENT),
            Run::At { at: data + 3 * EXTENT + 512, len: 2 * EXTENT - 512 }
        );
        assert_eq!(map.0.write(2 * EXTENT, 4096), Some(Run::At { at: data + 9 * EXTENT, len: 4096 }));
        assert_eq!(map.0.next_mapped(1, u32::MAX), Some(1));
        assert_eq!(map.0.next_mapped(3, u32::MAX), None);
    }

    /// What a guest's header names has not been checked when it is prefetched.
    #[test]
    fn the_word_of_any_byte_has_an_address() {
        let (mut map, _) = map();
        assert!(map.0.word_at(0).is_null() && map.0.word_at(u64::MAX).is_null());
        put(&mut map, 2, Part::new(3, 0xffff, 1));
        let word = map.0.word_at(2 * EXTENT);
        assert_eq!(word, map.0.word_at(3 * EXTENT - 1));
        for extents in 1..4 {
            assert_eq!(word.wrapping_add(8 * extents), map.0.word_at((2 + extents as u64) * EXTENT));
        }
        assert!(map.0.word_at(u64::from(PAGE) * EXTENT).is_null() && map.0.word_at(u64::MAX).is_null());
    }

    #[test]
    fn granules_of_one_extent_have_places_of_their_own() {
        let (mut map, data) = map();
        put(&mut map, 0, Part::new(3, 0x00ff, 0));
        put(&mut map, 0, Part::new(5, 0x0006, 1));
        assert_eq!(map.0.read(0, EXTENT), Run::At { at: data + 3 * EXTENT, len: 4096 });
        assert_eq!(map.0.read(4096, EXTENT), Run::At { at: data + 5 * EXTENT + 4096, len: 8192 });
        assert_eq!(map.0.read(8 * 4096, EXTENT / 4), Run::Zero { len: EXTENT / 4 });
        assert_eq!(map.0.write(0, 4096), None, "frozen");
        assert_eq!(map.0.write(4096, EXTENT), Some(Run::At { at: data + 5 * EXTENT + 4096, len: 8192 }));
        map.0.hold();
        assert_eq!(map.0.write(4096, 4096), None);
        map.0.set_live(2);
        assert_eq!(map.0.write(4096, 4096), None, "a snapshot has it");
        let mut parts = map.0.parts(0);
        parts.remove(0x00ff);
        assert!(map.0.publish(&mut map.1, 0, &parts).is_some());
        assert_eq!(map.0.read(0, EXTENT), Run::Zero { len: EXTENT });
    }

    #[test]
    fn an_extent_may_have_sixteen_places() {
        let (mut map, data) = map();
        for n in 0..16u32 {
            put(&mut map, 7, Part::new(20 + n, 1 << n, FROZEN));
        }
        assert_eq!(map.0.parts(7).len(), 16);
        for n in 0..16 {
            let at = data + (20 + n) * EXTENT + n * 4096;
            assert_eq!(map.0.read(7 * EXTENT + n * 4096, EXTENT - n * 4096), Run::At { at, len: 4096 });
        }
        put(&mut map, 7, Part::new(40, 0xffff, 1));
        assert_eq!(map.0.parts(7).len(), 1);
    }
}
