//! Checks what a submit asks for, against its comm. Nothing has changed when it is refused.

use std::ffi::c_void;

use super::read::overlap;
use crate::bucketer::{Ask, Asks};
use crate::dtype::{check_rules, DType, Finish, Op};
use crate::error::{invalid, unsupported, Result};
use crate::ffi::{rsb_callback, rsb_submit_args, RSB_SUBMIT_ACCUMULATE, RSB_SUBMIT_BORROW};
use crate::lane::work::{Rows, Work};
use crate::lane::Endpoint;
use crate::layout::{flat_shard, shard_numel, total_bytes};

/// What comes back with a result: the callback and its first argument.
#[derive(Clone, Copy)]
pub struct Callback {
    /// The function; none: nobody wants to know.
    pub function: rsb_callback,
    /// Its first argument.
    pub user_data: *mut c_void,
}

// SAFETY: the pointer is only handed back; rule 3 says on which threads that happens.
unsafe impl Send for Callback {}

fn dtype_of(code: u32, name: &str) -> Result<DType> {
    DType::from_code(code)
        .ok_or_else(|| unsupported!("{name}: {code}; expected an RSB_DTYPE_, 1 to 8"))
}

/// What a submit was given, with pointers that keep the header's rules.
pub struct Asked<'a>(&'a rsb_submit_args);

impl<'a> Asked<'a> {
    /// # Safety
    /// With numel > 0, the arrays of `args` are as the header says.
    pub unsafe fn new(args: &'a rsb_submit_args) -> Asked<'a> {
        Asked(args)
    }
}

impl Asks<Callback> for Asked<'_> {
    #[inline(always)]
    fn plain(&self, (rank, size): (u32, u32)) -> Option<Ask<Callback>> {
        let args = self.0;
        let (dtype, op) = (DType::from_code(args.dtype)?, Op::from_code(args.op)?);
        let finish = Finish {
            scale: 1.0,
            output: match args.output_dtype {
                0 => dtype,
                code => DType::from_code(code)?,
            },
            accumulate: args.flags & RSB_SUBMIT_ACCUMULATE != 0,
        };
        let pieces: *const *const u8 = args.inputs.cast();
        let output: *mut u8 = args.output.cast();
        let same = finish.output == dtype;
        let other = args.flags & !(RSB_SUBMIT_BORROW | RSB_SUBMIT_ACCUMULATE) != 0
            || args.scale != 0.0
            || !args.flat_input.is_null()
            || !args.stream.is_null()
            || args.numel == 0
            || pieces.is_null();
        let floats = dtype.is_float() && finish.output.is_float();
        if other
            || (op == Op::Avg && !dtype.is_float())
            || (!same && !floats)
            || (finish.accumulate && output.is_null())
        {
            return None;
        }
        let bytes = args.numel.checked_mul(dtype.size())?;
        let result = args.numel.checked_mul(finish.output.size())?;
        for i in 0..size {
            // SAFETY: there is a pointer for every rank, by the promise of `new`.
            let piece = unsafe { *pieces.add(i as usize) };
            let own = same && i == rank && output.cast_const() == piece;
            if piece.is_null()
                || (!output.is_null() && !own && overlap(output, result, piece, bytes))
            {
                return None;
            }
        }
        let work = Work {
            rows: Rows::Pieces(pieces),
            size,
            numel: args.numel,
            dtype,
            op,
            finish,
            output,
            output_is_ours: false,
            borrow: args.flags & RSB_SUBMIT_BORROW != 0,
            tag: args.tag,
            stream: std::ptr::null_mut(),
            bucketer: (0, 0),
        };
        let payload = Callback {
            function: args.callback,
            user_data: args.user_data,
        };
        Some(Ask { work, payload })
    }

    #[inline(never)]
    fn check(&self, comm: &Endpoint) -> Result<Ask<Callback>> {
        // SAFETY: by the promise of `new`.
        unsafe { check(comm, self.0) }
    }
}

/// Checks what any op asks for.
///
/// # Safety
/// With numel > 0, the arrays of `args` are as the header says.
pub unsafe fn check(comm: &Endpoint, args: &rsb_submit_args) -> Result<Ask<Callback>> {
    let known = RSB_SUBMIT_ACCUMULATE | RSB_SUBMIT_BORROW;
    if args.flags & !known != 0 {
        return Err(unsupported!(
            "flags: {:#x}; expected bits of {known:#x}",
            args.flags
        ));
    }
    let dtype = dtype_of(args.dtype, "dtype")?;
    let op = Op::from_code(args.op)
        .ok_or_else(|| unsupported!("op: {}; expected an RSB_OP_, 1 to 5", args.op))?;
    let output = match args.output_dtype {
        0 => dtype,
        code => dtype_of(code, "output_dtype")?,
    };
    let finish = Finish {
        scale: scale_of(args.scale, dtype, output)?,
        output,
        accumulate: args.flags & RSB_SUBMIT_ACCUMULATE != 0,
    };
    check_rules(dtype, op, &finish)?;
    if finish.accumulate && args.output.is_null() {
        return Err(invalid!(
            "output: NULL with RSB_SUBMIT_ACCUMULATE; expected memory to add to"
        ));
    }
    if !args.stream.is_null() && !comm.is_device() {
        return Err(invalid!(
            "stream: given for a comm of host memory; expected NULL"
        ));
    }
    // SAFETY: by the promise of this function.
    let (rows, numel) = unsafe { rows_of(comm, args)? };
    let element = dtype.size().max(output.size());
    if total_bytes(numel, comm.size(), element).is_none() {
        return Err(invalid!(
            "numel: {} for {} ranks is more than memory can hold",
            args.numel,
            comm.size()
        ));
    }
    let ask = Ask {
        work: Work {
            rows,
            size: comm.size(),
            numel,
            dtype,
            op,
            finish,
            output: args.output.cast(),
            output_is_ours: false,
            borrow: args.flags & RSB_SUBMIT_BORROW != 0,
            tag: args.tag,
            stream: args.stream,
            bucketer: (0, 0),
        },
        payload: Callback {
            function: args.callback,
            user_data: args.user_data,
        },
    };
    if !args.output.is_null() {
        // SAFETY: the rows were checked to be there.
        unsafe { check_output(comm, &ask.work)? };
    }
    if comm.is_device() {
        let work = &ask.work;
        let output = (work.numel > 0 && !work.output.is_null()).then_some(work.output.cast_const());
        let output = output.map(|o| (o, "output", None));
        let flat = match work.rows {
            Rows::Flat { data, .. } => Some((data, "flat_input", None)),
            Rows::Pieces(_) => None,
        };
        let pieces = (0..comm.size()).filter_map(|r| match work.rows {
            Rows::Pieces(pieces) if work.numel > 0 => {
                // SAFETY: the rows were checked to be there.
                let piece = unsafe { *pieces.add(r as usize) };
                Some((piece, "inputs", Some(r)))
            }
            _ => None,
        });
        comm.vet(pieces.chain(flat).chain(output), work.stream)?;
    }
    Ok(ask)
}

fn scale_of(scale: f64, dtype: DType, output: DType) -> Result<f64> {
    if scale == 0.0 {
        return Ok(1.0);
    }
    let single = dtype != DType::F64 && output != DType::F64;
    let rounded = if single {
        f64::from(scale as f32)
    } else {
        scale
    };
    if !rounded.is_finite() {
        return Err(invalid!(
            "scale: {scale:e}; expected a finite number, or 0 for 1"
        ));
    }
    Ok(scale)
}

/// # Safety
/// As for `check`.
unsafe fn rows_of(comm: &Endpoint, args: &rsb_submit_args) -> Result<(Rows, usize)> {
    match (args.inputs.is_null(), args.flat_input.is_null()) {
        (false, false) => Err(invalid!(
            "inputs, flat_input: both given; expected exactly one"
        )),
        // Nothing to read: both forms are the same op.
        _ if args.numel == 0 => Ok((Rows::Pieces(std::ptr::null()), 0)),
        (true, true) => Err(invalid!(
            "inputs, flat_input: both NULL; expected exactly one"
        )),
        (true, false) => {
            let rows = Rows::Flat {
                data: args.flat_input.cast(),
                total: args.numel,
            };
            Ok((rows, shard_numel(args.numel, comm.size())))
        }
        (false, true) => {
            for i in 0..comm.size() as usize {
                // SAFETY: there is a pointer for every rank.
                if unsafe { *args.inputs.add(i) }.is_null() {
                    return Err(invalid!(
                        "inputs[{i}]: NULL with numel {}; expected a pointer for every rank",
                        args.numel
                    ));
                }
            }
            Ok((Rows::Pieces(args.inputs.cast()), args.numel))
        }
    }
}

/// The output may be this rank's own piece, exactly, and overlaps nothing else of the input.
///
/// # Safety
/// As for `check`.
unsafe fn check_output(comm: &Endpoint, work: &Work) -> Result<()> {
    let element = work.dtype.size();
    let (output, bytes) = (
        work.output.cast_const(),
        work.numel * work.finish.output.size(),
    );
    let same = work.finish.output == work.dtype;
    let refuse = |what: String| {
        Err(invalid!(
            "output: overlaps {what}; expected no overlap, or exactly this rank's own piece with the same dtype"
        ))
    };
    match work.rows {
        Rows::Flat { data, total } => {
            let (offset, _) = flat_shard(total, comm.size(), comm.rank());
            let own = same && output == data.wrapping_add(offset * element);
            if !own && overlap(output, bytes, data, total * element) {
                return refuse("flat_input".into());
            }
        }
        Rows::Pieces(_) if work.numel == 0 => {}
        Rows::Pieces(pieces) => {
            for i in 0..comm.size() {
                // SAFETY: there is a pointer for every rank.
                let piece = unsafe { *pieces.add(i as usize) };
                let own = same && i == comm.rank() && output == piece;
                if !own && overlap(output, bytes, piece, work.numel * element) {
                    return refuse(format!("inputs[{i}]"));
                }
            }
        }
    }
    Ok(())
}
