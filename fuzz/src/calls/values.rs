//! What ranks give and what must come out, worked out element by element from the header's words.
//!
//! Values are small whole numbers, so every order of additions gives the same bits; the last step
//! (average, scale, accumulate, round) follows the header to the letter.

use half::{bf16, f16};
use rsbucket::ffi::*;

pub fn width(dtype: u32) -> usize {
    [4, 8, 2, 2, 4, 8, 1, 1][dtype as usize - 1]
}

pub fn is_float(dtype: u32) -> bool {
    dtype <= RSB_DTYPE_BF16
}

/// What rank `from` gives to rank `to`, element `i`, in op `id`.
pub fn value(from: usize, to: usize, i: usize, id: usize) -> f64 {
    ((i * 7 + from * 3 + to * 5 + id * 11) % 5) as f64
}

/// A number in a dtype: rounded once.
pub fn write(dtype: u32, number: f64, out: &mut Vec<u8>) {
    match dtype {
        RSB_DTYPE_F32 => out.extend((number as f32).to_ne_bytes()),
        RSB_DTYPE_F64 => out.extend(number.to_ne_bytes()),
        RSB_DTYPE_F16 => out.extend(f16::from_f64(number).to_ne_bytes()),
        RSB_DTYPE_BF16 => out.extend(bf16::from_f64(number).to_ne_bytes()),
        RSB_DTYPE_I32 => out.extend((number as i32).to_ne_bytes()),
        RSB_DTYPE_I64 => out.extend((number as i64).to_ne_bytes()),
        _ => out.push(number as i64 as u8),
    }
}

fn read(dtype: u32, bytes: &[u8]) -> f64 {
    match dtype {
        RSB_DTYPE_F32 => f32::from_ne_bytes(bytes.try_into().unwrap()).into(),
        RSB_DTYPE_F64 => f64::from_ne_bytes(bytes.try_into().unwrap()),
        RSB_DTYPE_F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).into(),
        RSB_DTYPE_BF16 => bf16::from_ne_bytes(bytes.try_into().unwrap()).into(),
        RSB_DTYPE_I32 => i32::from_ne_bytes(bytes.try_into().unwrap()).into(),
        RSB_DTYPE_I64 => i64::from_ne_bytes(bytes.try_into().unwrap()) as f64,
        RSB_DTYPE_I8 => (bytes[0] as i8).into(),
        _ => bytes[0].into(),
    }
}

/// The numbers of all ranks, combined.
pub fn combine(op: u32, numbers: impl Iterator<Item = f64>) -> f64 {
    let step = |a: f64, b: f64| match op {
        RSB_OP_MIN => a.min(b),
        RSB_OP_MAX => a.max(b),
        RSB_OP_PROD => a * b,
        _ => a + b,
    };
    numbers.reduce(step).unwrap_or(0.0)
}

/// A row combined with itself as often as there are ranks.
pub fn reduce(dtype: u32, op: u32, row: &[u8], size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for element in row.chunks(width(dtype)) {
        let number = read(dtype, element);
        write(
            dtype,
            combine(op, std::iter::repeat_n(number, size)),
            &mut out,
        );
    }
    out
}

/// The last step of one element, as `rsb_submit_args.scale` describes it.
pub fn finish(args: &rsb_submit_args, size: usize, sum: f64, held: f64) -> f64 {
    let output = if args.output_dtype == 0 {
        args.dtype
    } else {
        args.output_dtype
    };
    let scale = if args.scale == 0.0 { 1.0 } else { args.scale };
    let add = args.flags & RSB_SUBMIT_ACCUMULATE != 0;
    if args.dtype == RSB_DTYPE_F64 || output == RSB_DTYPE_F64 || !is_float(args.dtype) {
        let mean = if args.op == RSB_OP_AVG {
            sum / size as f64
        } else {
            sum
        };
        let scaled = mean * scale;
        return if add { held + scaled } else { scaled };
    }
    let (sum, held, scale) = (sum as f32, held as f32, scale as f32);
    let mean = if args.op == RSB_OP_AVG {
        sum / size as f32
    } else {
        sum
    };
    let scaled = mean * scale;
    f64::from(if add { held + scaled } else { scaled })
}
