//! Calls that must be refused, each with the one status that the header gives it.

use std::ffi::c_void;
use std::ptr;

use rsbucket::ffi::*;

use crate::rules::call;

/// What bad calls are made with.
pub struct Hands {
    pub bucketer: *mut rsb_bucketer,
    pub comm: *mut rsb_comm,
    /// Handles that were freed.
    pub dead: *mut rsb_bucketer,
    pub is_engine: bool,
}

unsafe extern "C-unwind" fn never(_: *mut c_void, _: *const rsb_result) {
    panic!("the callback of an op that was refused");
}

/// Makes bad call `which`: what it answered, and what it should.
pub fn make(which: u8, hands: &Hands) -> (rsb_status, rsb_status) {
    let &Hands {
        bucketer,
        comm,
        dead,
        is_engine,
    } = hands;
    let data = [0u64; 8];
    let one: *const c_void = data.as_ptr().cast();
    let (pieces, holes) = ([one; 3], [one, one, one].map(|_| ptr::null::<c_void>()));
    let mut args = rsb_submit_args {
        struct_size: size_of::<rsb_submit_args>(),
        inputs: pieces.as_ptr(),
        flat_input: ptr::null(),
        output: ptr::null_mut(),
        numel: 2,
        dtype: RSB_DTYPE_F32,
        output_dtype: 0,
        op: RSB_OP_SUM,
        flags: 0,
        scale: 0.0,
        tag: 0,
        stream: ptr::null_mut(),
        callback: Some(never),
        user_data: ptr::null_mut(),
    };
    let junk = 0x1234_5678_u64 as *mut c_void;
    let (mut b, mut c, mut none) = (bucketer, comm, false);
    let wanted = match which % 32 {
        0 => (args.dtype = 0, RSB_ERR_UNSUPPORTED).1,
        1 => (args.dtype = 9, RSB_ERR_UNSUPPORTED).1,
        2 => (args.op = 0, RSB_ERR_UNSUPPORTED).1,
        3 => (args.op = u32::MAX, RSB_ERR_UNSUPPORTED).1,
        4 => (args.flags = 4, RSB_ERR_UNSUPPORTED).1,
        5 => (args.flat_input = one, RSB_ERR_INVALID_ARGUMENT).1,
        6 => (args.inputs = ptr::null(), RSB_ERR_INVALID_ARGUMENT).1,
        7 => (args.inputs = holes.as_ptr(), RSB_ERR_INVALID_ARGUMENT).1,
        8 => (args.flags = RSB_SUBMIT_ACCUMULATE, RSB_ERR_INVALID_ARGUMENT).1,
        9 => (args.stream = junk, RSB_ERR_INVALID_ARGUMENT).1,
        10 => (args.scale = f64::INFINITY, RSB_ERR_INVALID_ARGUMENT).1,
        11 => (args.numel = usize::MAX, RSB_ERR_INVALID_ARGUMENT).1,
        12 => {
            (
                (args.dtype, args.op) = (RSB_DTYPE_I32, RSB_OP_AVG),
                RSB_ERR_UNSUPPORTED,
            )
                .1
        }
        13 => {
            (
                (args.dtype, args.scale) = (RSB_DTYPE_U8, 0.5),
                RSB_ERR_UNSUPPORTED,
            )
                .1
        }
        14 => {
            (
                (args.dtype, args.output_dtype) = (RSB_DTYPE_I8, 1),
                RSB_ERR_UNSUPPORTED,
            )
                .1
        }
        15 => (args.struct_size = 8, RSB_ERR_INVALID_ARGUMENT).1,
        16 => (none = true, RSB_ERR_INVALID_ARGUMENT).1,
        17 => (b = ptr::null_mut(), RSB_ERR_BAD_HANDLE).1,
        18 => (c = ptr::null_mut(), RSB_ERR_BAD_HANDLE).1,
        19 => (b = dead, RSB_ERR_BAD_HANDLE).1,
        20 => (b = comm.cast(), RSB_ERR_BAD_HANDLE).1,
        21 => (c = bucketer.cast(), RSB_ERR_BAD_HANDLE).1,
        22 => (c = junk.cast(), RSB_ERR_BAD_HANDLE).1,
        _ => return other(which % 32, hands, one, is_engine),
    };
    let at = if none { ptr::null() } else { &args };
    // SAFETY: refused before anything that is wrong is used.
    (
        call(|err| unsafe { rsb_bucketer_submit(b, c, at, ptr::null_mut(), err) }),
        wanted,
    )
}

fn other(which: u8, hands: &Hands, one: *const c_void, engine: bool) -> (rsb_status, rsb_status) {
    let &Hands {
        bucketer,
        comm,
        dead,
        ..
    } = hands;
    let mut out = ptr::null_mut();
    // SAFETY: refused before anything that is wrong is used.
    call_of(|err| unsafe {
        match which {
            23 => (rsb_bucketer_flush(dead, err), RSB_ERR_BAD_HANDLE),
            24 => (
                rsb_bucketer_launch(ptr::null_mut(), err),
                RSB_ERR_BAD_HANDLE,
            ),
            25 => (
                rsb_bucketer_wait(bucketer, 0, 0, err),
                RSB_ERR_INVALID_ARGUMENT,
            ),
            26 => (
                rsb_bucketer_wait(bucketer, u64::MAX, 0, err),
                RSB_ERR_INVALID_ARGUMENT,
            ),
            27 => (
                rsb_comm_all_gather(dead.cast(), one, out, 1, err),
                RSB_ERR_BAD_HANDLE,
            ),
            28 => (
                rsb_comm_all_gather(comm, one, ptr::null_mut(), 8, err),
                RSB_ERR_INVALID_ARGUMENT,
            ),
            29 => (
                rsb_comm_shrink(comm, ptr::null(), ptr::from_mut(&mut out).cast(), err),
                if engine {
                    RSB_ERR_UNSUPPORTED
                } else {
                    RSB_ERR_INVALID_ARGUMENT
                },
            ),
            30 => {
                assert!(rsb_shard_retain(comm.cast()).is_null());
                rsb_shard_release(dead.cast());
                rsb_comm_free(bucketer.cast());
                rsb_comm_abort(dead.cast());
                (
                    rsb_bucketer_poll(dead, ptr::null_mut(), err),
                    RSB_ERR_BAD_HANDLE,
                )
            }
            _ => (rsb_comm_status(bucketer.cast(), err), RSB_ERR_BAD_HANDLE),
        }
    })
}

fn call_of(
    body: impl FnOnce(*mut rsb_error) -> (rsb_status, rsb_status),
) -> (rsb_status, rsb_status) {
    let mut wanted = RSB_OK;
    let seen = call(|err| {
        let (seen, expected) = body(err);
        wanted = expected;
        seen
    });
    (seen, wanted)
}
