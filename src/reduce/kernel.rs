//! The loop that reads every row once, combines it in registers and writes the result once,
//! generic over element types and instruction set.
//!
//! It works in blocks of a constant number of elements held in local arrays, which the compiler
//! unrolls into vector registers. A block is read in full before any of it is written: that is
//! what lets the output be one of the rows. The part-full block at the end takes the same path
//! through a padded copy, so an element's result does not depend on where it lies.
//!
//! A NaN's sign and payload depend on the order in which the hardware sees the operands, so every
//! NaN that is computed is written as the one canonical quiet NaN.

use super::float::{quiet_f32, quiet_f64, Bf16, F16};
use crate::dtype::Op;
use crate::prefetch::prefetch;
use std::mem::MaybeUninit;

/// One reduction, as the kernels see it.
pub struct Job<'a> {
    /// How they are combined.
    pub op: Op,
    /// The rows, in rank order.
    pub srcs: &'a [*const u8],
    /// Where the result goes.
    pub dst: *mut u8,
    /// Elements of a row and of the result.
    pub count: usize,
    /// What the combined value is divided by; 1: nothing.
    pub divisor: f64,
    /// What it is multiplied by next; 1: nothing.
    pub factor: f64,
    /// What it is multiplied by last; 1: nothing.
    pub scale: f64,
    /// Whether the result is added to what `dst` holds.
    pub accumulate: bool,
    /// Whether the result is too large for the caches, which it then does not pass: `dst` is not read to be
    /// overwritten.
    pub past: bool,
}

/// The type in which values are combined.
pub trait Accumulator: Copy {
    /// A value for what is overwritten.
    const ZERO: Self;
    /// The sum; integers wrap.
    fn sum(self, other: Self) -> Self;
    /// The product; integers wrap.
    fn prod(self, other: Self) -> Self;
    /// The lesser one: NaN if either is, -0 below +0.
    fn min(self, other: Self) -> Self;
    /// The greater one: NaN if either is, +0 above -0.
    fn max(self, other: Self) -> Self;
    /// Divides and multiplies a block as the job says.
    fn scale<const B: usize>(block: &mut [Self; B], job: &Job);
}

macro_rules! float_accumulator {
    ($t:ty, $sign:expr) => {
        impl Accumulator for $t {
            const ZERO: $t = 0.0;
            #[inline(always)]
            fn sum(self, other: $t) -> $t {
                self + other
            }
            #[inline(always)]
            fn prod(self, other: $t) -> $t {
                self * other
            }
            #[inline(always)]
            fn min(self, other: $t) -> $t {
                // Neither less nor greater: equal, where the bits differ in the sign of zero
                // only and -0 has more of them, or a NaN, which stays one under more bits.
                let either = <$t>::from_bits(self.to_bits() | other.to_bits());
                let rest = if self > other { other } else { either };
                if self < other {
                    self
                } else {
                    rest
                }
            }
            #[inline(always)]
            fn max(self, other: $t) -> $t {
                // As in `min`, with the sign turned.
                let either = (self.to_bits() ^ $sign) | (other.to_bits() ^ $sign);
                let either = <$t>::from_bits(either ^ $sign);
                let rest = if self < other { other } else { either };
                if self > other {
                    self
                } else {
                    rest
                }
            }
            #[inline(always)]
            fn scale<const B: usize>(block: &mut [$t; B], job: &Job) {
                if job.divisor != 1.0 {
                    let divisor = job.divisor as $t;
                    block.iter_mut().for_each(|v| *v /= divisor);
                }
                for factor in [job.factor, job.scale] {
                    if factor != 1.0 {
                        let factor = factor as $t;
                        block.iter_mut().for_each(|v| *v *= factor);
                    }
                }
            }
        }
    };
}
float_accumulator!(f32, 1 << 31);
float_accumulator!(f64, 1 << 63);

macro_rules! integer_accumulator {
    ($($t:ty),*) => {$(
        impl Accumulator for $t {
            const ZERO: $t = 0;
            #[inline(always)]
            fn sum(self, other: $t) -> $t {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn prod(self, other: $t) -> $t {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn min(self, other: $t) -> $t {
                Ord::min(self, other)
            }
            #[inline(always)]
            fn max(self, other: $t) -> $t {
                Ord::max(self, other)
            }
            #[inline(always)]
            fn scale<const B: usize>(_: &mut [$t; B], _: &Job) {}
        }
    )*};
}
integer_accumulator!(i32, i64, u8, i8);

/// An element in memory, read into and written from accumulators of type `A`.
pub trait Element<A: Accumulator>: Copy {
    /// A value for what is overwritten.
    const ZERO: Self;
    /// The same value; exact.
    fn widen(self) -> A;
    /// The nearest value; every NaN becomes the canonical one.
    fn narrow(value: A) -> Self;

    /// Widens `B` elements at any alignment.
    ///
    /// # Safety
    /// `from` must be readable for `B` elements, and this CPU must have the instructions of `L`.
    #[inline(always)]
    unsafe fn load<L: Level, const B: usize>(from: *const Self, into: &mut [A; B]) {
        for (j, value) in into.iter_mut().enumerate() {
            // SAFETY: `j < B`.
            *value = unsafe { from.add(j).read_unaligned() }.widen();
        }
    }

    /// Narrows a block.
    ///
    /// # Safety
    /// This CPU must have the instructions of `L`.
    #[inline(always)]
    unsafe fn store<L: Level, const B: usize>(from: &[A; B], into: &mut [Self; B]) {
        for (to, value) in into.iter_mut().zip(from) {
            *to = Self::narrow(*value);
        }
    }
}

macro_rules! element {
    ($t:ty, $a:ty, $zero:expr, $widen:expr, $narrow:expr) => {
        impl Element<$a> for $t {
            const ZERO: $t = $zero;
            #[inline(always)]
            fn widen(self) -> $a {
                let widen: fn($t) -> $a = $widen;
                widen(self)
            }
            #[inline(always)]
            fn narrow(value: $a) -> $t {
                let narrow: fn($a) -> $t = $narrow;
                narrow(value)
            }
        }
    };
}
element!(f32, f32, 0.0, |v| v, quiet_f32);
element!(Bf16, f32, Bf16(0), Bf16::to_f32, Bf16::from_f32);
element!(f32, f64, 0.0, f64::from, |v| quiet_f32(v as f32));
element!(f64, f64, 0.0, |v| v, quiet_f64);
element!(F16, f64, F16(0), |v| v.to_f32().into(), F16::from_f64);
element!(Bf16, f64, Bf16(0), |v| v.to_f32().into(), Bf16::from_f64);
element!(i32, i32, 0, |v| v, |v| v);
element!(i64, i64, 0, |v| v, |v| v);
element!(u8, u8, 0, |v| v, |v| v);
element!(i8, i8, 0, |v| v, |v| v);

impl Element<f32> for F16 {
    const ZERO: F16 = F16(0);
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> F16 {
        F16::from_f32(value)
    }
    #[inline(always)]
    unsafe fn load<L: Level, const B: usize>(from: *const F16, into: &mut [f32; B]) {
        // SAFETY: passed on.
        unsafe { L::widen(from, into) }
    }
    #[inline(always)]
    unsafe fn store<L: Level, const B: usize>(from: &[f32; B], into: &mut [F16; B]) {
        // SAFETY: passed on.
        unsafe { L::narrow(from, into) }
    }
}

/// A reduction compiled for one choice of types and instruction set.
pub type Kernel = unsafe fn(&Job);

/// An instruction set.
pub trait Level {
    /// `run`, compiled for this instruction set.
    ///
    /// # Safety
    /// As for `run`.
    unsafe fn kernel<In, Out, A, const SUM: bool, const B: usize>(job: &Job)
    where
        In: Element<A>,
        Out: Element<A>,
        A: Accumulator;

    /// `Element::load` of binary16.
    ///
    /// # Safety
    /// As for `Element::load`.
    #[inline(always)]
    unsafe fn widen<const B: usize>(from: *const F16, into: &mut [f32; B]) {
        for (j, value) in into.iter_mut().enumerate() {
            // SAFETY: `j < B`.
            *value = unsafe { from.add(j).read_unaligned() }.to_f32();
        }
    }

    /// `Element::store` of binary16.
    ///
    /// # Safety
    /// As for `Element::store`.
    #[inline(always)]
    unsafe fn narrow<const B: usize>(from: &[f32; B], into: &mut [F16; B]) {
        for (to, value) in into.iter_mut().zip(from) {
            *to = F16::from_f32(*value);
        }
    }

    /// Writes a block past the caches, if there are instructions for it; seen by others only after
    /// `settle_stores`.
    ///
    /// # Safety
    /// `to` is writable and begins on a cache line, and this CPU must have the instructions of the level.
    #[inline(always)]
    unsafe fn store_past<T: Copy>(from: &T, to: *mut T) {
        // SAFETY: by the promise of this function.
        unsafe { to.write_unaligned(*from) };
    }

    /// The end of stores past the caches.
    #[inline(always)]
    fn settle_stores() {}
}

/// What every CPU of the target has.
pub struct Portable;

impl Level for Portable {
    unsafe fn kernel<In, Out, A, const SUM: bool, const B: usize>(job: &Job)
    where
        In: Element<A>,
        Out: Element<A>,
        A: Accumulator,
    {
        // SAFETY: passed on.
        unsafe { run::<Portable, In, Out, A, SUM, B>(job) }
    }
}

/// A last block of fewer elements than this is worked off one by one: padding it would cost more.
const FEW: usize = 8;

/// How many bytes ahead an output that is added to is fetched. The rows come from a cache, it comes from
/// memory: left to itself the CPU waits for it in every block.
const AHEAD: usize = 4096;

/// Carries out `job` with rows of `In`, a result of `Out`, values of `A`, in blocks of `B`. With `SUM`
/// it knows at compile time that it sums, which is worth code of its own.
///
/// # Safety
/// The job's pointers and count must be good for `In` and `Out` as `reduce` asks, `SUM` must be right,
/// and this CPU must have the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn run<L, In, Out, A, const SUM: bool, const B: usize>(job: &Job)
where
    L: Level,
    In: Element<A>,
    Out: Element<A>,
    A: Accumulator,
{
    let mut done = 0;
    let plain = (job.divisor, job.factor, job.scale) == (1.0, 1.0, 1.0) && !job.accumulate;
    // Whole blocks first, with a constant length; and most sums have no last step.
    while job.count - done >= B {
        // SAFETY: rows and output have `B` elements from `done` on.
        unsafe {
            if SUM && plain {
                block::<L, In, Out, A, SUM, true, B>(job, done, B);
            } else {
                block::<L, In, Out, A, SUM, false, B>(job, done, B);
            }
        }
        done += B;
    }
    if job.past {
        L::settle_stores();
    }
    let left = job.count - done;
    if left >= FEW {
        // SAFETY: rows and output have `left` elements from `done` on.
        unsafe { block::<L, In, Out, A, SUM, false, B>(job, done, left) };
        return;
    }
    for at in done..job.count {
        // SAFETY: rows and output have an element at `at`.
        unsafe { block::<Portable, In, Out, A, SUM, false, 1>(job, at, 1) };
    }
}

/// Carries out `job` for `len` elements from `done` on, at most `B`. `PLAIN`: it has no last step.
///
/// # Safety
/// As for `run`; the job has those elements.
#[inline(always)]
unsafe fn block<L, In, Out, A, const SUM: bool, const PLAIN: bool, const B: usize>(
    job: &Job,
    done: usize,
    len: usize,
) where
    L: Level,
    In: Element<A>,
    Out: Element<A>,
    A: Accumulator,
{
    let [first, rest @ ..] = job.srcs else {
        return;
    };
    let op = if SUM { Op::Sum } else { job.op };
    let mut acc = [A::ZERO; B];
    // SAFETY: rows and output have `len` elements from `done` on.
    unsafe { load::<L, In, A, B>(first.cast::<In>().add(done), len, &mut acc) };
    for row in rest {
        let mut values = [A::ZERO; B];
        // SAFETY: as above.
        unsafe { load::<L, In, A, B>(row.cast::<In>().add(done), len, &mut values) };
        match op {
            Op::Sum | Op::Avg => combine(&mut acc, &values, A::sum),
            Op::Prod => combine(&mut acc, &values, A::prod),
            Op::Min => combine(&mut acc, &values, A::min),
            Op::Max => combine(&mut acc, &values, A::max),
        }
    }
    // SAFETY: as above.
    let out = unsafe { job.dst.cast::<Out>().add(done) };
    if !PLAIN {
        A::scale(&mut acc, job);
    }
    if !PLAIN && job.accumulate {
        prefetch(out.cast::<u8>().wrapping_add(AHEAD), B * size_of::<Out>());
        let mut held = [A::ZERO; B];
        // SAFETY: as above.
        unsafe { load::<L, Out, A, B>(out, len, &mut held) };
        combine(&mut acc, &held, A::sum);
    }
    // SAFETY: as above.
    unsafe { store::<L, Out, A, B>(&acc, out, len, job.past) };
}

/// Combines two blocks into the first.
#[inline(always)]
fn combine<A: Accumulator, const B: usize>(left: &mut [A; B], right: &[A; B], op: fn(A, A) -> A) {
    for (left, right) in left.iter_mut().zip(right) {
        *left = op(*left, *right);
    }
}

/// Widens `len` elements, at most `B`; the rest of the block is unspecified.
///
/// # Safety
/// `from` must be readable for `len` elements, and this CPU must have the instructions of `L`.
#[inline(always)]
unsafe fn load<L: Level, E: Element<A>, A: Accumulator, const B: usize>(
    mut from: *const E,
    len: usize,
    into: &mut [A; B],
) {
    let mut padded = MaybeUninit::<[E; B]>::uninit();
    if len < B {
        let padded = padded.write([E::ZERO; B]);
        let bytes = len * size_of::<E>();
        // SAFETY: `len` elements are there to read, and fit.
        unsafe { from.cast::<u8>().copy_to(padded.as_mut_ptr().cast(), bytes) };
        from = padded.as_ptr();
    }
    // SAFETY: `B` elements can be read: the caller's, or the padded copy.
    unsafe { E::load::<L, B>(from, into) };
}

/// Narrows a block into `len` elements, at most `B`.
///
/// # Safety
/// `into` must be writable for `len` elements, and this CPU must have the instructions of `L`. `past`: see
/// [`Job`].
#[inline(always)]
unsafe fn store<L: Level, E: Element<A>, A: Accumulator, const B: usize>(
    from: &[A; B],
    into: *mut E,
    len: usize,
    past: bool,
) {
    let mut block = [E::ZERO; B];
    // SAFETY: passed on.
    unsafe { E::store::<L, B>(from, &mut block) };
    if len < B {
        let cut = block;
        // SAFETY: `len` elements can be written, and `cut` has more.
        unsafe {
            into.cast::<u8>()
                .copy_from(cut.as_ptr().cast(), len * size_of::<E>())
        };
    } else if past && (into as usize).is_multiple_of(64) {
        // SAFETY: all `B` can be written, and begin on a cache line.
        unsafe { L::store_past(&block, into.cast::<[E; B]>()) };
    } else {
        // SAFETY: all `B` can be written.
        unsafe { into.cast::<[E; B]>().write_unaligned(block) };
    }
}
