//! What happens in the models: ranks exchange chunks, and one aborts, dies, leaves or asks for something
//! else. Each is one execution; the checker repeats it in other orders.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

use super::{asks, away, cause, spawn, Ask, Memory, Rank, Ring, Story};
use crate::comm::shrink::survivors;
use crate::error::Status;
use crate::fingerprint::Words;
use crate::sync::model::{die_after, end_slices};

/// Starts all ranks with the same ops; `mortal` is (rank, stores it has left).
fn start(memory: &Arc<Memory>, size: u32, ops: &[Ask], mortal: Option<(u32, u32)>) -> Vec<Rank> {
    (0..size)
        .map(|r| {
            let stores = mortal.filter(|m| m.0 == r).map(|m| m.1);
            Rank::start(memory, r, ops, stores)
        })
        .collect()
}

fn join(ranks: Vec<Rank>) -> (Vec<Arc<Ring>>, Vec<Option<Story>>) {
    ranks.into_iter().map(Rank::join).unzip()
}

/// All who have a story have the same, with one first cause from some op on.
fn agree(stories: &[Option<Story>]) -> &Story {
    let mut told = stories.iter().flatten();
    let first = told.next().expect("somebody lives");
    told.for_each(|story| assert_eq!(story, first));
    let failed: Vec<_> = first.ops.iter().skip_while(|op| op.is_ok()).collect();
    assert!(failed.iter().all(|op| op.is_err() && *op == failed[0]));
    first
}

/// Nothing goes wrong: every rank reduces what all have given, through fewer slots than chunks.
pub fn exchange(size: u32, ops: &[Ask], (slots, lines): (usize, usize)) {
    let memory = Memory::new(size, slots, lines);
    let (_rings, stories) = join(start(&memory, size, ops, None));
    let story = agree(&stories);
    assert_eq!(story.reduced, ops.iter().map(|a| a.chunks as u64).sum());
    assert!(stories
        .iter()
        .flatten()
        .all(|s| s.ops.iter().all(Result::is_ok)));
}

/// The ranks of `aborters` abort, each from a thread of its own, at any moment, for different causes.
pub fn aborted(size: u32, ops: &[Ask], slots: usize, aborters: &[u32]) {
    let memory = Memory::new(size, slots, slots.next_power_of_two());
    let ranks = start(&memory, size, ops, None);
    let abort = |(i, &rank): (usize, &u32)| {
        let ring = ranks[rank as usize].ring.clone();
        spawn(move || {
            ring.group().abort(&cause(i));
            end_slices();
        })
    };
    let threads: Vec<_> = aborters.iter().enumerate().map(abort).collect();
    let (rings, stories) = join(ranks);
    threads
        .into_iter()
        .for_each(|t| t.join().expect("no panic"));
    // All see one cause, in full, and it is one of those that were given.
    let first = rings[0].group().cause().expect("aborted");
    assert!((0..aborters.len()).any(|i| cause(i) == first));
    assert!(rings
        .iter()
        .all(|r| r.group().cause().as_ref() == Some(&first)));
    let story = agree(&stories);
    assert!(story
        .ops
        .iter()
        .all(|op| op.as_ref().map_or_else(|e| *e == first, |()| true)));
}

/// Rank `mortal.0` dies in place of the store after `mortal.1` others. Whether it did.
pub fn death(size: u32, ops: &[Ask], slots: usize, mortal: (u32, u32)) -> bool {
    let memory = Memory::new(size, slots, slots.next_power_of_two());
    let (_rings, stories) = join(start(&memory, size, ops, Some(mortal)));
    let died = stories[mortal.0 as usize].is_none();
    let story = agree(&stories);
    // What it had published counts, and no more.
    let end = memory.end(mortal.0);
    let published = (0..story.reduced + 2).filter(|&seq| end.is_published(mortal.0, seq));
    assert_eq!(published.last().map_or(0, |seq| seq + 1), story.reduced);
    for error in story.ops.iter().filter_map(|op| op.as_ref().err()) {
        let seen = (died, error.status, error.peer);
        assert_eq!(seen, (true, Status::PeerLost, mortal.0 as i32));
    }
    died
}

/// Rank 1 is away and rank 2 dies, before or after the first chunk of both: rank 0 learns of it.
pub fn absent(came: bool) {
    let memory = Memory::new(3, 1, 1);
    let ask = &asks::<1>(2)[0];
    let came = if came { 1..3 } else { 0..0 };
    let others: Vec<Ring> = came.map(|r| away(&memory, r, ask)).collect();
    let lost = memory.clone();
    let lost = spawn(move || lost.bury(2));
    let (_ring, story) = Rank::start(&memory, 0, &[*ask], None).join();
    let story = story.expect("rank 0 lives");
    assert_eq!(story.reduced, u64::from(!others.is_empty()));
    let seen = story.ops[0].as_ref().map_err(|e| (e.status, e.peer));
    assert_eq!(seen, Err((Status::PeerLost, 2)));
    lost.join().expect("no panic");
}

/// The last rank aborts and dies in place of the store after `stores` others: the rest see one cause all
/// the same, its own in full or its death. Whether it died.
pub fn last_words(size: u32, stores: u32) -> bool {
    let memory = Memory::new(size, 1, 1);
    let last = size - 1;
    let rest = (0..last).map(|r| Rank::start(&memory, r, &asks::<1>(1), None));
    let rest: Vec<Rank> = rest.collect();
    let (end, own) = (memory.end(last), memory.clone());
    let aborter = spawn(move || {
        die_after(stores);
        let told = catch_unwind(AssertUnwindSafe(|| end.abort(&cause(0))));
        match &told {
            Ok(()) => end_slices(),
            Err(_) => own.bury(last),
        }
        told.is_err()
    });
    let (_rings, stories) = join(rest);
    let died = aborter.join().expect("no panic");
    let error = agree(&stories).ops[0]
        .as_ref()
        .expect_err("a rank is missing");
    let lost = (error.status, error.peer) == (Status::PeerLost, last as i32);
    assert!(*error == cause(0) || died && lost);
    died
}

/// The last rank asks for something else in its second op: nobody reduces any of that.
pub fn desync(size: u32, slots: usize) {
    let memory = Memory::new(size, slots, slots.next_power_of_two());
    let ops = asks::<2>(1);
    let mut other = ops;
    other[1].tag += 1;
    let ranks = (0..size)
        .map(|r| Rank::start(&memory, r, if r + 1 == size { &other } else { &ops }, None))
        .collect();
    let (_rings, stories) = join(ranks);
    let story = agree(&stories);
    assert_eq!(story.reduced, 1);
    assert!(story.ops[0].is_ok());
    assert_eq!(
        story.ops[1].as_ref().map_err(|e| e.status),
        Err(Status::Desync)
    );
}

/// The last rank makes one op less and leaves; whoever needs nothing of it is not disturbed.
pub fn farewell(size: u32, ops: &[Ask], fewer: usize, slots: usize) {
    let memory = Memory::new(size, slots, slots.next_power_of_two());
    let shorter = &ops[..ops.len() - fewer];
    let (last, rest): (u32, _) = (size - 1, 0..size - 1);
    let ranks: Vec<Rank> = rest.map(|r| Rank::start(&memory, r, ops, None)).collect();
    let leaver = Ring::new(memory.end(last), None);
    let shorter = shorter.to_vec();
    let leaver = spawn(move || super::live(&leaver, &shorter));
    let (_rings, stories) = join(ranks);
    let own = leaver.join().expect("no panic");
    let story = agree(&stories);
    assert!(own.ops.iter().all(Result::is_ok));
    assert_eq!(story.ops[..own.ops.len()], own.ops);
    for error in story.ops[own.ops.len()..]
        .iter()
        .map(|op| op.as_ref().unwrap_err())
    {
        assert_eq!((error.status, error.peer), (Status::PeerLost, last as i32));
    }
}

/// A rank is gone; the others agree on who is left, without it.
pub fn regroup(size: u32) {
    let memory = Memory::new(size, 1, 1);
    let lost = memory.clone();
    let lost = spawn(move || lost.bury(size - 1));
    let regroup = |rank: u32| {
        let end = memory.end(rank);
        spawn(move || {
            end.arrive(true);
            survivors(&end, None).expect("no deadline")
        })
    };
    let ranks: Vec<_> = (0..size - 1).map(regroup).collect();
    for rank in ranks {
        let here = rank.join().expect("no panic");
        assert_eq!(here, (0..size - 1).collect::<Vec<_>>());
    }
    lost.join().expect("no panic");
}

/// Rank 0 records `calls` calls while rank 1 reads them: a call is read whole or not at all.
pub fn records(calls: u64) {
    let memory = Memory::new(2, 1, 1);
    let words = |n: u64| -> Words { std::array::from_fn(|i| 10 * (n + 1) + i as u64) };
    let (writer, reader) = (memory.end(0), memory.end(1));
    let writer = spawn(move || (0..calls).for_each(|n| writer.record(n, &words(n))));
    let reader = spawn(move || {
        for n in 0..calls {
            let read = reader.recorded(0, n);
            assert!(read.is_none() || read == Some(words(n)), "{n}: {read:?}");
        }
    });
    writer.join().expect("no panic");
    reader.join().expect("no torn call");
    // Now nothing is under way: all that is kept is there.
    let end = memory.end(1);
    for n in end.oldest_recorded(0)..calls {
        assert_eq!(end.recorded(0, n), Some(words(n)));
    }
}
