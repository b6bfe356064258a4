//! The models at four ranks, in random orders: thousands of executions, each order from a seed.
//!
//! `RSBUCKET_MODEL_SEED` repeats a run; `RSBUCKET_MODEL_ROUNDS` says how many executions each model gets.

use std::time::{SystemTime, UNIX_EPOCH};

use shuttle::rand::{thread_rng, Rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

use super::asks;
use super::scenarios::{
    aborted, absent, death, desync, exchange, farewell, last_words, records, regroup,
};
use crate::sync::model::{begin, seconds};

const RANKS: u32 = 4;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Half of the rounds in orders where every step is drawn, half where few preemptions are.
fn model(name: &str, execution: impl Fn() + Copy + Send + Sync + 'static) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let seed =
        number("RSBUCKET_MODEL_SEED").unwrap_or_else(|| now().map_or(0, |t| t.as_nanos() as u64));
    let half = (number("RSBUCKET_MODEL_ROUNDS").unwrap_or(5000) / 2) as usize;
    println!("model {name}: RSBUCKET_MODEL_SEED={seed}");
    let start = seconds();
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.silence_warnings = true;
    let run = move || {
        begin();
        execution();
    };
    let drawn = Runner::new(RandomScheduler::new_from_seed(seed, half), config.clone()).run(run);
    let few = Runner::new(PctScheduler::new_from_seed(seed, 5, half), config).run(run);
    let used = seconds() - start;
    println!("model {name}: {} executions, {used:.1} s", drawn + few);
}

fn draw(below: u32) -> u32 {
    thread_rng().gen_range(0..below)
}

#[test]
fn four_ranks_exchange() {
    model("four_ranks_exchange", || {
        exchange(RANKS, &asks::<3>(3), (2, 2))
    });
}

#[test]
fn four_ranks_exchange_more_chunks_than_lines() {
    model("four_ranks_exchange_more_chunks_than_lines", || {
        exchange(RANKS, &asks::<3>(3), (4, 2));
    });
}

#[test]
fn four_ranks_and_aborts() {
    model("four_ranks_and_aborts", || {
        aborted(RANKS, &asks::<3>(2), 2, &[draw(RANKS), draw(RANKS)]);
    });
}

#[test]
fn one_of_four_dies() {
    model("one_of_four_dies", || {
        death(RANKS, &asks::<3>(2), 2, (draw(RANKS), draw(150)));
    });
}

#[test]
fn one_of_four_dies_while_it_aborts() {
    model("one_of_four_dies_while_it_aborts", || {
        last_words(RANKS, draw(8));
    });
}

#[test]
fn a_death_is_noticed_while_another_is_away() {
    model("a_death_is_noticed_while_another_is_away", || {
        absent(draw(2) == 1);
    });
}

#[test]
fn four_ranks_that_disagree() {
    model("four_ranks_that_disagree", || desync(RANKS, 1));
}

#[test]
fn one_of_four_leaves() {
    model("one_of_four_leaves", || {
        farewell(RANKS, &asks::<3>(2), draw(2) as usize, 2)
    });
}

#[test]
fn survivors_of_four_agree_who_is_left() {
    model("survivors_of_four_agree_who_is_left", || regroup(RANKS));
}

#[test]
fn a_torn_record_is_never_believed() {
    model("a_torn_record_is_never_believed", || records(6));
}
