//! What the kernels use of x86-64: vectors of 256 and of 512 bits, the conversions of binary16, stores past
//! the caches.

use std::arch::x86_64::*;

use super::float::{quiet_f32, F16};
use super::kernel::{run, Accumulator, Element, Job, Level};

macro_rules! level {
    ($(#[$doc:meta])* $name:ident, $features:literal, $lanes:literal, $vector:ty, $past:ident,
     $from:ident, $into:ident, $widen:expr, $narrow:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Level for $name {
            #[target_feature(enable = $features)]
            unsafe fn kernel<In, Out, A, const SUM: bool, const B: usize>(job: &Job)
            where
                In: Element<A>,
                Out: Element<A>,
                A: Accumulator,
            {
                // SAFETY: passed on.
                unsafe { run::<$name, In, Out, A, SUM, B>(job) }
            }

            #[inline(always)]
            unsafe fn store_past<T>(from: &T, to: *mut T) {
                const { assert!(size_of::<T>().is_multiple_of(size_of::<$vector>())) };
                let from = std::ptr::from_ref(from).cast::<$vector>();
                for j in 0..size_of::<T>() / size_of::<$vector>() {
                    // SAFETY: inside both, of which `to` begins on a cache line; the caller answers for
                    // the CPU.
                    unsafe { $past(to.cast::<$vector>().add(j), from.add(j).read_unaligned()) };
                }
            }

            #[inline(always)]
            fn settle_stores() {
                // SAFETY: every CPU of this target has it.
                unsafe { _mm_sfence() };
            }

            #[inline(always)]
            unsafe fn widen<const B: usize>(from: *const F16, into: &mut [f32; B]) {
                const { assert!(B % $lanes == 0) };
                for j in 0..B / $lanes {
                    // SAFETY: `(j + 1) * lanes <= B`; the caller answers for the CPU.
                    unsafe {
                        let $from = from.add(j * $lanes);
                        let $into = into.as_mut_ptr().add(j * $lanes);
                        $widen;
                    }
                }
            }

            #[inline(always)]
            unsafe fn narrow<const B: usize>(from: &[f32; B], into: &mut [F16; B]) {
                const { assert!(B % $lanes == 0) };
                let mut quiet = *from;
                for value in &mut quiet {
                    *value = quiet_f32(*value);
                }
                for j in 0..B / $lanes {
                    // SAFETY: `(j + 1) * lanes <= B`; the caller answers for the CPU.
                    unsafe {
                        let $from = quiet.as_ptr().add(j * $lanes);
                        let $into = into.as_mut_ptr().add(j * $lanes);
                        $narrow;
                    }
                }
            }
        }
    };
}

level!(
    /// 256-bit vectors and the conversions of binary16.
    Avx2, "avx2,f16c", 8, __m256i, _mm256_stream_si256, from, into,
    _mm256_storeu_ps(into, _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))),
    _mm_storeu_si128(into.cast(), _mm256_cvtps_ph::<0>(_mm256_loadu_ps(from)))
);
level!(
    /// 512-bit vectors.
    Avx512, "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl", 16, __m512i, _mm512_stream_si512, from, into,
    _mm512_storeu_ps(into, _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))),
    _mm256_storeu_si256(into.cast(), _mm512_cvtps_ph::<0>(_mm512_loadu_ps(from)))
);
