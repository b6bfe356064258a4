//! Conversions between binary16, bfloat16, binary32 and binary64 that round once, to nearest even,
//! on every machine alike, and the float environment that they and the kernels count on.
//!
//! They are ours because a narrowing from f64 must not round twice, and because straight-line code
//! with selects in place of branches is what the compiler turns into vector instructions.

/// A binary16 number, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

/// A bfloat16 number, the upper half of a binary32, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// The difference of the exponents' biases, in place.
const REBIAS: u32 = (127 - 15) << 23;

impl F16 {
    /// The same value; exact. A NaN stays a NaN.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        let magnitude = u32::from(self.0 & 0x7fff) << 13;
        // 2^112, by which a binary16's exponent read as a binary32's is too small.
        let rebias = f32::from_bits((127 << 23) + REBIAS);
        let scaled = (f32::from_bits(magnitude) * rebias).to_bits();
        // The greatest exponent stays the greatest.
        let special = if magnitude < 0x7c00 << 13 {
            0
        } else {
            0x7f80_0000
        };
        f32::from_bits(scaled | special | u32::from(self.0 & 0x8000) << 16)
    }

    /// The nearest value, ties to even; infinity from 65520 on; every NaN becomes 0x7e00.
    #[inline(always)]
    pub fn from_f32(value: f32) -> F16 {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let sign = (bits >> 16) & 0x8000;
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(REBIAS).wrapping_add(0x0fff + odd) >> 13;
        // In the sum with 0.5 the last place is 2^-24, the unit of a subnormal, so the addition
        // does the rounding.
        let half = 0.5f32;
        let subnormal = (f32::from_bits(magnitude) + half)
            .to_bits()
            .wrapping_sub(half.to_bits());
        let finite = if magnitude < REBIAS + (1 << 23) {
            subnormal
        } else {
            normal
        };
        let bounded = if magnitude < REBIAS + (31 << 23) {
            finite
        } else {
            0x7c00
        };
        let result = if magnitude > 0x7f80_0000 {
            0x7e00
        } else {
            bounded | sign
        };
        F16(result as u16)
    }

    /// The nearest value, ties to even, of one rounding.
    #[inline(always)]
    pub fn from_f64(value: f64) -> F16 {
        F16::from_f32(to_odd(value))
    }
}

impl Bf16 {
    /// The same value; exact. A NaN stays a NaN.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    /// The nearest value, ties to even; every NaN becomes 0x7fc0.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Bf16 {
        let bits = quiet_f32(value).to_bits();
        let odd = (bits >> 16) & 1;
        Bf16(((bits + 0x7fff + odd) >> 16) as u16)
    }

    /// The nearest value, ties to even, of one rounding.
    #[inline(always)]
    pub fn from_f64(value: f64) -> Bf16 {
        Bf16::from_f32(to_odd(value))
    }
}

/// `value` in f32, an inexact one rounded to the neighbour with an odd last bit. No odd f32 is a
/// 16-bit value or halfway between two, so rounding the result again is rounding `value` once.
#[inline(always)]
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // From an even neighbour the odd one lies on the other side of `value`: one bit pattern up
    // or down. A NaN compares as neither.
    let even = !bits & 1;
    let up = even & u32::from(back.abs() < value.abs());
    let down = even & u32::from(back.abs() > value.abs());
    f32::from_bits(bits.wrapping_add(up).wrapping_sub(down))
}

/// `value`, or the canonical NaN.
#[inline(always)]
pub fn quiet_f32(value: f32) -> f32 {
    if value.is_nan() {
        f32::from_bits(0x7fc0_0000)
    } else {
        value
    }
}

/// `value`, or the canonical NaN.
#[inline(always)]
pub fn quiet_f64(value: f64) -> f64 {
    if value.is_nan() {
        f64::from_bits(0x7ff8 << 48)
    } else {
        value
    }
}

/// While it lives, this thread rounds to nearest even, keeps subnormals and traps nothing,
/// whatever the host program has set (`-ffast-math` start-up code flushes subnormals to zero).
pub struct FloatEnv {
    /// The control register to put back, if it was not the default.
    saved: Option<control::Word>,
}

impl FloatEnv {
    /// Sets the default environment where it is not set already.
    #[inline]
    pub fn enter() -> FloatEnv {
        let word = control::read();
        let saved = (word & control::MODES != control::DEFAULT).then(|| {
            control::write(control::DEFAULT);
            word
        });
        FloatEnv { saved }
    }
}

impl Drop for FloatEnv {
    #[inline]
    fn drop(&mut self) {
        if let Some(word) = self.saved {
            control::write(word);
        }
    }
}

/// MXCSR: bits 0 to 5 are status, the others modes; 0x1f80 masks every exception.
#[cfg(target_arch = "x86_64")]
mod control {
    use std::arch::asm;

    pub type Word = u32;
    pub const MODES: Word = !0x3f;
    pub const DEFAULT: Word = 0x1f80;

    #[inline]
    pub fn read() -> Word {
        let mut word: Word = 0;
        // SAFETY: stores four bytes at the address of `word`.
        unsafe { asm!("stmxcsr [{}]", in(reg) &mut word, options(nostack, preserves_flags)) };
        word
    }

    #[inline]
    pub fn write(word: Word) {
        // SAFETY: loads four bytes; `word` is the default, or what this thread had before.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &word, options(nostack)) };
    }
}

/// FPCR: rounding, flushing and traps; the default is zero. Its status is another register.
#[cfg(target_arch = "aarch64")]
mod control {
    use std::arch::asm;

    pub type Word = u64;
    pub const MODES: Word = !0;
    pub const DEFAULT: Word = 0;

    #[inline]
    pub fn read() -> Word {
        let word: Word;
        // SAFETY: reads a register that user code may read.
        unsafe { asm!("mrs {}, fpcr", out(reg) word, options(nostack, preserves_flags)) };
        word
    }

    #[inline]
    pub fn write(word: Word) {
        // SAFETY: the default, or what this thread had before.
        unsafe { asm!("msr fpcr, {}", in(reg) word, options(nostack)) };
    }
}

/// Elsewhere the environment is left as it is.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod control {
    pub type Word = u32;
    pub const MODES: Word = 0;
    pub const DEFAULT: Word = 0;

    pub fn read() -> Word {
        0
    }

    pub fn write(_: Word) {}
}
