//! The reduction of rows in rank order, with its fused last step.
//!
//! Every element is computed alike, in `f32` (`f64` where the input or the output is), wherever it
//! lies and whichever instruction set the CPU has: results are the same bits for every bucket
//! size, alignment and machine. The instruction set is chosen once, at run time.

mod float;
mod kernel;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::dtype::{DType, Finish, Op};
use float::{Bf16, FloatEnv, F16};
use kernel::{Job, Kernel, Level, Portable};
use std::sync::atomic::{AtomicPtr, Ordering};

#[cfg(target_arch = "x86_64")]
use x86::{Avx2, Avx512};

/// Finds the kernel of one instruction set for (input, operation, output).
pub type Table = fn(DType, Op, DType) -> Option<Kernel>;

/// The reductions of one type and operation, one after the other. While it lives this thread computes
/// in the default float environment.
pub struct Reduction {
    table: Table,
    dtype: DType,
    op: Op,
    divisor: f64,
    factor: f64,
    past: bool,
    /// The kernel that was used last, and its output type.
    kernel: Option<(DType, Kernel)>,
    _env: FloatEnv,
}

impl Reduction {
    /// Reductions with the best instruction set of this CPU. `ranks` is what AVG divides by: the rows may
    /// have been summed elsewhere.
    pub fn new(dtype: DType, op: Op, ranks: u32) -> Reduction {
        Reduction::with(chosen(), dtype, op, ranks)
    }

    /// Reductions with the kernels of one instruction set of this CPU.
    pub fn with(table: Table, dtype: DType, op: Op, ranks: u32) -> Reduction {
        let (mut divisor, mut factor) = (1.0, 1.0);
        if op == Op::Avg {
            // The inverse of a power of two is exact, so multiplying rounds as dividing does, sooner.
            if ranks.is_power_of_two() {
                factor = 1.0 / f64::from(ranks);
            } else {
                divisor = f64::from(ranks);
            }
        }
        Reduction {
            table,
            dtype,
            op,
            divisor,
            factor,
            past: false,
            kernel: None,
            _env: FloatEnv::enter(),
        }
    }

    /// Whether the next results are parts of one that is too large for the caches: it is written past them.
    #[inline]
    pub fn write_past(&mut self, yes: bool) {
        self.past = yes;
    }

    /// Combines rows in the order in which they are given and writes the finished result.
    ///
    /// `srcs[r]` is `count` elements of the type; `dst` takes `count` elements of `fin.output`.
    /// `check_rules` has accepted the combination. A NaN that is computed is written as the canonical quiet
    /// one; a single row that needs no arithmetic is copied bit for bit.
    ///
    /// # Safety
    /// The rows must be readable and `dst` writable for `count` elements, at any alignment. `dst` may be
    /// exactly one of the rows if `fin.output` is the type, and must overlap nothing else.
    #[inline]
    pub unsafe fn rows(&mut self, srcs: &[*const u8], count: usize, fin: &Finish, dst: *mut u8) {
        if let [row] = *srcs {
            let unscaled = self.divisor == 1.0 && self.factor == 1.0;
            if unscaled && *fin == Finish::plain(self.dtype) {
                // SAFETY: the caller's pointers; a copy onto itself is allowed.
                unsafe { dst.copy_from(row, count * self.dtype.size()) };
                return;
            }
        }
        let kernel = match self.kernel {
            Some((output, kernel)) if output == fin.output => kernel,
            _ => match (self.table)(self.dtype, self.op, fin.output) {
                Some(kernel) => self.kernel.insert((fin.output, kernel)).1,
                None => return,
            },
        };
        let job = Job {
            op: self.op,
            srcs,
            dst,
            count,
            divisor: self.divisor,
            factor: self.factor,
            scale: fin.scale,
            accumulate: fin.accumulate,
            past: self.past && !fin.accumulate,
        };
        // SAFETY: passed on; the kernel is the one of these types, for this CPU.
        unsafe { kernel(&job) }
    }
}

/// The best table of this CPU. Not a OnceLock: a child forked while another thread looks for it would
/// wait for ever; here two threads may look at once, and find the same.
fn chosen() -> Table {
    static CHOSEN: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
    let seen = CHOSEN.load(Ordering::Relaxed);
    if !seen.is_null() {
        // SAFETY: only tables are stored, and pointers to functions fit into other pointers.
        return unsafe { std::mem::transmute::<*mut (), Table>(seen) };
    }
    let best = tables()
        .last()
        .map_or(table::<Portable> as Table, |(_, t)| *t);
    CHOSEN.store(best as *mut (), Ordering::Relaxed);
    best
}

/// The instruction sets of this CPU, the best one last.
pub fn tables() -> Vec<(&'static str, Table)> {
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
