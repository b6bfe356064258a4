//! Drives a call on a bucketer: runs its callbacks between its steps, outside of [`guarded`], since a C++
//! exception may pass, and a child may be forked in one.

use std::mem::size_of;

use super::submit::Callback;
use super::{fill, guarded};
use crate::bucketer::{Bucketer, Completion, Plan, Turn};
use crate::error::{Error, Result, Status};
use crate::ffi::{rsb_error, rsb_result, rsb_shard, rsb_ticket};
use crate::fork;

/// What `rsb_result.error` points to when there is none.
static FINE: rsb_error = rsb_error {
    status: 0,
    native_code: 0,
    peer: -1,
    reserved: 0,
    message: [0; 240],
};

/// Runs one callback. A C++ exception passes through here.
///
/// # Safety
/// The callback is the caller's, made for this.
#[inline]
unsafe fn call_back(done: &Completion<'_, Callback>) {
    let op = done.op;
    let Some(function) = op.payload.function else {
        return;
    };
    let mut failure = None;
    let (error, status) = match done.error {
        None => (&FINE, Status::Ok),
        Some(e) => (&*failure.insert(fill(e)), e.status),
    };
    let result = rsb_result {
        struct_size: size_of::<rsb_result>(),
        ticket: op.ticket,
        tag: op.tag,
        data: op.data.cast(),
        numel: op.numel,
        valid_numel: op.valid,
        offset: op.offset,
        stream: op.stream,
        shard: op.shard as *mut rsb_shard,
        error,
        status: status.code(),
        dtype: op.dtype as u32,
    };
    // SAFETY: the result lives during the call.
    unsafe { function(op.payload.user_data, &result) }
}

/// A turn, and where the ticket of a submit goes: as soon as the op is taken, also if a callback
/// throws.
struct Running<'a> {
    turn: Turn<'a, Callback>,
    out_ticket: *mut rsb_ticket,
    over: bool,
    /// The process in which the call began.
    process: u32,
}

impl Running<'_> {
    /// Whether a callback has forked, and this is the child: of the comm's memory nothing is mapped
    /// here, and all locks are the parent's.
    fn is_forked(&self) -> bool {
        fork::epoch() != self.process
    }

    /// # Safety
    /// `out_ticket` is NULL or may be written.
    unsafe fn tell_ticket(&self) {
        if let (Some(ticket), false) = (self.turn.ticket(), self.out_ticket.is_null()) {
            // SAFETY: by the promise of this function; any alignment.
            unsafe { self.out_ticket.write_unaligned(ticket) };
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.over && !self.is_forked() {
            // A C++ exception is passing.
            let _ = guarded(|| {
                // SAFETY: the call that is ending was given what rule 6 asks for.
                unsafe { self.turn.abandon() };
                Ok(())
            });
            // SAFETY: the caller's pointer, checked when the call began.
            unsafe { self.tell_ticket() };
        }
    }
}

/// Runs a call to its end; how many ops were handed back.
///
/// # Safety
/// The pointers that the call was given are as rule 6 says; `out_ticket` is NULL or may be written.
pub unsafe fn drive(
    bucketer: &Bucketer<Callback>,
    plan: Plan<'_, Callback>,
    out_ticket: *mut rsb_ticket,
) -> Result<u64> {
    let mut running = Running {
        turn: bucketer.turn(plan),
        out_ticket,
        over: false,
        process: fork::epoch(),
    };
    loop {
        while let Some(done) = running.turn.hand_back() {
            // SAFETY: the callback came with its op.
            unsafe { call_back(&done) };
            if running.is_forked() {
                std::mem::forget(running);
                let text = "this process was forked in a callback of this call, which ends here; \
                            expected no return into its parent's calls";
                return Err(Error::new(Status::Aborted, text));
            }
        }
        // SAFETY: by the promise of this function.
        let more = guarded(|| Ok(unsafe { running.turn.look() }));
        // SAFETY: by the promise of this function.
        unsafe { running.tell_ticket() };
        match more {
            Ok(true) => {}
            Ok(false) => break,
            Err(e) => {
                running.over = true;
                bucketer.poison(&e.message);
                return Err(e);
            }
        }
    }
    running.over = true;
    let count = running.turn.count();
    guarded(|| running.turn.result()).map(|()| count)
}
