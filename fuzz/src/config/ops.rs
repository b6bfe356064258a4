//! The structs of an op and of the counters.

use std::ffi::c_void;
use std::ptr;

use rsbucket::ffi::*;

use super::{place, pointer, token, Wrong};
use crate::guard::Guarded;
use crate::input::Input;
use crate::rules::{call, fresh, told};

unsafe extern "C-unwind" fn called(count: *mut c_void, result: *const rsb_result) {
    // SAFETY: a counter of the call's, and the library's struct.
    unsafe {
        *count.cast::<u32>() += 1;
        assert_eq!((*result).struct_size, size_of::<rsb_result>());
    }
}

/// A bucketer and the only rank of a comm.
fn pair() -> (*mut rsb_bucketer, *mut rsb_comm) {
    let (mut bucketer, mut comm) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: all defaults.
    unsafe {
        assert_eq!(
            call(|err| rsb_bucketer_create(ptr::null(), &mut bucketer, err)),
            RSB_OK
        );
        assert_eq!(
            call(|err| rsb_comm_create_local(1, ptr::null(), &mut comm, err)),
            RSB_OK
        );
    }
    (bucketer, comm)
}

pub fn submit_args(input: &mut Input) {
    let mut wrong = Wrong::default();
    let (bucketer, comm) = pair();
    let numel = match input.below(6) {
        0 => 0,
        1 => usize::MAX - input.below(256),
        2 => 1 << 62 | input.u64() as usize,
        _ => input.below(100),
    };
    let data = Guarded::new(100 * 8);
    let output = Guarded::new(100 * 8);
    let pieces = Guarded::holding(&[data.as_ptr::<c_void>()], 8);
    let empty = Guarded::new(8);
    let wild = |input: &mut Input| match input.below(6) {
        0 => input.u64() as u32,
        1 => 0,
        _ => 1 + input.below(8) as u32,
    };
    let mut count = 0u32;
    let mut args = rsb_submit_args {
        struct_size: 0,
        inputs: input.pick(&[
            pieces.as_ptr(),
            pieces.as_ptr(),
            empty.as_ptr(),
            ptr::null_mut(),
        ]),
        flat_input: input.pick(&[ptr::null_mut(), ptr::null_mut(), data.as_ptr()]),
        output: input.pick(&[
            ptr::null_mut(),
            output.as_ptr(),
            data.as_ptr(),
            data.as_ptr::<c_void>().wrapping_byte_add(1),
        ]),
        numel,
        dtype: wild(input),
        output_dtype: if input.yes() { 0 } else { wild(input) },
        op: if input.below(6) == 0 {
            wild(input)
        } else {
            1 + input.below(5) as u32
        },
        flags: if input.below(6) == 0 {
            input.u64() as u32
        } else {
            input.below(4) as u32
        },
        scale: match input.below(6) {
            0 => f64::from_bits(input.u64()),
            1 => input.pick(&[f64::NAN, f64::INFINITY, 1e300, 1.0]),
            _ => 0.0,
        },
        tag: input.u64(),
        stream: token(input),
        callback: Some(called),
        user_data: ptr::from_mut(&mut count).cast(),
    };
    if !args.output.is_null() && numel > 100 {
        // More than memory can hold: a little less, and it would be our word that it is there.
        args.numel |= 1 << 63;
    }
    let given = place(input, &args, &mut wrong);
    wrong.when(given.is_none(), RSB_ERR_INVALID_ARGUMENT);
    if given.is_some() {
        judge_args(
            &args,
            empty.as_ptr(),
            data.as_ptr::<u8>() as usize,
            &mut wrong,
        );
    }
    let ticket = Guarded::new(8);
    let to = if input.yes() {
        ticket.as_ptr()
    } else {
        ptr::null_mut()
    };
    // SAFETY: a call as the header asks for it, but for what is in `wrong`.
    let status =
        call(|err| unsafe { rsb_bucketer_submit(bucketer, comm, pointer(&given), to, err) });
    wrong.judge(status, "submit");
    let ok = status == RSB_OK;
    assert_eq!(
        u64::from_ne_bytes(ticket.bytes().try_into().unwrap()) != 0,
        ok && !to.is_null()
    );
    // SAFETY: handles of ours; the counter lives until the bucketer is gone.
    unsafe {
        assert_eq!(call(|err| rsb_bucketer_flush(bucketer, err)), RSB_OK);
        rsb_comm_free(comm);
        assert_eq!(rsb_bucketer_free(bucketer), RSB_OK);
    }
    assert_eq!(count, u32::from(ok));
}

/// What the header says is wrong with an op on a comm of one rank, whose input begins at `data`.
fn judge_args(args: &rsb_submit_args, empty: *const *const c_void, data: usize, wrong: &mut Wrong) {
    // SAFETY: takes a number.
    let width_of = |dtype| unsafe { rsb_dtype_size(dtype) };
    let (element, known) = (width_of(args.dtype), 1..=4u32);
    let output = if args.output_dtype == 0 {
        args.dtype
    } else {
        args.output_dtype
    };
    let width = width_of(output);
    wrong.when(element == 0 || width == 0, RSB_ERR_UNSUPPORTED);
    wrong.when(
        !(1..=5).contains(&args.op) || args.flags & !3 != 0,
        RSB_ERR_UNSUPPORTED,
    );
    let float = known.contains(&args.dtype);
    wrong.when(
        !float && (args.op == RSB_OP_AVG || output != args.dtype),
        RSB_ERR_UNSUPPORTED,
    );
    wrong.when(
        !known.contains(&output) && output != args.dtype,
        RSB_ERR_UNSUPPORTED,
    );
    let scale = args.scale;
    wrong.when(!float && scale != 0.0 && scale != 1.0, RSB_ERR_UNSUPPORTED);
    let double = args.dtype == RSB_DTYPE_F64 || output == RSB_DTYPE_F64;
    let rounded = if double {
        scale
    } else {
        f64::from(scale as f32)
    };
    wrong.when(!rounded.is_finite(), RSB_ERR_INVALID_ARGUMENT);
    let (inputs, flat) = (!args.inputs.is_null(), !args.flat_input.is_null());
    wrong.when(inputs && flat, RSB_ERR_INVALID_ARGUMENT);
    wrong.when(!args.stream.is_null(), RSB_ERR_INVALID_ARGUMENT);
    wrong.when(
        args.flags & 1 != 0 && args.output.is_null(),
        RSB_ERR_INVALID_ARGUMENT,
    );
    if args.numel == 0 {
        return;
    }
    wrong.when(!inputs && !flat, RSB_ERR_INVALID_ARGUMENT);
    wrong.when(inputs && args.inputs == empty, RSB_ERR_INVALID_ARGUMENT);
    let bytes = args.numel.checked_mul(element.max(width));
    let large = bytes.is_none_or(|b| b > isize::MAX as usize);
    wrong.when(large, RSB_ERR_INVALID_ARGUMENT);
    wrong.when(args.numel > 1 << 40, RSB_ERR_NO_MEMORY);
    // No byte of the output is one of the input, but that it may be the input, exactly.
    let at = args.output as usize;
    let apart = at >= data.saturating_add(args.numel.saturating_mul(element))
        || data >= at.saturating_add(args.numel.saturating_mul(width));
    let own = at == data && output == args.dtype;
    wrong.when(at != 0 && !apart && !own, RSB_ERR_INVALID_ARGUMENT);
}

pub fn stats(input: &mut Input) {
    let (bucketer, comm) = pair();
    let size = match input.below(4) {
        0 => input.below(size_of::<rsb_stats>()),
        1 => size_of::<rsb_stats>() + input.below(256),
        2 => 5000,
        _ => size_of::<rsb_stats>(),
    };
    let out = Guarded::new(size);
    let mut data = [1.5f32, 2.5];
    // SAFETY: calls as the header asks for them.
    unsafe {
        out.as_ptr::<u8>().write_bytes(0xee, size);
        let pieces = [data.as_mut_ptr().cast::<c_void>().cast_const()];
        let submitted = call(|err| {
            rsb_bucketer_reduce_scatter_async(
                bucketer,
                comm,
                pieces.as_ptr(),
                2,
                RSB_DTYPE_F32,
                RSB_OP_SUM,
                None,
                ptr::null_mut(),
                err,
            )
        });
        assert_eq!(submitted, RSB_OK);
        let given = input.below(8) > 0;
        let to = if given { out.as_ptr() } else { ptr::null_mut() };
        let status = rsb_bucketer_stats(bucketer, to, size);
        assert_eq!(
            status,
            if given {
                RSB_OK
            } else {
                RSB_ERR_INVALID_ARGUMENT
            }
        );
        let mut whole = rsb_stats::default();
        assert_eq!(
            rsb_bucketer_stats(bucketer, &mut whole, size_of::<rsb_stats>()),
            RSB_OK
        );
        assert_eq!(
            (whole.ops_submitted, whole.ops_bucketed, whole.payload_bytes),
            (1, 1, 8)
        );
        if given {
            let mut expected = vec![0; size];
            let known = size.min(size_of::<rsb_stats>());
            expected[..known].copy_from_slice(
                &Guarded::holding(&whole, size_of::<rsb_stats>()).bytes()[..known],
            );
            assert_eq!(out.bytes(), expected);
        }
        rsb_comm_free(comm);
        assert_eq!(rsb_bucketer_free(bucketer), RSB_OK);
    }
    let mut err = fresh();
    // SAFETY: a dead handle, which is checked.
    let status = unsafe { rsb_bucketer_flush(bucketer, &mut err) };
    assert_eq!(told(status, &err), RSB_ERR_BAD_HANDLE);
}
