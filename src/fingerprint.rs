//! What a rank has asked of a comm so far, in 128 bits, so that ranks can compare at no cost.
//!
//! Each call of the contract's rule 1 extends a chained hash. Chains that differ once stay
//! different, so one comparison whenever ranks meet covers everything before it. The mixing step is
//! the folded 64 x 64 to 128 bit multiplication of wyhash (Wang Yi, public domain).

use crate::dtype::{DType, Op};

/// Whether ranks check each other: always. `bench/check_cost` builds a library that does not, with
/// `--cfg rsbucket_unchecked`, to measure what the check costs; such a build is for nothing else.
pub const CHECKED: bool = !cfg!(rsbucket_unchecked);

/// The kinds of call that take a place in a comm's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CallKind {
    /// A submit.
    Submit = 1,
    /// A launch that found something open.
    Launch = 2,
    /// A flush that found something open.
    Flush = 3,
    /// An all-gather.
    AllGather = 4,
}

/// Five words: all that ranks must agree on about one call.
pub type Words = [u64; 5];

/// One call, as every rank must make it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Call {
    /// What was called.
    pub kind: CallKind,
    /// Whether the input is one flat tensor.
    pub flat: bool,
    /// Element type and operation of a submit.
    pub types: Option<(DType, Op)>,
    /// The bucketer's number on this comm, counted by first use.
    pub ordinal: u32,
    /// Its bucket size; `u64::MAX`: no bucketing.
    pub bucket_bytes: u64,
    /// The caller's name for the tensor; 0: none.
    pub tag: u64,
    /// Elements as submitted, or bytes of an all-gather.
    pub numel: u64,
    /// The factor.
    pub scale: f64,
}

impl Call {
    /// A call without a tensor.
    pub fn bare(kind: CallKind, ordinal: u32, bucket_bytes: u64, numel: u64) -> Call {
        Call {
            kind,
            flat: false,
            types: None,
            ordinal,
            bucket_bytes,
            tag: 0,
            numel,
            scale: 1.0,
        }
    }

    /// The words that are hashed and, on a mismatch, compared field by field.
    pub fn words(&self) -> Words {
        let (dtype, op) = self.types.map_or((0, 0), |(d, o)| (d as u64, o as u64));
        let head = self.kind as u64
            | (self.flat as u64) << 8
            | dtype << 16
            | op << 24
            | u64::from(self.ordinal) << 32;
        [
            head,
            self.tag,
            self.numel,
            self.scale.to_bits(),
            self.bucket_bytes,
        ]
    }
}

/// The names and values of the fields of a call, in the order in which a difference is reported.
pub fn fields(words: &Words) -> [(&'static str, String); 9] {
    let byte = |shift: u32| (words[0] >> shift) as u8;
    let kind = match byte(0) {
        1 => "submit",
        2 => "launch",
        3 => "flush",
        4 => "all_gather",
        _ => "nothing",
    };
    let dtype = DType::from_code(byte(16).into()).map_or("none", DType::name);
    let op = Op::from_code(byte(24).into()).map_or("none", Op::name);
    let bucket = match words[4] {
        u64::MAX => "off".to_string(),
        bytes => bytes.to_string(),
    };
    [
        ("call", kind.to_string()),
        ("tag", words[1].to_string()),
        (
            if kind == "all_gather" {
                "bytes"
            } else {
                "numel"
            },
            words[2].to_string(),
        ),
        ("dtype", dtype.to_string()),
        ("op", op.to_string()),
        ("scale", f64::from_bits(words[3]).to_string()),
        (
            "form",
            if byte(8) == 1 { "flat" } else { "inputs" }.to_string(),
        ),
        ("bucketer", (words[0] >> 32).to_string()),
        ("bucket_bytes", bucket),
    ]
}

/// The chained fingerprint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chain {
    /// Lower half.
    pub lo: u64,
    /// Upper half.
    pub hi: u64,
    /// Calls in it.
    pub calls: u64,
}

const K: [u64; 4] = [
    0xa076_1d64_78bd_642f,
    0xe703_7ed1_a0b4_28db,
    0x8ebc_6af0_9c88_c6e3,
    0x5899_65cc_7537_4cc3,
];

#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b);
    (wide >> 64) as u64 ^ wide as u64
}

impl PartialEq for Chain {
    #[inline]
    fn eq(&self, other: &Chain) -> bool {
        !CHECKED || (self.lo, self.hi, self.calls) == (other.lo, other.hi, other.calls)
    }
}

impl Chain {
    /// Takes one more call in.
    #[inline]
    pub fn extend(&mut self, w: &Words) {
        if !CHECKED {
            return;
        }
        let x = fold(w[0] ^ self.lo ^ K[0], w[1] ^ K[1]);
        let y = fold(w[2] ^ self.hi ^ K[2], w[3] ^ w[4].rotate_left(32) ^ K[3]);
        // The old halves enter by an invertible step: a difference cannot be folded away.
        self.lo = self.lo.wrapping_mul(K[1]).wrapping_add(x).rotate_left(23) ^ y;
        self.hi = self.hi.wrapping_mul(K[3]).wrapping_add(y).rotate_left(41) ^ x;
        self.calls += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submit(tag: u64, numel: u64) -> Call {
        Call {
            kind: CallKind::Submit,
            flat: false,
            types: Some((DType::F32, Op::Sum)),
            ordinal: 0,
            bucket_bytes: 25 << 20,
            tag,
            numel,
            scale: 1.0,
        }
    }

    fn of(calls: &[Call]) -> Chain {
        let mut chain = Chain::default();
        for call in calls {
            chain.extend(&call.words());
        }
        chain
    }

    #[test]
    fn every_field_and_the_order_count() {
        let base = submit(7, 100);
        let others = [
            Call {
                kind: CallKind::Flush,
                ..base
            },
            Call { flat: true, ..base },
            Call {
                types: Some((DType::F16, Op::Sum)),
                ..base
            },
            Call {
                types: Some((DType::F32, Op::Max)),
                ..base
            },
            Call { ordinal: 1, ..base },
            Call {
                bucket_bytes: u64::MAX,
                ..base
            },
            Call { tag: 8, ..base },
            Call { numel: 101, ..base },
            Call { scale: 0.5, ..base },
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(of(&[base]), of(&[*other]), "variant {i}");
            let names = fields(&base.words());
            let differing = fields(&other.words());
            assert_eq!(
                names.iter().zip(&differing).filter(|(a, b)| a != b).count(),
                1,
                "variant {i}"
            );
            // A difference stays, whatever follows.
            let tail: Vec<Call> = (0..50).map(|k| submit(k, k * 3)).collect();
            let with = |first: Call| of(&[&[first], tail.as_slice()].concat());
            assert_ne!(
                (with(base).lo, with(base).hi),
                (with(*other).lo, with(*other).hi)
            );
        }
        assert_ne!(
            of(&[submit(1, 5), submit(2, 5)]),
            of(&[submit(2, 5), submit(1, 5)])
        );
    }
}
