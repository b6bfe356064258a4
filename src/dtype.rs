//! Element types and reduction operations, and which of them go together.

use crate::error::{unsupported, Result};

/// The type of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary64.
    F64 = 2,
    /// IEEE 754 binary16.
    F16 = 3,
    /// The upper half of a binary32.
    BF16 = 4,
    /// Two's complement, 32 bits.
    I32 = 5,
    /// Two's complement, 64 bits.
    I64 = 6,
    /// Unsigned byte.
    U8 = 7,
    /// Two's complement byte.
    I8 = 8,
}

impl DType {
    /// Every element type, by number, which begins at 1.
    pub const ALL: [DType; 8] = [
        DType::F32,
        DType::F64,
        DType::F16,
        DType::BF16,
        DType::I32,
        DType::I64,
        DType::U8,
        DType::I8,
    ];

    /// The element type with this number, as C gives it.
    pub fn from_code(code: u32) -> Option<DType> {
        DType::ALL.get((code as usize).wrapping_sub(1)).copied()
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 | DType::I8 => 1,
        }
    }

    /// The base-2 logarithm of `size`.
    pub const fn shift(self) -> u32 {
        self.size().trailing_zeros()
    }

    /// Whether it is a floating-point type.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
    }

    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F64 => "F64",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I32 => "I32",
            DType::I64 => "I64",
            DType::U8 => "U8",
            DType::I8 => "I8",
        }
    }
}

/// What a reduction does with the values of the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Their sum.
    Sum = 1,
    /// Their sum divided by the number of ranks; floats only.
    Avg = 2,
    /// The least; NaN if any is NaN.
    Min = 3,
    /// The greatest; NaN if any is NaN.
    Max = 4,
    /// Their product.
    Prod = 5,
}

impl Op {
    /// Every operation, by number, which begins at 1.
    pub const ALL: [Op; 5] = [Op::Sum, Op::Avg, Op::Min, Op::Max, Op::Prod];

    /// The operation with this number, as C gives it.
    pub fn from_code(code: u32) -> Option<Op> {
        Op::ALL.get((code as usize).wrapping_sub(1)).copied()
    }

    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Sum => "SUM",
            Op::Avg => "AVG",
            Op::Min => "MIN",
            Op::Max => "MAX",
            Op::Prod => "PROD",
        }
    }
}

/// The fused last step of a reduction: `acc / ranks` for AVG, `acc * scale`, `output + acc`, one
/// rounding to the output's type, in that order and each step rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finish {
    /// The factor; 1 leaves the value alone.
    pub scale: f64,
    /// The type of the result.
    pub output: DType,
    /// Whether the result is added to what the output holds.
    pub accumulate: bool,
}

impl Finish {
    /// The result as it is, in the input's type.
    pub const fn plain(dtype: DType) -> Finish {
        Finish {
            scale: 1.0,
            output: dtype,
            accumulate: false,
        }
    }
}

/// Whether `op`, `scale` and `output` may be asked of `dtype`.
pub fn check_rules(dtype: DType, op: Op, finish: &Finish) -> Result<()> {
    if op == Op::Avg && !dtype.is_float() {
        return Err(unsupported!(
            "op: AVG of {} would have to round; expected a float dtype, or SUM",
            dtype.name()
        ));
    }
    if finish.output != dtype && !(dtype.is_float() && finish.output.is_float()) {
        return Err(unsupported!(
            "output_dtype: {} from {}; expected 0, the same dtype, or float to float",
            finish.output.name(),
            dtype.name()
        ));
    }
    if finish.scale != 1.0 && !dtype.is_float() {
        return Err(unsupported!(
            "scale: {} with {}; expected 0 or 1 for integers",
            finish.scale,
            dtype.name()
        ));
    }
    Ok(())
}
