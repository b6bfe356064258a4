//! One rank's end of a group that shares memory: publish, look, commit, abort.
//!
//! Written once for threads and processes. A chunk goes through it like this: its rank fills the
//! rows and stores a line ([`Group::publish`]); a rank that has seen the lines of all ranks commits
//! it ([`Group::commit`]), reduces its own row and says so ([`Group::set_consumed`]); once all ranks
//! have said so the chunk's memory may be filled again.

use std::any::Any;
use std::time::Duration;

use super::control::{CallRecord, Head, Layout, Line, CALLS, INLINE_WORDS, NOWHERE};
use super::detail;
use super::keeper;
use super::patience;
use super::word::{self, End, Fate, Verdict};
use crate::error::{Error, Result, Status};
use crate::fingerprint::{Chain, Words, CHECKED};
use crate::sync::{fence, AtomicU32, AtomicU64, Mutex, Ordering, MODEL};

/// What a peer has published about a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// Its fingerprint.
    pub chain: Chain,
    /// Where its rows lie: a slot of the staging, or, among threads, the address of what is lent. None: no
    /// bytes.
    pub place: Option<u64>,
}

/// What a rank is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// `rank` has not published chunk `seq`.
    Line {
        /// Who is awaited.
        rank: u32,
        /// Which chunk.
        seq: u64,
    },
    /// `rank` has not reduced chunk `seq`.
    Consumed {
        /// Who is awaited.
        rank: u32,
        /// Which chunk.
        seq: u64,
    },
}

impl Stall {
    /// The rank that is awaited.
    #[inline]
    pub fn rank(&self) -> u32 {
        match *self {
            Stall::Line { rank, .. } | Stall::Consumed { rank, .. } => rank,
        }
    }
}

/// One rank's end of the shared memory of a group.
pub struct Group {
    rank: u32,
    layout: Layout,
    own: *mut u8,
    ranks: Vec<*const u8>,
    verdict: *const Verdict,
    spin: bool,
    one_process: bool,
    /// Serialises the text of this rank's failure reports.
    reporting: Mutex<()>,
    own_memory: MemoryOf,
    _keep: Box<dyn Any + Send + Sync>,
}

/// Finds the mapping of this rank among what is kept alive.
type MemoryOf = Box<dyn Fn(usize, usize) -> Result<()> + Send + Sync>;

// SAFETY: the pointers go into mappings that `_keep` holds; what is behind them is only used through
// atomics, or, for rows, by the protocol's rule that a row is written before its line is published
// and read after, until all ranks have consumed it.
unsafe impl Send for Group {}
// SAFETY: as above; every method takes &self and shares state by atomics or the mutex alone.
unsafe impl Sync for Group {}

impl Group {
    /// A rank's end: `bases[r]` is where rank r's memory of `layout` begins, `verdict` what all may write,
    /// `commit` makes pages of this rank's memory real, `keep` holds it all.
    ///
    /// # Safety
    /// The pointers stay valid as long as `keep`; `bases[rank]` is writable by this rank alone;
    /// memory that no rank has written reads as zeros; `one_process` holds only if all ranks are threads
    /// of this process.
    pub unsafe fn new(
        rank: u32,
        layout: Layout,
        bases: Vec<*mut u8>,
        one_process: bool,
        verdict: *const Verdict,
        commit: MemoryOf,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Group {
        Group {
            rank,
            layout,
            own: bases[rank as usize],
            spin: patience::Patience::may_spin(bases.len() as u32),
            ranks: bases.into_iter().map(|p| p as *const u8).collect(),
            verdict,
            one_process,
            reporting: Mutex::new(()),
            own_memory: commit,
            _keep: keep,
        }
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks of the group.
    #[inline]
    pub fn size(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// Whether all ranks are threads of this process, so that an address means the same to all.
    pub fn is_one_process(&self) -> bool {
        self.one_process
    }

    /// Where things lie.
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether waits may spin.
    pub fn spin(&self) -> bool {
        self.spin
    }

    #[inline]
    fn head(&self, rank: u32) -> &Head {
        // SAFETY: every rank's memory begins with a Head, all of it atomics, valid while self is.
        unsafe { &*(self.ranks[rank as usize] as *const Head) }
    }

    #[inline]
    fn own_head(&self) -> &Head {
        self.head(self.rank)
    }

    fn line_of(&self, rank: u32, seq: u64) -> &Line {
        let index = seq as usize & (self.layout.lines - 1);
        let at = self.layout.lines_at + index * std::mem::size_of::<Line>();
        // SAFETY: the index is masked to the ring, which lies inside every rank's memory.
        unsafe { &*(self.ranks[rank as usize].add(at) as *const Line) }
    }

    #[inline]
    fn call_of(&self, rank: u32, number: u64) -> &CallRecord {
        let index = number as usize % CALLS;
        let at = self.layout.calls_at + index * std::mem::size_of::<CallRecord>();
        // SAFETY: the index is inside the ring of calls, which lies inside every rank's memory.
        unsafe { &*(self.ranks[rank as usize].add(at) as *const CallRecord) }
    }

    #[inline]
    fn verdict(&self) -> &Verdict {
        // SAFETY: valid while self is, by the promise of `new`.
        unsafe { &*self.verdict }
    }

    #[inline]
    fn word(&self) -> &AtomicU64 {
        &self.verdict().word.0
    }

    /// Where chunk slot `slot` of `rank` begins; none if there is no such slot.
    #[inline]
    pub fn chunk(&self, rank: u32, slot: u64) -> Option<*const u8> {
        let g = &self.layout.geometry;
        if slot >= g.chunks as u64 {
            return None;
        }
        let at = self.layout.staging_at + slot as usize * g.chunk_bytes;
        // SAFETY: the slot is inside the staging, which lies inside every rank's memory.
        Some(unsafe { self.ranks[rank as usize].add(at) })
    }

    /// Where chunk slot `slot` of this rank begins, for filling.
    #[inline]
    pub fn own_chunk(&self, slot: u32) -> *mut u8 {
        debug_assert!((slot as usize) < self.layout.geometry.chunks);
        let at = self.layout.staging_at + slot as usize * self.layout.geometry.chunk_bytes;
        // SAFETY: slots are handed out below `chunks`, so this lies inside this rank's memory.
        unsafe { self.own.add(at) }
    }

    /// Makes the pages of chunk slot `slot` of this rank real.
    pub fn commit_chunk(&self, slot: u32) -> Result<()> {
        let g = &self.layout.geometry;
        let at = self.layout.staging_at + slot as usize * g.chunk_bytes;
        (self.own_memory)(at, g.chunk_bytes)
    }

    /// Records one call, so that peers can name it should it differ from theirs.
    #[inline]
    pub fn record(&self, number: u64, words: &Words) {
        if !CHECKED {
            return;
        }
        // Counted before its words overwrite an old call, so that a reader of that one can tell; and
        // counted again when they are there. The first count, too, may be all that a reader of the call
        // before sees: both release.
        let calls = &self.own_head().calls.0;
        calls.store(number << 1 | 1, Ordering::Release);
        fence(Ordering::Release);
        for (to, from) in self.call_of(self.rank, number).iter().zip(words) {
            to.store(*from, Ordering::Relaxed);
        }
        calls.store((number + 1) << 1, Ordering::Release);
    }

    /// Call `number` of `rank`, if it has made it and still keeps it.
    pub fn recorded(&self, rank: u32, number: u64) -> Option<Words> {
        if number >= self.calls(rank) {
            return None;
        }
        let words = self.call_of(rank, number);
        let words = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        // Overwritten while it was read, or just before: gone.
        let begun = self.head(rank).calls.0.load(Ordering::Relaxed).div_ceil(2);
        (begun <= number + CALLS as u64).then_some(words)
    }

    /// Calls that `rank` has made.
    pub fn calls(&self, rank: u32) -> u64 {
        self.head(rank).calls.0.load(Ordering::Acquire) >> 1
    }

    /// The first call that `rank` still keeps.
    pub fn oldest_recorded(&self, rank: u32) -> u64 {
        let made = self.calls(rank);
        // One less than the ring holds: the next may be under way.
        made.saturating_sub(CALLS as u64 - 1)
    }

    /// Publishes chunk `seq`, whose rows are complete, as [`Published`] tells of it. Sleepers are to be woken
    /// ([`Group::wake_sleepers`]) before this rank waits for anything.
    #[inline(always)]
    pub fn publish(&self, seq: u64, chain: &Chain, place: Option<u64>) {
        let line = self.line_of(self.rank, seq);
        line.lo.store(chain.lo, Ordering::Relaxed);
        line.hi.store(chain.hi, Ordering::Relaxed);
        line.calls.store(chain.calls, Ordering::Relaxed);
        line.place
            .store(place.unwrap_or(NOWHERE), Ordering::Relaxed);
        line.ready.store(seq + 1, Ordering::Release);
    }

    /// The stride from row to row if rows of `fill` bytes are small enough to lie in a line.
    #[inline]
    pub fn inline_stride(&self, fill: usize) -> Option<usize> {
        let stride = fill.next_multiple_of(8);
        (fill > 0 && stride * self.ranks.len() <= INLINE_WORDS * 8).then_some(stride)
    }

    /// Copies the rows of chunk slot `slot`, of `fill` bytes each, into the line of chunk `seq`, which is
    /// published next. They are small enough ([`Group::inline_stride`]).
    pub fn put_inline(&self, seq: u64, slot: u32, fill: usize) {
        let line = self.line_of(self.rank, seq);
        let chunk = self.own_chunk(slot);
        let words = fill.div_ceil(8);
        for (i, to) in line.rows.iter().take(words * self.ranks.len()).enumerate() {
            let at = i / words * self.layout.geometry.row_bytes + i % words * 8;
            // SAFETY: inside row i / words of the chunk, whose length is a multiple of 64.
            let word = unsafe { chunk.add(at).cast::<u64>().read() };
            to.store(word, Ordering::Relaxed);
        }
    }

    /// Where the rows lie that `rank` has put into its line of chunk `seq`.
    #[inline]
    pub fn inline_rows(&self, rank: u32, seq: u64) -> *const u8 {
        self.line_of(rank, seq).rows.as_ptr().cast()
    }

    /// Whether `rank` has published chunk `seq`.
    #[inline]
    pub fn is_published(&self, rank: u32, seq: u64) -> bool {
        self.line_of(rank, seq).ready.load(Ordering::Acquire) == seq + 1
    }

    /// What `rank` has published about chunk `seq`, if it has.
    #[inline]
    pub fn published(&self, rank: u32, seq: u64) -> Option<Published> {
        let line = self.line_of(rank, seq);
        if line.ready.load(Ordering::Acquire) != seq + 1 {
            return None;
        }
        let place = line.place.load(Ordering::Relaxed);
        Some(Published {
            chain: Chain {
                lo: line.lo.load(Ordering::Relaxed),
                hi: line.hi.load(Ordering::Relaxed),
                calls: line.calls.load(Ordering::Relaxed),
            },
            place: (place != NOWHERE).then_some(place),
        })
    }

    /// Commits chunk `seq`, of which the caller has seen all lines.
    pub fn commit(&self, seq: u64) -> Fate {
        let fate = word::commit(self.word(), seq);
        if fate == Fate::Aborted {
            self.end();
        }
        fate
    }

    /// Says that this rank has reduced all chunks before `count`. Sleepers are to be woken, as above.
    #[inline(always)]
    pub fn set_consumed(&self, count: u64) {
        self.own_head().consumed.0.store(count, Ordering::Release);
    }

    /// Chunks that `rank` will not read again: those it has reduced; all, once it has left.
    pub fn consumed(&self, rank: u32) -> u64 {
        let head = self.head(rank);
        if head.left.0.load(Ordering::Acquire) != 0 {
            return u64::MAX;
        }
        head.consumed.0.load(Ordering::Acquire)
    }

    /// The rank that is furthest behind in reducing, and how many chunks it has.
    pub fn slowest(&self) -> (u32, u64) {
        (0..self.size())
            .map(|r| (r, self.consumed(r)))
            .min_by_key(|&(_, count)| count)
            .unwrap_or((self.rank, 0))
    }

    /// Whether `rank` has freed its comm.
    pub fn has_left(&self, rank: u32) -> bool {
        self.head(rank).left.0.load(Ordering::Acquire) != 0
    }

    /// Whether `rank` will never answer again: it has freed its comm, or its process has ended. Why.
    pub fn is_gone(&self, rank: u32) -> Option<Error> {
        let gone = if self.has_left(rank) {
            format!("rank {rank} has left: it freed its comm while others need it")
        } else if keeper::is_gone(&self.head(rank).alive.0) {
            format!("rank {rank} is gone: its process has ended")
        } else {
            return None;
        };
        Some(Error::new(Status::PeerLost, gone).blame(rank))
    }

    fn is_silent(&self, rank: u32) -> bool {
        self.has_left(rank) || keeper::is_gone(&self.head(rank).alive.0)
    }

    /// Why it will never come: a rank is gone, whichever it is, and what `missing` asks it for is missing.
    /// Asked after the rank was found gone, since what it did before counts.
    pub fn lost(&self, missing: impl Fn(u32) -> bool) -> Option<Error> {
        let lost = |&rank: &u32| self.is_silent(rank) && missing(rank);
        self.is_gone((0..self.size()).find(lost)?)
    }

    /// Says that this rank has come to shrink the group, or has given up.
    pub fn arrive(&self, yes: bool) {
        self.own_head()
            .shrinking
            .0
            .store(yes.into(), Ordering::Release);
        patience::ring(&self.own_head().bell.0);
    }

    /// Whether `rank` has come to shrink the group.
    pub fn has_arrived(&self, rank: u32) -> bool {
        self.head(rank).shrinking.0.load(Ordering::Acquire) != 0
    }

    /// Sleeps until `rank` rings its bell, at most `slice`.
    pub fn nap(&self, rank: u32, slice: Duration) {
        let bell = &self.head(rank).bell.0;
        patience::futex_wait(bell, bell.load(Ordering::Acquire), slice);
    }

    /// Says that this rank has freed its comm.
    pub fn leave(&self) {
        self.own_head().left.0.store(1, Ordering::Release);
        patience::ring(&self.own_head().bell.0);
    }

    /// Whether what `stall` waits for has come, or never will, as far as lines tell that seldom change: the
    /// group word goes from core to core with every chunk, and whoever spins on it holds it up.
    #[inline]
    pub fn seems_over(&self, stall: &Stall) -> bool {
        self.has_ended()
            || self.is_silent(stall.rank())
            || match *stall {
                Stall::Line { rank, seq } => self.is_published(rank, seq),
                Stall::Consumed { rank, seq } => self.consumed(rank) > seq,
            }
    }

    /// Whether what `stall` waits for has come, or never will.
    pub fn is_over(&self, stall: &Stall) -> bool {
        self.end().is_some() || self.seems_over(stall)
    }

    /// Sleeps until the rank that `stall` names rings its bell, at most `slice`.
    pub fn sleep(&self, stall: &Stall, slice: Duration) {
        let bell = &self.head(stall.rank()).bell.0;
        let seen = bell.load(Ordering::Acquire);
        let sleeping = &self.own_head().sleeping.0;
        sleeping.store(1, Ordering::Relaxed);
        // Pairs with the fence in `wake_sleepers`: either we see the event or it sees us.
        fence(Ordering::SeqCst);
        if !self.is_over(stall) {
            patience::futex_wait(bell, seen, slice);
        }
        sleeping.store(0, Ordering::Relaxed);
    }

    /// Wakes the ranks that sleep for what this rank has stored. The fence waits until all of it has left
    /// this core: once for several stores, and late, costs least.
    #[inline(always)]
    pub fn wake_sleepers(&self) {
        fence(Ordering::SeqCst);
        let asleep = |r: u32| self.head(r).sleeping.0.load(Ordering::Relaxed) != 0;
        if (0..self.size()).any(|r| r != self.rank && asleep(r)) {
            patience::ring(&self.own_head().bell.0);
        }
    }

    /// Why the group ended, if it has. Whoever sees it tells the others, since the rank that ended it may
    /// have died before.
    #[inline]
    pub fn end(&self) -> Option<End> {
        let end = word::end(self.word());
        if end.is_some() {
            // Once is enough, and few stores keep the models small.
            let ended = &self.verdict().ended.0;
            let _ = ended.compare_exchange(0, 1, Ordering::Release, Ordering::Relaxed);
        }
        end
    }

    /// Whether somebody has seen that the group has ended.
    #[inline]
    pub fn has_ended(&self) -> bool {
        self.verdict().ended.0.load(Ordering::Acquire) != 0
    }

    /// Ends the group with `cause`, unless it has ended: the first cause stays. Never blocks.
    pub fn abort(&self, cause: &Error) {
        // Somebody of this rank is reporting right now: the group ends all the same.
        let Ok(_turn) = self.reporting.try_lock() else {
            return;
        };
        if self.end().is_some() {
            return;
        }
        detail::write(&self.own_head().detail.0, cause);
        let culprit = u32::try_from(cause.peer).ok();
        word::abort(self.word(), cause.status, self.rank, culprit);
        self.end();
        for rank in 0..self.size() {
            // Peers' memory is read-only here: their bells are only woken, not changed. A sleeper
            // that falls asleep just now looks again after its slice.
            patience::futex_wake(&self.head(rank).bell.0);
        }
    }

    /// The first cause, with the text of the rank that reported it.
    pub fn cause(&self) -> Option<Error> {
        let end = self.end()?;
        let origin = end.origin.min(self.size() - 1);
        let mut error = detail::read(&self.head(origin).detail.0);
        error.status = end.status;
        // Callers index with it: a rank that does not exist is nobody.
        let culprit = end.culprit.filter(|&r| r < self.size());
        error.peer = culprit.map_or(-1, |r| r as i32);
        Some(error)
    }
}

/// Checks that the atomics in shared memory are what the layout assumes.
const _: () = {
    assert!(MODEL || std::mem::size_of::<Line>() == 128);
    assert!(std::mem::size_of::<Head>().is_multiple_of(64));
    assert!(MODEL || std::mem::size_of::<AtomicU32>() == 4);
};
