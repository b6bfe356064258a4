//! What a callback is told, and what it does.

use std::ffi::c_void;
use std::ptr;

use rsbucket::ffi::*;

use super::program::{Op, Output, Then};
use super::rank::Rank;
use super::record::Record;
use crate::rules::{call, full, STICKY};

/// Runs a callback's checks.
pub unsafe extern "C-unwind" fn callback(record: *mut c_void, result: *const rsb_result) {
    // SAFETY: records, and their rank, live until the program is over.
    unsafe {
        let record = &*record.cast::<Record>();
        (*record.rank).called(record, &*result);
    }
}

impl Rank<'_> {
    fn called(&self, record: &Record, result: &rsb_result) {
        assert!(!self.calling.replace(true), "a callback inside another");
        assert_eq!(
            self.inside.get(),
            Some(record.bucketer),
            "in a call on its bucketer"
        );
        assert_eq!(
            record.called.replace(1),
            0,
            "op {} is called back twice",
            record.id
        );
        let b = &self.bucketers[record.bucketer];
        let (mut ok, mut failed) = b.ended.get();
        assert_eq!(
            (result.struct_size, result.tag),
            (size_of::<rsb_result>(), record.args.tag)
        );
        let ticket = record.ticket.get();
        assert!(
            ticket == 0 || ticket == result.ticket,
            "the ticket is written before the callback"
        );
        // SAFETY: never NULL, and valid during the callback.
        let error = unsafe { &*result.error };
        assert_eq!(error.status, result.status);
        self.ends.borrow_mut().insert(record.id, result.status);
        if result.status == RSB_OK {
            ok += 1;
            if self.strict {
                b.model.borrow_mut().called(record.id);
            }
            self.check(record, result);
        } else {
            failed += 1;
            full(error);
            assert!(result.data.is_null());
            let cancelled = result.status == RSB_ERR_CANCELLED && self.freeing.get();
            assert!(
                cancelled || !self.sound && STICKY.contains(&result.status),
                "{error:?}"
            );
            assert!(!cancelled || !self.strict || b.model.borrow_mut().cancel(record.id));
        }
        b.ended.set((ok, failed));
        self.then(record, result);
        self.calling.set(false);
    }

    fn check(&self, record: &Record, result: &rsb_result) {
        assert_eq!(
            (result.numel, result.dtype),
            (record.shard, record.output_dtype())
        );
        assert_eq!((result.valid_numel, result.offset), record.valid);
        assert!(record.shard == 0 || !result.data.is_null());
        if record.op.output != Output::Library {
            assert!(result.data == record.args.output && result.shard.is_null());
        }
        // SAFETY: the shard has `numel` elements of its dtype.
        let seen = unsafe { std::slice::from_raw_parts(at(result.data), record.wanted.len()) };
        assert_eq!(seen, record.wanted, "op {} {:?}", record.id, record.op);
    }

    fn then(&self, record: &Record, result: &rsb_result) {
        let which = record.bucketer;
        match record.op.then {
            Then::Submit(numel) if result.status == RSB_OK => {
                let op = Op {
                    numel,
                    then: Then::Nothing,
                    ..record.op
                };
                self.submit(record.id + 1, which, op, false);
            }
            Then::CallIn => {
                let handle = self.bucketer(which);
                // SAFETY: refused, since a callback of this bucketer runs.
                for seen in unsafe {
                    [
                        call(|err| rsb_bucketer_flush(handle, err)),
                        call(|err| rsb_bucketer_launch(handle, err)),
                        call(|err| rsb_bucketer_poll(handle, ptr::null_mut(), err)),
                        call(|err| rsb_bucketer_wait(handle, result.ticket, 0, err)),
                        call(|err| rsb_bucketer_release_buffers(handle, err)),
                        rsb_bucketer_free(handle),
                    ]
                } {
                    assert_eq!(seen, RSB_ERR_REENTRANT);
                }
                // SAFETY: queries are allowed.
                assert_eq!(
                    unsafe { rsb_comm_size(self.place.comm) },
                    self.place.size as u32
                );
            }
            Then::Retain if !result.shard.is_null() => {
                // SAFETY: the shard of a result is alive.
                assert_eq!(unsafe { rsb_shard_retain(result.shard) }, result.shard);
                let kept = (result.shard, at(result.data), record.wanted.clone());
                self.kept.borrow_mut().push(kept);
            }
            _ => {}
        }
    }
}

/// Where bytes begin: no bytes begin anywhere.
fn at(data: *const c_void) -> *const u8 {
    if data.is_null() {
        ptr::dangling()
    } else {
        data.cast()
    }
}
