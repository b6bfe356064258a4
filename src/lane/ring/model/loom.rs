//! The models that loom explores: every order of two ranks, every order of three with few preemptions.
//!
//! `RSBUCKET_MODELS=full` allows a preemption more than the slice that CI runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

use super::scenarios::{
    aborted, absent, death, desync, exchange, farewell, last_words, records, regroup,
};
use super::{asks, Ask};
use crate::sync::model::{begin, seconds};

/// Runs `execution` in every order, or in all with at most so many preemptions. How many there were.
fn explore(preemptions: Option<usize>, execution: impl Fn() + Send + Sync + 'static) -> u64 {
    let runs = Arc::new(AtomicU64::new(0));
    let count = runs.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    builder.check(move || {
        begin();
        count.fetch_add(1, Relaxed);
        execution();
    });
    runs.load(Relaxed)
}

/// All orders with at most `n` preemptions, one more in the full set.
fn few(n: usize) -> Option<usize> {
    let full = std::env::var("RSBUCKET_MODELS").is_ok_and(|v| v == "full");
    Some(n + usize::from(full))
}

fn model(name: &str, preemptions: Option<usize>, execution: impl Fn() + Send + Sync + 'static) {
    let start = seconds();
    let runs = explore(preemptions, execution);
    report(name, preemptions, runs, start);
}

fn report(name: &str, preemptions: Option<usize>, runs: u64, start: f64) {
    let bound = preemptions.map_or("every order".into(), |n| format!("{n} preemptions"));
    let used = seconds() - start;
    println!("model {name}: {bound}, {runs} executions, {used:.1} s");
}

/// A rank dies in place of its first store, of its second, and so on to the last: `execution` is told
/// which, and tells whether it died.
fn deaths(
    name: &str,
    preemptions: Option<usize>,
    execution: impl Fn(u32) -> bool + Copy + Send + Sync + 'static,
) {
    let start = seconds();
    let mut runs = 0;
    for stores in 0.. {
        let died = Arc::new(AtomicBool::new(false));
        let note = died.clone();
        runs += explore(preemptions, move || {
            note.fetch_or(execution(stores), Relaxed);
        });
        if !died.load(Relaxed) {
            break;
        }
    }
    report(name, preemptions, runs, start);
}

#[test]
fn two_ranks_exchange_one_chunk() {
    model("two_ranks_exchange_one_chunk", None, || {
        exchange(2, &asks::<1>(1), (1, 1));
    });
}

#[test]
fn two_ranks_exchange_more_chunks_than_slots() {
    model("two_ranks_exchange_more_chunks_than_slots", few(2), || {
        exchange(2, &asks::<1>(2), (1, 1));
    });
}

#[test]
fn two_ranks_exchange_more_chunks_than_lines() {
    model("two_ranks_exchange_more_chunks_than_lines", few(1), || {
        exchange(2, &asks::<1>(3), (2, 1));
    });
}

#[test]
fn three_ranks_exchange() {
    model("three_ranks_exchange", few(1), || {
        exchange(3, &asks::<1>(1), (1, 1));
    });
}

#[test]
fn two_ranks_and_an_abort() {
    model("two_ranks_and_an_abort", few(1), || {
        aborted(2, &asks::<2>(1), 1, &[0]);
    });
}

#[test]
fn one_op_and_an_abort() {
    model("one_op_and_an_abort", few(2), || {
        aborted(2, &asks::<1>(1), 1, &[0]);
    });
}

#[test]
fn two_ranks_and_two_aborts() {
    model("two_ranks_and_two_aborts", few(1), || {
        aborted(2, &asks::<1>(1), 1, &[0, 1]);
    });
}

#[test]
fn two_aborts_of_one_rank() {
    model("two_aborts_of_one_rank", few(1), || {
        aborted(2, &asks::<1>(1), 1, &[0, 0]);
    });
}

#[test]
fn three_ranks_and_an_abort() {
    model("three_ranks_and_an_abort", few(1), || {
        aborted(3, &asks::<1>(1), 1, &[0]);
    });
}

#[test]
fn one_of_two_dies() {
    const OPS: [Ask; 2] = [Ask { chunks: 1, tag: 0 }, Ask { chunks: 1, tag: 1 }];
    deaths("one_of_two_dies", few(1), |stores| {
        death(2, &OPS, 1, (1, stores))
    });
}

#[test]
fn one_of_three_dies() {
    const OPS: [Ask; 1] = [Ask { chunks: 1, tag: 0 }];
    deaths("one_of_three_dies", few(1), |stores| {
        death(3, &OPS, 1, (2, stores))
    });
}

#[test]
fn one_of_three_dies_while_it_aborts() {
    deaths("one_of_three_dies_while_it_aborts", few(1), |stores| {
        last_words(3, stores)
    });
}

#[test]
fn a_death_is_noticed_while_another_is_away() {
    model("a_death_is_noticed_while_another_is_away", few(2), || {
        absent(false);
    });
}

#[test]
fn a_reader_is_missed_while_another_is_away() {
    model("a_reader_is_missed_while_another_is_away", few(2), || {
        absent(true);
    });
}

#[test]
fn ranks_that_disagree() {
    model("ranks_that_disagree", few(1), || desync(2, 1));
}

#[test]
fn three_ranks_that_disagree() {
    model("three_ranks_that_disagree", few(0), || desync(3, 1));
}

#[test]
fn a_rank_leaves_when_all_is_done() {
    model("a_rank_leaves_when_all_is_done", few(2), || {
        farewell(2, &asks::<1>(1), 0, 1);
    });
}

#[test]
fn a_rank_leaves_early() {
    model("a_rank_leaves_early", few(2), || {
        farewell(2, &asks::<2>(1), 1, 1);
    });
}

#[test]
fn survivors_agree_who_is_left() {
    model("survivors_agree_who_is_left", few(2), || regroup(3));
}

#[test]
fn a_torn_record_is_never_believed() {
    model("a_torn_record_is_never_believed", few(2), || records(3));
}
