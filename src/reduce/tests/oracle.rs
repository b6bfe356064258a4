//! What the kernels must write, computed one element at a time in the plainest way, and the data
//! that they are tried on.

use crate::dtype::{DType, Finish, Op};
use half::{bf16, f16};
use std::sync::OnceLock;

/// Well-mixed bits of a position, a rank and a round.
pub fn mix(position: usize, rank: usize, round: usize) -> u64 {
    let mut h = (position as u64) << 32 ^ (rank as u64) << 16 ^ round as u64;
    for _ in 0..2 {
        h = (h ^ h >> 31).wrapping_add(0x9e37_79b9_7f4a_7c15);
        h = (h ^ h >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    h ^ h >> 32
}

/// A number's bits in a float format: mostly of moderate size, now and then anything.
fn float_bits(h: u64, exponent_bits: u32, mantissa_bits: u32) -> u64 {
    let (exponents, mantissas) = ((1u64 << exponent_bits) - 1, (1u64 << mantissa_bits) - 1);
    let random = h >> 8;
    let mantissa = random & mantissas;
    let (exponent, mantissa) = match h % 64 {
        0 => (exponents, mantissa),
        1 => (exponents, 1 << (random % u64::from(mantissa_bits))),
        2 => (exponents, 0),
        3 | 4 => (0, 0),
        5 | 6 => (0, mantissa),
        7 => (exponents - 1, mantissas),
        8..=15 => (random >> 12 & exponents, mantissa),
        // Few bits, so that sums and halves are often ties.
        16..=31 => (
            exponents / 2 + (random >> 5) % 3,
            mantissas & !(mantissas >> (random % 4)),
        ),
        _ => (exponents / 2 - 3 + (random >> 5) % 7, mantissa),
    };
    (h >> 6 & 1) << (exponent_bits + mantissa_bits) | exponent << mantissa_bits | mantissa
}

/// One element's bytes, the value in the low bits.
fn element(dtype: DType, h: u64) -> u64 {
    match dtype {
        DType::F32 => float_bits(h, 8, 23),
        DType::F64 => float_bits(h, 11, 52),
        DType::F16 => float_bits(h, 5, 10),
        DType::BF16 => float_bits(h, 8, 7),
        _ => h.rotate_right(7),
    }
}

/// A row of elements that differ by position, rank and round.
pub fn row(dtype: DType, count: usize, rank: usize, round: usize) -> Vec<u8> {
    (0..count)
        .flat_map(|i| {
            let bits = element(dtype, mix(i, rank, round));
            bits.to_le_bytes()[..dtype.size()].to_vec()
        })
        .collect()
}

/// An element as an unsigned number of its size.
pub fn bits_at(dtype: DType, bytes: &[u8], i: usize) -> u64 {
    let size = dtype.size();
    let mut word = [0; 8];
    word[..size].copy_from_slice(&bytes[i * size..][..size]);
    u64::from_le_bytes(word)
}

/// A float element's value; exact, as `f64` holds them all.
fn value(dtype: DType, bits: u64) -> f64 {
    match dtype {
        DType::F32 => f32::from_bits(bits as u32).into(),
        DType::F64 => f64::from_bits(bits),
        DType::F16 => f16::from_bits(bits as u16).to_f64_const(),
        DType::BF16 => bf16::from_bits(bits as u16).to_f64_const(),
        _ => unreachable!(),
    }
}

/// The 16-bit float nearest to `value`, found among all of them; `infinity` stands for the first
/// value that there is no number for.
pub fn nearest(dtype: DType, value: f64) -> u64 {
    static TABLES: OnceLock<[Vec<f64>; 2]> = OnceLock::new();
    let tables = TABLES.get_or_init(|| {
        let all = |dtype, infinity: u64, end: f64| {
            let finite = (0..infinity).map(|bits| self::value(dtype, bits));
            finite.chain([end]).collect()
        };
        [
            all(DType::F16, 0x7c00, 65536.0),
            all(DType::BF16, 0x7f80, 2f64.powi(128)),
        ]
    });
    let table = &tables[usize::from(dtype == DType::BF16)];
    let magnitude = value.abs();
    let sign = u64::from(value.is_sign_negative()) << 15;
    let above = table.partition_point(|v| *v < magnitude);
    let chosen = if above == 0 || above == table.len() {
        above.min(table.len() - 1)
    } else {
        let (down, up) = (magnitude - table[above - 1], table[above] - magnitude);
        match down.partial_cmp(&up) {
            Some(std::cmp::Ordering::Less) => above - 1,
            Some(std::cmp::Ordering::Greater) => above,
            _ => above & !1,
        }
    };
    sign | chosen as u64
}

macro_rules! float_oracle {
    ($name:ident, $t:ty) => {
        /// Each step of the contract, rounded in the accumulation type.
        fn $name(op: Op, values: &[f64], ranks: u32, fin: &Finish, held: f64) -> f64 {
            let step = |a: $t, b: $t| match op {
                Op::Sum | Op::Avg => a + b,
                Op::Prod => a * b,
                _ if a.is_nan() || b.is_nan() => <$t>::NAN,
                Op::Min if b.total_cmp(&a).is_lt() => b,
                Op::Max if b.total_cmp(&a).is_gt() => b,
                Op::Min | Op::Max => a,
            };
            let mut acc = values.iter().map(|v| *v as $t).reduce(step).unwrap();
            if op == Op::Avg {
                acc /= ranks as $t;
            }
            if fin.scale != 1.0 {
                acc *= fin.scale as $t;
            }
            if fin.accumulate {
                acc += held as $t;
            }
            f64::from(acc)
        }
    };
}
float_oracle!(oracle_f32, f32);
float_oracle!(oracle_f64, f64);

fn integer_oracle(dtype: DType, op: Op, values: &[u64], fin: &Finish, held: u64) -> u64 {
    let bits = 8 * dtype.size() as u32;
    let signed = |v: u64| match dtype {
        DType::U8 => (v & 0xff) as i64,
        _ => (v as i64) << (64 - bits) >> (64 - bits),
    };
    let step = |a: i64, b: i64| match op {
        Op::Sum | Op::Avg => a.wrapping_add(b),
        Op::Prod => a.wrapping_mul(b),
        Op::Min => a.min(b),
        Op::Max => a.max(b),
    };
    let acc = values.iter().map(|v| signed(*v)).reduce(step).unwrap();
    if fin.accumulate {
        held.wrapping_add(acc as u64)
    } else {
        acc as u64
    }
}

/// What `reduce` must write, element by element, over an output that holds `held`.
pub fn oracle(
    dtype: DType,
    op: Op,
    rows: &[Vec<u8>],
    ranks: u32,
    fin: &Finish,
    held: &[u8],
) -> Vec<u8> {
    let average = op == Op::Avg && ranks != 1;
    let copy = rows.len() == 1 && !average && *fin == Finish::plain(dtype);
    let wide = dtype == DType::F64 || fin.output == DType::F64;
    let mut out = Vec::with_capacity(held.len());
    for i in 0..rows[0].len() / dtype.size() {
        let sources: Vec<u64> = rows.iter().map(|r| bits_at(dtype, r, i)).collect();
        let before = bits_at(fin.output, held, i);
        let bits = if copy {
            sources[0]
        } else if !dtype.is_float() {
            integer_oracle(dtype, op, &sources, fin, before)
        } else {
            let values: Vec<f64> = sources.iter().map(|b| value(dtype, *b)).collect();
            let scalar = if wide { oracle_f64 } else { oracle_f32 };
            let result = scalar(op, &values, ranks, fin, value(fin.output, before));
            match fin.output {
                DType::F32 if result.is_nan() => 0x7fc0_0000,
                DType::F64 if result.is_nan() => 0x7ff8_0000_0000_0000,
                DType::F16 if result.is_nan() => 0x7e00,
                DType::BF16 if result.is_nan() => 0x7fc0,
                DType::F32 => (result as f32).to_bits().into(),
                DType::F64 => result.to_bits(),
                dtype if wide => nearest(dtype, result),
                DType::F16 => f16::from_f32(result as f32).to_bits().into(),
                _ => bf16::from_f32(result as f32).to_bits().into(),
            }
        };
        out.extend_from_slice(&bits.to_le_bytes()[..fin.output.size()]);
    }
    out
}
