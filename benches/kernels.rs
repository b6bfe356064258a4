//! The reduction of two rows in the L1 cache, by type and by instruction set of this machine, and its fused last step.

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use rsbucket::dtype::{DType, Finish, Op};
use rsbucket::reduce::{self, Reduction};

/// Bytes of a row.
const ROW: usize = 8 << 10;

fn kernels(c: &mut Criterion) {
    let fused = Finish {
        scale: 1.0,
        output: DType::F32,
        accumulate: true,
    };
    let cases = [
        ("f32 sum", DType::F32, Op::Sum, Finish::plain(DType::F32)),
        ("f16 sum", DType::F16, Op::Sum, Finish::plain(DType::F16)),
        ("bf16 sum", DType::BF16, Op::Sum, Finish::plain(DType::BF16)),
        ("f64 sum", DType::F64, Op::Sum, Finish::plain(DType::F64)),
        ("i32 sum", DType::I32, Op::Sum, Finish::plain(DType::I32)),
        ("i64 sum", DType::I64, Op::Sum, Finish::plain(DType::I64)),
        ("u8 sum", DType::U8, Op::Sum, Finish::plain(DType::U8)),
        ("f32 max", DType::F32, Op::Max, Finish::plain(DType::F32)),
        ("bf16 average added to f32", DType::BF16, Op::Avg, fused),
    ];
    let mut benches = c.benchmark_group("kernels");
    for (name, dtype, op, finish) in cases {
        let count = ROW / dtype.size();
        // Zeros are as fast as other numbers: no kernel looks at values before it computes.
        let rows = [vec![0u64; ROW / 8], vec![0u64; ROW / 8]];
        let srcs = [rows[0].as_ptr().cast::<u8>(), rows[1].as_ptr().cast()];
        let mut output = vec![0u64; count * finish.output.size() / 8];
        benches.throughput(Throughput::Bytes(2 * ROW as u64));
        for (level, table) in reduce::tables() {
            benches.bench_function(BenchmarkId::new(name, level), |b| {
                let mut reduction = Reduction::with(table, dtype, op, 2);
                b.iter(|| {
                    // SAFETY: two rows and an output of `count` elements; the table is one of this
                    // machine's.
                    unsafe { reduction.rows(&srcs, count, &finish, output.as_mut_ptr().cast()) };
                })
            });
        }
    }
    benches.finish();
}

criterion_group!(all, kernels);
criterion_main!(all);
