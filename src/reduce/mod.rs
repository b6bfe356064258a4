//! The reduction of rows in rank order, with its fused last step.
//!
//! Every element is computed alike, in `f32` (`f64` where the input or the output is), wherever it
//! lies and whichever instruction set the CPU has: results are the same bits for every bucket
//! size, alignment and machine. The instruction set is chosen once, at run time.

mod float;
mod kernel;
#[cfg(test)]
mod tests;

use crate::dtype::{DType, Finish, Op};
use float::{Bf16, FloatEnv, F16};
use kernel::{Job, Kernel, Level, Portable};
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use kernel::{Avx2, Avx512};

/// Finds the kernel of one instruction set for (input, operation, output).
type Table = fn(DType, Op, DType) -> Option<Kernel>;

/// Combines rows in the order in which they are given and writes the finished result.
///
/// `srcs[r]` is `count` elements of `dtype`; `dst` takes `count` elements of `fin.output`. `ranks`
/// is what AVG divides by: the rows may have been summed elsewhere. `check_rules` has accepted the
/// combination. A NaN that is computed is written as the canonical quiet one; a single row that
/// needs no arithmetic is copied bit for bit.
///
/// # Safety
/// The rows must be readable and `dst` writable for `count` elements, at any alignment. `dst` may be
/// exactly one of the rows if `fin.output` is `dtype`, and must overlap nothing else.
pub unsafe fn reduce(
    dtype: DType,
    op: Op,
    srcs: &[*const u8],
    count: usize,
    ranks: u32,
    fin: &Finish,
    dst: *mut u8,
) {
    static CHOSEN: OnceLock<Table> = OnceLock::new();
    let table = *CHOSEN.get_or_init(|| tables().last().map_or(table::<Portable>, |(_, t)| *t));
    // SAFETY: passed on; the table is one of this CPU.
    unsafe { reduce_with(table, dtype, op, srcs, count, ranks, fin, dst) }
}

/// The instruction sets of this CPU, the best one last.
fn tables() -> Vec<(&'static str, Table)> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut tables: Vec<(_, Table)> = vec![("portable", table::<Portable>)];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
        tables.push(("avx2", table::<Avx2>));
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            tables.push(("avx512", table::<Avx512>));
        }
    }
    tables
}

/// `reduce` with the kernels of one instruction set.
///
/// # Safety
/// As for `reduce`, and the table must be one of this CPU.
#[allow(clippy::too_many_arguments)]
unsafe fn reduce_with(
    table: Table,
    dtype: DType,
    op: Op,
    srcs: &[*const u8],
    count: usize,
    ranks: u32,
    fin: &Finish,
    dst: *mut u8,
) {
    let mut job = Job {
        op,
        srcs,
        dst,
        count,
        divisor: 1.0,
        factor: 1.0,
        scale: fin.scale,
        accumulate: fin.accumulate,
    };
    if op == Op::Avg {
        // The inverse of a power of two is exact, so multiplying rounds as dividing does, sooner.
        if ranks.is_power_of_two() {
            job.factor = 1.0 / f64::from(ranks);
        } else {
            job.divisor = f64::from(ranks);
        }
    }
    let plain = fin.output == dtype && !fin.accumulate && job.divisor == 1.0;
    if let [row] = *srcs {
        if plain && job.factor == 1.0 && job.scale == 1.0 {
            // SAFETY: the caller's pointers; a copy onto itself is allowed.
            unsafe { dst.copy_from(row, count * dtype.size()) };
            return;
        }
    }
    let Some(kernel) = table(dtype, op, fin.output) else {
        debug_assert!(
            false,
            "{} of {} to {}",
            op.name(),
            dtype.name(),
            fin.output.name()
        );
        return;
    };
    let _env = FloatEnv::enter();
    // SAFETY: passed on; the kernel is the one of these types.
    unsafe { kernel(&job) }
}

/// The kernel of one instruction set; none where `check_rules` refuses.
fn table<L: Level>(dtype: DType, op: Op, output: DType) -> Option<Kernel> {
    match op {
        Op::Sum | Op::Avg => typed::<L, true>(dtype, output),
        Op::Prod | Op::Min | Op::Max => typed::<L, false>(dtype, output),
    }
}

/// The kernel for these types, in blocks that fit into the vector registers.
fn typed<L: Level, const SUM: bool>(dtype: DType, output: DType) -> Option<Kernel> {
    use DType as D;
    let kernel: Kernel = match (dtype, output) {
        (D::F32, D::F32) => L::kernel::<f32, f32, f32, SUM, 64>,
        (D::F32, D::F16) => L::kernel::<f32, F16, f32, SUM, 64>,
        (D::F32, D::BF16) => L::kernel::<f32, Bf16, f32, SUM, 64>,
        (D::F32, D::F64) => L::kernel::<f32, f64, f64, SUM, 32>,
        (D::F64, D::F32) => L::kernel::<f64, f32, f64, SUM, 32>,
        (D::F64, D::F16) => L::kernel::<f64, F16, f64, SUM, 32>,
        (D::F64, D::BF16) => L::kernel::<f64, Bf16, f64, SUM, 32>,
        (D::F64, D::F64) => L::kernel::<f64, f64, f64, SUM, 32>,
        (D::F16, D::F32) => L::kernel::<F16, f32, f32, SUM, 64>,
        (D::F16, D::F16) => L::kernel::<F16, F16, f32, SUM, 64>,
        (D::F16, D::BF16) => L::kernel::<F16, Bf16, f32, SUM, 64>,
        (D::F16, D::F64) => L::kernel::<F16, f64, f64, SUM, 32>,
        (D::BF16, D::F32) => L::kernel::<Bf16, f32, f32, SUM, 64>,
        (D::BF16, D::F16) => L::kernel::<Bf16, F16, f32, SUM, 64>,
        (D::BF16, D::BF16) => L::kernel::<Bf16, Bf16, f32, SUM, 64>,
        (D::BF16, D::F64) => L::kernel::<Bf16, f64, f64, SUM, 32>,
        (D::I32, D::I32) => L::kernel::<i32, i32, i32, SUM, 64>,
        (D::I64, D::I64) => L::kernel::<i64, i64, i64, SUM, 32>,
        (D::U8, D::U8) => L::kernel::<u8, u8, u8, SUM, 256>,
        (D::I8, D::I8) => L::kernel::<i8, i8, i8, SUM, 256>,
        _ => return None,
    };
    Some(kernel)
}
