//! Element types and operations as C numbers, checked against `crate::dtype` when this file
//! compiles.
//!
//! # Element types and operations
//!
//! How results are computed. Local and shm comms, and every comm with RSB_COMM_EXACT, reduce in
//! rank order 0..size-1, F16 and BF16 in f32 with one rounding at the end: the same bits for every
//! bucket size, run and transport. Elsewhere the engine's own order and accumulation hold. Integers
//! wrap. rsb_submit_args.scale says how scaling, accumulating and converting join in.

use crate::dtype::{DType, Op};

/// The type of an element: one of RSB_DTYPE_. Other numbers are refused (RSB_ERR_UNSUPPORTED).
pub type rsb_dtype = u32;

/// IEEE 754 binary32, 4 bytes.
pub const RSB_DTYPE_F32: rsb_dtype = 1u32;
/// IEEE 754 binary64, 8 bytes.
pub const RSB_DTYPE_F64: rsb_dtype = 2u32;
/// IEEE 754 binary16, 2 bytes.
pub const RSB_DTYPE_F16: rsb_dtype = 3u32;
/// bfloat16, the upper half of a binary32, 2 bytes.
pub const RSB_DTYPE_BF16: rsb_dtype = 4u32;
/// int32_t, 4 bytes.
pub const RSB_DTYPE_I32: rsb_dtype = 5u32;
/// int64_t, 8 bytes.
pub const RSB_DTYPE_I64: rsb_dtype = 6u32;
/// uint8_t, 1 byte.
pub const RSB_DTYPE_U8: rsb_dtype = 7u32;
/// int8_t, 1 byte.
pub const RSB_DTYPE_I8: rsb_dtype = 8u32;

/// Bytes of one element; 0 for a number that is no dtype. Any thread; never blocks.
#[no_mangle]
pub unsafe extern "C" fn rsb_dtype_size(dtype: rsb_dtype) -> usize {
    DType::from_code(dtype).map_or(0, DType::size)
}

// ## Operations

/// What a reduction does with the values of the ranks: one of RSB_OP_. Other numbers are refused
/// (RSB_ERR_UNSUPPORTED).
pub type rsb_op = u32;

/// The sum.
pub const RSB_OP_SUM: rsb_op = 1u32;
/// The sum, then / size in f32 (F64: in f64). Float types only.
pub const RSB_OP_AVG: rsb_op = 2u32;
/// The least value; NaN in any rank gives NaN.
pub const RSB_OP_MIN: rsb_op = 3u32;
/// The greatest value; NaN in any rank gives NaN.
pub const RSB_OP_MAX: rsb_op = 4u32;
/// The product.
pub const RSB_OP_PROD: rsb_op = 5u32;

const _: () = {
    const DTYPES: [rsb_dtype; DType::ALL.len()] = [
        RSB_DTYPE_F32,
        RSB_DTYPE_F64,
        RSB_DTYPE_F16,
        RSB_DTYPE_BF16,
        RSB_DTYPE_I32,
        RSB_DTYPE_I64,
        RSB_DTYPE_U8,
        RSB_DTYPE_I8,
    ];
    const OPS: [rsb_op; Op::ALL.len()] =
        [RSB_OP_SUM, RSB_OP_AVG, RSB_OP_MIN, RSB_OP_MAX, RSB_OP_PROD];
    let mut i = 0;
    while i < DTYPES.len() {
        assert!(DTYPES[i] == DType::ALL[i] as u32);
        i += 1;
    }
    i = 0;
    while i < OPS.len() {
        assert!(OPS[i] == Op::ALL[i] as u32);
        i += 1;
    }
};
