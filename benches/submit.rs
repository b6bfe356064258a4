//! What an op of one element costs, its callback and its checks included: 1,000 submits and a flush, and one submit and a
//! flush, alone and with a peer thread that keeps step.

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use rsbucket_benches::{ranks, Rank};
use std::time::{Duration, Instant};

/// The time of `passes` passes of the first rank, while the others make theirs.
fn time(group: &mut [Rank], passes: u64) -> Duration {
    let (first, peers) = group.split_first_mut().expect("a rank");
    std::thread::scope(|scope| {
        for peer in peers {
            scope.spawn(move || (0..passes).for_each(|_| peer.pass()));
        }
        let begin = Instant::now();
        (0..passes).for_each(|_| first.pass());
        begin.elapsed()
    })
}

fn submit(c: &mut Criterion) {
    let mut benches = c.benchmark_group("submit");
    for (size, name) in [(1, "one rank"), (2, "two threads")] {
        for ops in [1, 1000] {
            let mut group = ranks(size, ops);
            benches.throughput(Throughput::Elements(ops as u64));
            benches.bench_function(format!("{name}, {ops} a flush"), |b| {
                b.iter_custom(|passes| time(&mut group, passes));
            });
        }
    }
    benches.finish();
}

criterion_group!(all, submit);
criterion_main!(all);
