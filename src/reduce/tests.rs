//! The kernels of every instruction set of this CPU against a scalar oracle, bit for bit, and the
//! conversions against the `half` crate and against a search among all 16-bit values.

use super::float::{Bf16, F16};
use super::{tables, Reduction, Table};
use crate::dtype::{check_rules, DType, Finish, Op};
use half::{bf16, f16};
use oracle::{bits_at, mix, nearest, oracle, row};

mod oracle;

const SOURCES: [usize; 6] = [1, 2, 3, 4, 7, 8];
const CANARY: u8 = 0xa5;

/// One call with its rows and its output at odd addresses, `count` elements of longer rows.
struct Case<'a> {
    dtype: DType,
    op: Op,
    rows: &'a [Vec<u8>],
    ranks: u32,
    fin: Finish,
    held: &'a [u8],
}

impl Case<'_> {
    /// Runs it with every instruction set and compares with the start of `expected`.
    fn check(&self, count: usize, shift: usize, expected: &[u8]) {
        let size = self.fin.output.size();
        let rows: Vec<Vec<u8>> = self
            .rows
            .iter()
            .enumerate()
            .map(|(r, row)| [&vec![0; (shift + r) % 9], &row[..count * self.dtype.size()]].concat())
            .collect();
        let srcs: Vec<*const u8> = rows
            .iter()
            .enumerate()
            .map(|(r, row)| row[(shift + r) % 9..].as_ptr())
            .collect();
        let ways = [false, true].map(|past| tables().into_iter().map(move |t| (past, t)));
        for (past, (level, table)) in ways.into_iter().flatten() {
            let mut out = vec![CANARY; count * size + 256];
            // Past the caches only whole lines are written: half of the cases begin on one.
            let odd = match past {
                true => shift % 2 * 4,
                false => (shift * 5 + 1) % 8,
            };
            let before = out.as_ptr().align_offset(64) + 64 + odd;
            out[before..before + count * size].copy_from_slice(&self.held[..count * size]);
            self.run((table, past), &srcs, count, out[before..].as_mut_ptr());
            let (front, rest) = out.split_at(before);
            let (result, back) = rest.split_at(count * size);
            self.compare(level, result, &expected[..count * size]);
            assert!(
                front.iter().chain(back).all(|b| *b == CANARY),
                "{level}: wrote outside"
            );
        }
    }

    fn run(&self, (table, past): (Table, bool), srcs: &[*const u8], count: usize, dst: *mut u8) {
        let mut reduction = Reduction::with(table, self.dtype, self.op, self.ranks);
        reduction.write_past(past);
        // SAFETY: the rows and the output were made for `count` elements, the table is this CPU's.
        unsafe { reduction.rows(srcs, count, &self.fin, dst) }
    }

    fn compare(&self, level: &str, result: &[u8], expected: &[u8]) {
        let Some(byte) = result.iter().zip(expected).position(|(a, b)| a != b) else {
            assert_eq!(result.len(), expected.len());
            return;
        };
        let i = byte / self.fin.output.size();
        let sources: Vec<String> = self
            .rows
            .iter()
            .map(|r| format!("{:#x}", bits_at(self.dtype, r, i)))
            .collect();
        panic!(
            "{level}: {} of {} {sources:?}, {:?}, ranks {}, element {i} of {}: {:#x}, expected {:#x}",
            self.op.name(),
            self.dtype.name(),
            self.fin,
            self.ranks,
            result.len() / self.fin.output.size(),
            bits_at(self.fin.output, result, i),
            bits_at(self.fin.output, expected, i),
        );
    }
}

/// Every finish that may be asked: outputs, with and without scale and accumulation.
fn finishes(dtype: DType, op: Op) -> Vec<Finish> {
    let mut all = Vec::new();
    for output in DType::ALL {
        for scale in [1.0, 0.3, -1024.5] {
            for accumulate in [false, true] {
                let fin = Finish {
                    scale,
                    output,
                    accumulate,
                };
                if check_rules(dtype, op, &fin).is_ok() {
                    all.push(fin);
                }
            }
        }
    }
    all
}

#[test]
fn every_combination_matches_the_oracle() {
    const LONGEST: usize = 330;
    let mut round = 0;
    for dtype in DType::ALL {
        for n in SOURCES {
            let rows: Vec<_> = (0..n).map(|r| row(dtype, LONGEST, r, n)).collect();
            for op in Op::ALL {
                for fin in finishes(dtype, op) {
                    round += 1;
                    let held = row(fin.output, LONGEST, 99, round);
                    let ranks = n as u32;
                    let expected = oracle(dtype, op, &rows, ranks, &fin, &held);
                    let case = Case {
                        dtype,
                        op,
                        rows: &rows,
                        ranks,
                        fin,
                        held: &held,
                    };
                    for count in [LONGEST, round * 7 % 201, round * 11 % 67] {
                        case.check(count, round, &expected);
                    }
                }
            }
        }
    }
}

#[test]
fn every_length_and_the_block_edges() {
    let edges = [
        255, 256, 257, 319, 320, 321, 511, 512, 513, 1023, 1025, 4095, 4097, 4999, 5000,
    ];
    let pairs = DType::ALL.map(|d| (d, d));
    let mixed = [
        (DType::BF16, DType::F32),
        (DType::F32, DType::F16),
        (DType::F64, DType::BF16),
    ];
    for (dtype, output) in pairs.into_iter().chain(mixed) {
        let rows: Vec<_> = (0..3).map(|r| row(dtype, 5000, r, 5)).collect();
        for accumulate in [false, true] {
            let fin = Finish {
                scale: 1.0,
                output,
                accumulate,
            };
            let held = row(output, 5000, 77, 6);
            let expected = oracle(dtype, Op::Sum, &rows, 3, &fin, &held);
            let case = Case {
                dtype,
                op: Op::Sum,
                rows: &rows,
                ranks: 3,
                fin,
                held: &held,
            };
            for count in (0..=200).chain(edges) {
                case.check(count, count, &expected);
            }
        }
    }
}

#[test]
fn the_output_may_be_any_of_the_rows() {
    for (k, dtype) in DType::ALL.into_iter().enumerate() {
        for n in [1, 2, 3, 5] {
            for accumulate in [false, true] {
                let (op, count) = (Op::ALL[[0, 2, 3, 4][(n + k) % 4]], 300 + 37 * n);
                let rows: Vec<_> = (0..n).map(|r| row(dtype, count, r, 11)).collect();
                let fin = Finish {
                    accumulate,
                    ..Finish::plain(dtype)
                };
                for own in 0..n {
                    let held = &rows[own];
                    let expected = oracle(dtype, op, &rows, n as u32, &fin, held);
                    let case = Case {
                        dtype,
                        op,
                        rows: &rows,
                        ranks: n as u32,
                        fin,
                        held,
                    };
                    for (level, table) in tables() {
                        let mut buffers = rows.clone();
                        let dst = buffers[own].as_mut_ptr();
                        let mut srcs: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr()).collect();
                        srcs[own] = dst;
                        case.run((table, own % 2 == 1), &srcs, count, dst);
                        case.compare(level, &buffers[own], &expected);
                        let others = (0..n).filter(|r| *r != own);
                        others.for_each(|r| assert_eq!(buffers[r], rows[r], "{level}: row {r}"));
                    }
                }
            }
        }
    }
}

#[test]
fn rows_that_an_engine_has_summed_are_divided_by_the_ranks() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for ranks in [1, 2, 3, 8, 10, 1 << 20, 1_000_003] {
            let rows = [row(dtype, 400, 0, ranks as usize)];
            let held = row(dtype, 400, 1, ranks as usize);
            let fin = Finish::plain(dtype);
            let expected = oracle(dtype, Op::Avg, &rows, ranks, &fin, &held);
            let case = Case {
                dtype,
                op: Op::Avg,
                rows: &rows,
                ranks,
                fin,
                held: &held,
            };
            case.check(400, 3, &expected);
        }
    }
}

/// Reduces rows of bit patterns through the public entry.
fn reduce_bits(dtype: DType, op: Op, rows: &[Vec<u64>], output: DType) -> Vec<u64> {
    let size = dtype.size();
    let bytes = |row: &Vec<u64>| {
        row.iter()
            .flat_map(|b| b.to_le_bytes()[..size].to_vec())
            .collect()
    };
    let rows: Vec<Vec<u8>> = rows.iter().map(bytes).collect();
    let srcs: Vec<*const u8> = rows.iter().map(|r| r.as_ptr()).collect();
    let count = rows[0].len() / size;
    let mut out = vec![0; count * output.size()];
    let fin = Finish {
        output,
        ..Finish::plain(dtype)
    };
    // SAFETY: rows and output have `count` elements.
    unsafe {
        Reduction::new(dtype, op, rows.len() as u32).rows(&srcs, count, &fin, out.as_mut_ptr())
    };
    (0..count).map(|i| bits_at(output, &out, i)).collect()
}

#[test]
fn min_and_max_order_zeros_and_keep_nans() {
    // For each type: the sign, one, a signalling NaN, the canonical NaN.
    for (dtype, sign, one, signalling, nan) in [
        (DType::F32, 1 << 31, 0x3f80_0000, 0x7f80_0001, 0x7fc0_0000),
        (
            DType::F64,
            1 << 63,
            0x3ff0 << 48,
            (0x7ff0 << 48) + 1,
            0x7ff8 << 48,
        ),
        (DType::F16, 1 << 15, 0x3c00, 0x7c01, 0x7e00),
        (DType::BF16, 1 << 15, 0x3f80, 0x7f81, 0x7fc0),
    ] {
        let left = vec![
            0,
            sign,
            0,
            sign,
            one,
            signalling,
            nan | sign,
            signalling | sign,
        ];
        let right = vec![sign, 0, 0, sign, signalling, one, one | sign, nan | 1];
        let rows = [left, right];
        let least = [sign, sign, 0, sign, nan, nan, nan, nan];
        let greatest = [0, 0, 0, sign, nan, nan, nan, nan];
        assert_eq!(
            reduce_bits(dtype, Op::Min, &rows, dtype),
            least,
            "{}",
            dtype.name()
        );
        assert_eq!(
            reduce_bits(dtype, Op::Max, &rows, dtype),
            greatest,
            "{}",
            dtype.name()
        );
        // One row with nothing to do is copied, whatever its bits say.
        let odd = vec![signalling, signalling | sign, nan | 1, sign];
        assert_eq!(
            reduce_bits(dtype, Op::Avg, std::slice::from_ref(&odd), dtype),
            odd,
            "{}",
            dtype.name()
        );
    }
}

#[test]
fn all_16_bit_values_survive_a_round_trip() {
    for bits in 0..=u16::MAX {
        let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
        let (ours_h, ours_b) = (F16(bits).to_f32(), Bf16(bits).to_f32());
        if h.is_nan() {
            assert!(
                ours_h.is_nan() && F16::from_f32(ours_h) == F16(0x7e00),
                "{bits:#x}"
            );
        } else {
            assert_eq!(ours_h.to_bits(), h.to_f32().to_bits(), "{bits:#x}");
            assert_eq!(F16::from_f32(ours_h), F16(bits));
            assert_eq!(F16::from_f64(ours_h.into()), F16(bits));
        }
        if b.is_nan() {
            assert!(
                ours_b.is_nan() && Bf16::from_f32(ours_b) == Bf16(0x7fc0),
                "{bits:#x}"
            );
        } else {
            assert_eq!(ours_b.to_bits(), b.to_f32().to_bits(), "{bits:#x}");
            assert_eq!(Bf16::from_f32(ours_b), Bf16(bits));
            assert_eq!(Bf16::from_f64(ours_b.into()), Bf16(bits));
        }
    }
    let all: Vec<u64> = (0..=u64::from(u16::MAX)).collect();
    for (level, table) in tables() {
        let bytes: Vec<u8> = all.iter().flat_map(|b| (*b as u16).to_le_bytes()).collect();
        let (mut wide, mut back) = (vec![0u8; 4 << 16], vec![0u8; 2 << 16]);
        let call = |dtype, src: &[u8], output, dst: &mut [u8]| {
            let (rows, fin) = (
                [src.as_ptr()],
                Finish {
                    output,
                    ..Finish::plain(dtype)
                },
            );
            // SAFETY: all of them have 65536 elements.
            unsafe {
                Reduction::with(table, dtype, Op::Sum, 1).rows(
                    &rows,
                    1 << 16,
                    &fin,
                    dst.as_mut_ptr(),
                )
            }
        };
        call(DType::F16, &bytes, DType::F32, &mut wide);
        call(DType::F32, &wide, DType::F16, &mut back);
        for bits in &all {
            let back = bits_at(DType::F16, &back, *bits as usize);
            let nan = f16::from_bits(*bits as u16).is_nan();
            assert_eq!(back, if nan { 0x7e00 } else { *bits }, "{level}");
        }
    }
}

#[test]
fn narrowing_rounds_once_to_nearest_even() {
    // Steps through all exponents and signs, and the neighbourhood of every tie and every value.
    let mut patterns: Vec<u32> = (0..1u32 << 20)
        .map(|i| i << 12 | mix(i as usize, 0, 0) as u32 & 0xfff)
        .collect();
    for bits in 0..=u16::MAX {
        let h = f16::from_bits(bits);
        // Twice the step from here to the next: half of it is added below.
        let tie = (h.to_f32() + f16::from_bits(bits.wrapping_add(1)).to_f32()) / 2.0;
        let near = [
            h.to_f32().to_bits(),
            tie.to_bits(),
            u32::from(bits) << 16,
            u32::from(bits) << 16 | 0x8000,
        ];
        patterns.extend(
            near.iter()
                .flat_map(|b| [b.wrapping_sub(1), *b, b.wrapping_add(1)]),
        );
    }
    for bits in &patterns {
        let v = f32::from_bits(*bits);
        let (h, b) = if v.is_nan() {
            (0x7e00, 0x7fc0)
        } else {
            (f16::from_f32(v).to_bits(), bf16::from_f32(v).to_bits())
        };
        assert_eq!(
            (F16::from_f32(v).0, Bf16::from_f32(v).0),
            (h, b),
            "{bits:#x}"
        );
        // From f64, a hair to either side of a tie decides.
        for wide in [
            f64::from(v),
            f64::from(v).next_up(),
            f64::from(v).next_down(),
        ] {
            if bits & 0xfff == 0 && !v.is_nan() {
                let (h, b) = (nearest(DType::F16, wide), nearest(DType::BF16, wide));
                let ours = (F16::from_f64(wide).0.into(), Bf16::from_f64(wide).0.into());
                assert_eq!(ours, (h, b), "{wide:e}");
            }
        }
    }
    // Every instruction set narrows as the functions do.
    let bytes: Vec<u8> = patterns.iter().flat_map(|b| b.to_le_bytes()).collect();
    for (level, table) in tables() {
        for output in [DType::F16, DType::BF16] {
            let mut out = vec![0u8; patterns.len() * 2];
            let fin = Finish {
                output,
                ..Finish::plain(DType::F32)
            };
            let (srcs, count, dst) = ([bytes.as_ptr()], patterns.len(), out.as_mut_ptr());
            // SAFETY: the row and the output have `count` elements.
            unsafe { Reduction::with(table, DType::F32, Op::Sum, 1).rows(&srcs, count, &fin, dst) };
            for (i, bits) in patterns.iter().enumerate() {
                let v = f32::from_bits(*bits);
                let ours = if output == DType::F16 {
                    F16::from_f32(v).0
                } else {
                    Bf16::from_f32(v).0
                };
                assert_eq!(
                    bits_at(output, &out, i),
                    u64::from(ours),
                    "{level}: {bits:#x}"
                );
            }
        }
    }
}

/// A host program that flushes subnormals and rounds upwards gets the same bits, and its setting back.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_float_environment_of_the_caller_does_not_matter() {
    use std::arch::asm;
    let rows = [
        vec![0x0000_0001, 0x3f80_0000, 0x0070_0000],
        vec![0x0000_0003, 0x3380_0000, 0x8000_0001],
    ];
    let expected = reduce_bits(DType::F32, Op::Sum, &rows, DType::F32);
    assert_eq!(expected, [0x0000_0004, 0x3f80_0000, 0x006f_ffff]);
    // Flush to zero, round up, subnormals are zeros; all exceptions masked.
    let (mut before, host, mut after) = (0u32, 0x8000u32 | 0x4000 | 0x40 | 0x1f80, 0u32);
    // SAFETY: the thread's own control register is read, set, and put back below.
    unsafe { asm!("stmxcsr [{}]", "ldmxcsr [{}]", in(reg) &mut before, in(reg) &host) };
    let seen = reduce_bits(DType::F32, Op::Sum, &rows, DType::F32);
    // SAFETY: as above.
    unsafe { asm!("stmxcsr [{}]", "ldmxcsr [{}]", in(reg) &mut after, in(reg) &before) };
    assert_eq!(seen, expected);
    assert_eq!(after & !0x3f, host);
}

/// Rows and output that end where the mapped memory ends: one byte more, read or written, is a crash.
#[cfg(unix)]
#[test]
fn nothing_past_the_end_is_touched() {
    const PAGE: usize = 65536;
    /// The end of a page that a page without any access follows.
    fn end_of_memory() -> *mut u8 {
        let (all, anonymous) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANON);
        // SAFETY: a fresh mapping of two pages, of which the second is closed; it is never unmapped.
        unsafe {
            let flags = libc::MAP_PRIVATE | anonymous;
            let base = libc::mmap(std::ptr::null_mut(), 2 * PAGE, all, flags, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            let end = base.cast::<u8>().add(PAGE);
            assert_eq!(libc::mprotect(end.cast(), PAGE, libc::PROT_NONE), 0);
            end
        }
    }
    let (sources, target) = ([end_of_memory(), end_of_memory()], end_of_memory());
    for dtype in DType::ALL {
        let output = if dtype == DType::BF16 {
            DType::F32
        } else {
            dtype
        };
        let fin = Finish {
            output,
            scale: 1.0,
            accumulate: true,
        };
        for count in [1, 2, 7, 31, 33, 63, 64, 65, 100, 255, 257, 300] {
            let rows: Vec<_> = (0..2).map(|r| row(dtype, count, r, count)).collect();
            let held = row(output, count, 2, count);
            let expected = oracle(dtype, Op::Sum, &rows, 2, &fin, &held);
            let case = Case {
                dtype,
                op: Op::Sum,
                rows: &rows,
                ranks: 2,
                fin,
                held: &held,
            };
            for (level, table) in tables() {
                // SAFETY: the page before each end has room for the row or the output.
                let result = unsafe {
                    let srcs = [0, 1].map(|r| sources[r].sub(rows[r].len()));
                    for (r, src) in srcs.iter().enumerate() {
                        src.copy_from(rows[r].as_ptr(), rows[r].len());
                    }
                    let dst = target.sub(held.len());
                    dst.copy_from(held.as_ptr(), held.len());
                    case.run(
                        (table, count % 2 == 1),
                        &srcs.map(|s| s.cast_const()),
                        count,
                        dst,
                    );
                    std::slice::from_raw_parts(dst, held.len())
                };
                case.compare(level, result, &expected);
            }
        }
    }
}
