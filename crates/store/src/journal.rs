//! Writing the journal: what is to change is gathered, goes out in blocks, and counts in their order.

use std::collections::VecDeque;

use crate::format::{zeroed, Block, JournalBlock, JournalHead, Writer, RECORDS_LEN};

/// Blocks under way at one time. One more hides the drive's latency; many would make blocks that are half empty.
const UNDER_WAY: usize = 4;
/// Blocks that are kept free: those under way, and what a checkpoint needs to end.
const MARGIN: u64 = 16;

/// Records one behind the other. A block takes whole ones.
#[derive(Default)]
pub struct Records {
    bytes: Writer,
    /// Of each record, the byte behind it.
    ends: Vec<u32>,
}

impl Records {
    /// With room for `count` records of `bytes` in all.
    pub fn with_capacity(count: usize, bytes: usize) -> Self {
        Self { bytes: Writer(Vec::with_capacity(bytes)), ends: Vec::with_capacity(count) }
    }

    /// Append what `record` writes: one record, as [`JournalBlock::put_slot`] and `put_change` make it.
    pub fn push(&mut self, record: impl FnOnce(&mut Writer)) {
        record(&mut self.bytes);
        self.ends.push(self.bytes.0.len() as u32);
    }

    fn len(&self) -> usize {
        self.bytes.0.len()
    }

    /// Take the first records, as many as `room` bytes have room for.
    fn take(&mut self, room: usize) -> Vec<u8> {
        let count = self.ends.partition_point(|end| *end as usize <= room);
        let len = count.checked_sub(1).map_or(0, |last| self.ends[last]);
        self.ends.drain(..count);
        self.ends.iter_mut().for_each(|end| *end -= len);
        self.bytes.0.drain(..len as usize).collect()
    }
}

/// Some changes that count all or none, and what is to be done once they do.
pub struct Item<C> {
    pub records: Records,
    pub commit: C,
    /// It counts only when it is durable.
    pub durable: bool,
}

struct UnderWay<C> {
    seq: u64,
    done: bool,
    marked: u64,
    /// It says more than what is durable.
    has_records: bool,
    /// Of the groups that end here.
    commits: Vec<C>,
}

/// A block to be written.
pub struct Out {
    pub seq: u64,
    pub block: Box<[Block]>,
    /// It has to be durable when it is done.
    pub durable: bool,
}

/// See the module.
pub struct Journal<C> {
    uuid: [u8; 16],
    blocks: u64,
    incarnation: u64,
    began: u64,
    next: u64,
    /// Groups before this one count.
    committed: u64,
    /// Behind the last block that counts and has records. Those behind it say only what is durable.
    spoken: u64,
    /// Blocks before this one are durable with all they speak of, and a block says so.
    marked: u64,
    /// What was written in place for blocks before this one is durable.
    settled: u64,
    /// Blocks before this one are not needed any more.
    tail: u64,
    pending: VecDeque<Item<C>>,
    /// Bytes of their records.
    pending_bytes: usize,
    under_way: VecDeque<UnderWay<C>>,
    /// What the next block is to say is durable.
    mark: Option<u64>,
}

impl<C> Journal<C> {
    pub fn new(uuid: [u8; 16], blocks: u32, incarnation: u64, next: u64, tail: u64, marked: u64) -> Self {
        Self {
            uuid,
            blocks: blocks.into(),
            incarnation,
            began: next,
            next,
            committed: next,
            spoken: next,
            marked,
            settled: 0,
            tail,
            pending: VecDeque::new(),
            pending_bytes: 0,
            under_way: VecDeque::new(),
            mark: None,
        }
    }

    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Records before this number count.
    pub fn spoken(&self) -> u64 {
        self.spoken
    }

    pub fn marked(&self) -> u64 {
        self.marked
    }

    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Blocks that are still needed, of all there are.
    pub fn used(&self) -> (u64, u64) {
        (self.next - self.tail, self.blocks)
    }

    /// There is room for what is pending.
    pub fn has_room(&self) -> bool {
        let blocks = self.pending_bytes.div_ceil(RECORDS_LEN / 2) as u64;
        self.next - self.tail + blocks + 2 * MARGIN < self.blocks
    }

    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.under_way.is_empty() && self.mark.is_none()
    }

    /// Items that wait for a block.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// A checkpoint holds what blocks before `seq` say, and is durable up to `covered`.
    pub fn release(&mut self, seq: u64, covered: u64) {
        self.tail = seq;
        self.marked = self.marked.max(covered);
    }

    pub fn push(&mut self, item: Item<C>) {
        self.pending_bytes += item.records.len();
        self.pending.push_back(item);
    }

    /// Blocks from here on say that what was written in place for blocks before `seq` is durable.
    pub fn settle(&mut self, seq: u64) {
        self.settled = self.settled.max(seq);
    }

    /// Say with the next block that what is before `seq` is durable; `commit` when that is durable too.
    pub fn mark(&mut self, seq: u64, commit: C) {
        self.mark = Some(self.mark.unwrap_or(0).max(seq));
        self.pending.push_back(Item { records: Records::default(), commit, durable: true });
    }

    /// The next block to write, if there is one and one may go out.
    pub fn next_block(&mut self) -> Option<Out> {
        let goes_on = self.under_way.back().is_some_and(|last| last.commits.is_empty());
        if self.pending.is_empty()
            || self.under_way.len() >= UNDER_WAY && !goes_on
            || self.next - self.tail + MARGIN >= self.blocks
        {
            return None;
        }
        let mut records = Vec::with_capacity(RECORDS_LEN);
        let mut commits = Vec::new();
        let mut durable = false;
        while let Some(item) = self.pending.front_mut() {
            if records.len() + item.records.len() <= RECORDS_LEN {
                durable |= item.durable;
                records.extend_from_slice(&item.records.bytes.0);
                commits.extend(self.pending.pop_front().map(|item| item.commit));
                continue;
            }
            if commits.is_empty() {
                // A group of several blocks, which begins with a block of its own.
                durable |= item.durable;
                records.extend(item.records.take(RECORDS_LEN));
            }
            break;
        }
        self.pending_bytes -= records.len();
        durable |= self.mark.is_some();
        let marked = self.mark.take().unwrap_or(0).max(self.marked);
        let head = JournalHead {
            seq: self.next,
            incarnation: self.incarnation,
            began: self.began,
            marked,
            settled: self.settled,
            last: !commits.is_empty(),
        };
        let mut block = zeroed(1);
        JournalBlock::encode(&self.uuid, &head, &records, &mut block[0]);
        let has_records = !records.is_empty();
        self.under_way.push_back(UnderWay { seq: self.next, done: false, marked, has_records, commits });
        self.next += 1;
        Some(Out { seq: head.seq, block, durable })
    }

    /// Block `seq` is on the drive. What counts from here on comes back in order, each with the block that made it count.
    pub fn written(&mut self, seq: u64) -> Vec<(u64, C)> {
        if let Some(one) = self.under_way.iter_mut().find(|one| one.seq == seq) {
            one.done = true;
        }
        let mut commits = Vec::new();
        while self.under_way.front().is_some_and(|one| one.done) {
            let Some(one) = self.under_way.pop_front() else { break };
            self.marked = self.marked.max(one.marked);
            if !one.commits.is_empty() {
                self.committed = one.seq + 1;
                if one.has_records {
                    self.spoken = self.committed;
                }
            }
            commits.extend(one.commits.into_iter().map(|commit| (one.seq, commit)));
        }
        commits
    }

    /// It cannot be written: all that waits for it comes back.
    pub fn fail(&mut self) -> Vec<C> {
        (self.mark, self.pending_bytes) = (None, 0);
        let under_way = self.under_way.drain(..).flat_map(|one| one.commits);
        under_way.chain(self.pending.drain(..).map(|item| item.commit)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &'static str, records: usize) -> Item<&'static str> {
        let mut all = Records::default();
        (0..records).for_each(|_| all.push(|out| out.0.extend_from_slice(&[0; 100])));
        Item { records: all, commit: name, durable: false }
    }

    fn journal() -> Journal<&'static str> {
        Journal::new([7; 16], 256, 2, 10, 10, 10)
    }

    #[test]
    fn one_block_takes_all_that_waits_and_later_ones_wait_for_earlier() {
        let mut journal = journal();
        journal.push(item("a", 3));
        journal.push(item("b", 3));
        let first = journal.next_block().unwrap();
        journal.push(item("c", 1));
        let second = journal.next_block().unwrap();
        assert!(journal.next_block().is_none());
        assert_eq!(journal.written(second.seq), []);
        assert_eq!(journal.written(first.seq), [(10, "a"), (10, "b"), (11, "c")]);
        assert_eq!(journal.committed(), 12);
    }

    #[test]
    fn a_group_of_many_records_counts_with_its_last_block() {
        let mut journal = journal();
        journal.push(item("large", 100));
        journal.push(item("next", 1));
        let blocks: Vec<Out> = std::iter::from_fn(|| journal.next_block()).collect();
        let heads: Vec<bool> = blocks
            .iter()
            .map(|out| JournalBlock::decode(&[7; 16], &out.block[0].0))
            .map(|b| b.is_some())
            .collect();
        assert_eq!(heads, [false, false, false], "records of this test are no real ones");
        assert_eq!(journal.written(10), []);
        assert_eq!(journal.written(11), []);
        assert_eq!(journal.committed(), 10);
        assert_eq!(journal.written(12), [(12, "large"), (12, "next")]);
    }

    #[test]
    fn a_block_takes_whole_records() {
        let mut records = Records::default();
        for n in 1..=5u8 {
            records.push(|out| out.0.extend(std::iter::repeat_n(n, n.into())));
        }
        assert_eq!(records.take(5), [1, 2, 2]);
        assert_eq!(records.take(7), [3, 3, 3, 4, 4, 4, 4]);
        assert_eq!(records.take(4), []);
        assert_eq!((records.len(), records.take(5)), (5, vec![5; 5]));
        assert_eq!(records.len(), 0);
    }

    #[test]
    fn a_mark_goes_out_durably_with_or_without_records() {
        let mut journal = journal();
        journal.push(item("a", 1));
        let block = journal.next_block().unwrap();
        journal.written(block.seq);
        assert_eq!(journal.marked(), 10);
        journal.mark(11, "marked");
        let block = journal.next_block().unwrap();
        assert!(block.durable);
        assert_eq!(journal.marked(), 10, "not before it is there");
        assert_eq!(journal.written(block.seq), [(11, "marked")]);
        assert_eq!(journal.marked(), 11);
        assert_eq!((journal.spoken(), journal.committed()), (11, 12), "a mark needs no mark");
    }

    #[test]
    fn a_full_journal_waits_for_a_checkpoint() {
        let mut journal = journal();
        let mut blocks = 0;
        loop {
            journal.push(item("x", 30));
            let Some(block) = journal.next_block() else { break };
            journal.written(block.seq);
            blocks += 1;
        }
        assert_eq!(blocks, 256 - MARGIN);
        journal.release(journal.committed(), journal.committed());
        assert!(journal.next_block().is_some());
    }
}
