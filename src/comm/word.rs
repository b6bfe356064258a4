//! The group word: the one place where ranks decide together.
//!
//! It holds how many chunks are committed and, once, why the group ended. Both change by
//! compare-and-swap on the same 64 bits, so a chunk is either committed for every rank or for none,
//! and everybody sees the same first cause.
//!
//! Bits, from the top: status 8 (negated; 0: alive), origin 12, culprit 12 (all ones: none),
//! committed chunks 32 (modulo 2^32; ranks are never that far apart).

use super::control::Lone;
use crate::error::Status;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

const RANK_BITS: u64 = 0xfff;

/// The most ranks a group can have: ranks take twelve bits, one value means none.
pub const MAX_RANKS: u32 = 1024;

/// All that every rank of a group may write.
#[repr(C)]
pub struct Verdict {
    /// The group word.
    pub word: Lone<AtomicU64>,
    /// Not 0 once somebody has seen that the group has ended. The word changes with every chunk; this line
    /// changes once, so that looking at it costs nothing.
    pub ended: Lone<AtomicU32>,
}

impl Verdict {
    /// The verdict of a new group.
    pub fn new() -> Verdict {
        Verdict {
            word: Lone(AtomicU64::new(0)),
            ended: Lone(AtomicU32::new(0)),
        }
    }
}

impl Default for Verdict {
    fn default() -> Self {
        Verdict::new()
    }
}

/// Why a group ended, and who said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The cause.
    pub status: Status,
    /// The rank that reported it, and holds its text.
    pub origin: u32,
    /// The rank to blame.
    pub culprit: Option<u32>,
}

/// The fate of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Every rank completes it.
    Committed,
    /// No rank does.
    Aborted,
}

fn before(seq: u64, committed: u32) -> bool {
    (committed.wrapping_sub(seq as u32) as i32) > 0
}

fn end_of(word: u64) -> Option<End> {
    let code = (word >> 56) as i32;
    if code == 0 {
        return None;
    }
    let culprit = (word >> 32) & RANK_BITS;
    Some(End {
        // The word is shared: a value that no rank of ours wrote counts as a failed transport.
        status: Status::from_code(-code)
            .filter(|s| s.code() <= Status::Timeout.code())
            .unwrap_or(Status::Transport),
        origin: ((word >> 44) & RANK_BITS) as u32,
        culprit: (culprit != RANK_BITS).then_some(culprit as u32),
    })
}

/// Why the group ended, if it has.
#[inline]
pub fn end(word: &AtomicU64) -> Option<End> {
    end_of(word.load(Ordering::Acquire))
}

/// Commits chunk `seq`, whose lines the caller has all seen; or learns that it is too late.
pub fn commit(word: &AtomicU64, seq: u64) -> Fate {
    // What it holds if nobody has been here before: the swap needs the cache line once, a look before it
    // would need it twice.
    let alone = u64::from(seq as u32);
    let next = u64::from((seq as u32).wrapping_add(1));
    let swap = word.compare_exchange_weak(alone, next, Ordering::AcqRel, Ordering::Acquire);
    let Err(mut seen) = swap else {
        return Fate::Committed;
    };
    loop {
        if before(seq, seen as u32) {
            return Fate::Committed;
        }
        if seen >> 56 != 0 {
            return Fate::Aborted;
        }
        let next = seen & !0xffff_ffff | u64::from(seq as u32).wrapping_add(1) & 0xffff_ffff;
        match word.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Fate::Committed,
            Err(now) => seen = now,
        }
    }
}

/// Ends the group, unless it has ended already: the first cause stays. Says whether it was this one.
pub fn abort(word: &AtomicU64, status: Status, origin: u32, culprit: Option<u32>) -> bool {
    let code = u64::from(status.code().unsigned_abs()) & 0xff;
    let culprit = culprit.map_or(RANK_BITS, u64::from) & RANK_BITS;
    let head = code << 56 | (u64::from(origin) & RANK_BITS) << 44 | culprit << 32;
    let mut seen = word.load(Ordering::Acquire);
    while seen >> 56 == 0 {
        let next = head | seen & 0xffff_ffff;
        match word.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_chunks_stay_committed_and_later_ones_never_are() {
        // From a count just below the wrap of 32 bits.
        let start = (1u64 << 32) - 3;
        let word = AtomicU64::new(start & 0xffff_ffff);
        for seq in start..start + 6 {
            assert_eq!(commit(&word, seq), Fate::Committed);
            assert_eq!(commit(&word, seq), Fate::Committed);
        }
        assert!(abort(&word, Status::Desync, 3, Some(7)));
        assert!(!abort(&word, Status::Timeout, 1, None));
        assert_eq!(commit(&word, start + 5), Fate::Committed);
        assert_eq!(commit(&word, start + 6), Fate::Aborted);
        let end = end(&word).expect("ended");
        assert_eq!(
            (end.status, end.origin, end.culprit),
            (Status::Desync, 3, Some(7))
        );
    }

    #[test]
    fn a_cause_that_ends_no_group_is_a_failed_transport() {
        for (code, status) in [
            (1, Status::Transport),
            (10, Status::Transport),
            (20, Status::Timeout),
            (25, Status::Transport),
            (99, Status::Panic),
            (255, Status::Transport),
        ] {
            let word = AtomicU64::new(code << 56);
            assert_eq!(end(&word).map(|e| e.status), Some(status), "{code}");
        }
    }

    #[test]
    fn nobody_to_blame() {
        let word = AtomicU64::new(0);
        assert_eq!(end(&word), None);
        assert!(abort(&word, Status::Aborted, 0, None));
        assert_eq!(end(&word).and_then(|e| e.culprit), None);
    }
}
