//! One rank that runs a program, and checks everything that it is told.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr;

use rsbucket::ffi::*;

use super::bad::{self, Hands};
use super::callback::callback;
use super::memory::Memory;
use super::model::{Id, Model};
use super::program::{Op, Program, Step, Then, World};
use super::record::Record;
use super::values::width;
use super::{Ends, Place};
use crate::rules::{call, STICKY};

/// A bucketer of a rank, and what is known about it.
#[derive(Default)]
pub struct Bucketer {
    handle: Cell<usize>,
    pub model: RefCell<Model>,
    /// Ops taken, ended with OK, ended otherwise; payload and padding bytes.
    taken: Cell<u64>,
    pub ended: Cell<(u64, u64)>,
    bytes: Cell<(u64, u64)>,
    /// Ops without a callback since the last flush: nobody tells when they end.
    silent: Cell<u64>,
    tickets: RefCell<Vec<(Id, rsb_ticket)>>,
}

pub struct Rank<'a> {
    program: &'a Program,
    pub place: &'a Place,
    memory: Memory,
    pub bucketers: [Bucketer; 2],
    dead: Cell<*mut rsb_bucketer>,
    ops: RefCell<BTreeMap<Id, Box<Record>>>,
    pub ends: RefCell<Ends>,
    /// Nothing has failed, and nothing may.
    pub sound: bool,
    /// No callback submits: the model knows every order.
    pub strict: bool,
    twisted: Cell<bool>,
    pub inside: Cell<Option<usize>>,
    pub freeing: Cell<bool>,
    pub calling: Cell<bool>,
    pub kept: RefCell<Vec<(*mut rsb_shard, *const u8, Vec<u8>)>>,
}

impl<'a> Rank<'a> {
    /// Runs a program to its end: how each op that was taken has ended.
    pub fn run(program: &'a Program, place: &'a Place) -> Ends {
        let submits = |s: &(usize, Step)| match s.1 {
            Step::Submit(op) | Step::Common(op) => matches!(op.then, Then::Submit(_)),
            _ => false,
        };
        let rank = Rank {
            program,
            place,
            memory: Memory::new(program.allocations),
            bucketers: Default::default(),
            dead: Cell::new(ptr::null_mut()),
            ops: RefCell::default(),
            ends: RefCell::default(),
            sound: program.is_sound(),
            strict: program.is_sound() && !program.steps.iter().any(submits),
            twisted: Cell::new(false),
            inside: Cell::new(None),
            freeing: Cell::new(false),
            calling: Cell::new(false),
            kept: RefCell::default(),
        };
        rank.bucketer(0);
        rank.free(0);
        for (n, &(which, step)) in program.steps.iter().enumerate() {
            rank.step(n * 2, which, step);
        }
        rank.end();
        rank.ends.into_inner()
    }

    pub fn bucketer(&self, which: usize) -> *mut rsb_bucketer {
        let slot = &self.bucketers[which].handle;
        if slot.get() == 0 {
            let made = self.memory.bucketer(self.program.bucket_bytes[which]);
            slot.set(made as usize);
        }
        slot.get() as *mut rsb_bucketer
    }

    /// A call on a bucketer, in which its callbacks may run.
    fn on(
        &self,
        which: usize,
        body: impl FnOnce(*mut rsb_bucketer, *mut rsb_error) -> rsb_status,
    ) -> rsb_status {
        let handle = self.bucketer(which);
        let outer = self.inside.replace(Some(which));
        let status = call(|err| body(handle, err));
        self.inside.set(outer);
        status
    }

    fn expect(&self, seen: rsb_status, wanted: rsb_status, what: &str) {
        let failed = STICKY.contains(&seen) || seen == RSB_ERR_NO_MEMORY;
        assert!(
            seen == wanted || !self.sound && failed,
            "{what}: {seen}; expected {wanted}"
        );
    }

    fn step(&self, id: Id, which: usize, step: Step) {
        let comm = self.place.comm;
        let b = &self.bucketers[which];
        // SAFETY: calls as the header asks for them, here and below.
        match step {
            Step::Submit(op) => self.submit(id, which, op, false),
            Step::Common(op) => self.submit(id, which, op, true),
            Step::Bad(call) => {
                let hands = Hands {
                    bucketer: self.bucketer(which),
                    comm,
                    dead: self.dead.get(),
                    is_engine: self.is_engine(),
                };
                let (seen, wanted) = bad::make(call, &hands);
                let failed = !self.sound && STICKY.contains(&seen);
                assert!(
                    seen == wanted || failed,
                    "bad call {}: {seen}; expected {wanted}",
                    call % 32
                );
            }
            Step::Launch => {
                b.model.borrow_mut().launch_all();
                // SAFETY: as above.
                let seen = self.on(which, |b, err| unsafe { rsb_bucketer_launch(b, err) });
                self.expect(seen, RSB_OK, "launch");
            }
            Step::Flush => self.flush(which),
            Step::Poll => {
                let before = b.ended.get();
                let mut count = usize::MAX;
                // SAFETY: as above.
                let seen = self.on(which, |b, err| unsafe {
                    rsb_bucketer_poll(b, &mut count, err)
                });
                self.expect(seen, RSB_OK, "poll");
                let (ok, failed) = b.ended.get();
                let called = ok + failed - before.0 - before.1;
                assert!(seen != RSB_OK || b.silent.get() > 0 || count as u64 == called);
            }
            Step::Wait(back, time) => self.wait(which, back, time),
            Step::Gather(bytes) => self.gather(bytes),
            Step::ReleaseBuffers => self.release_buffers(which),
            Step::Renew => self.free(which),
            // SAFETY: as above.
            Step::Abort(who) if who % self.place.size == self.place.rank => unsafe {
                rsb_comm_abort(comm)
            },
            Step::Twist(who) if who % self.place.size == self.place.rank => self.twisted.set(true),
            Step::Abort(_) | Step::Twist(_) => {}
        }
    }

    fn is_engine(&self) -> bool {
        matches!(self.program.world, World::Engine { .. })
    }

    pub fn submit(&self, id: Id, which: usize, op: Op, common: bool) {
        let mut record = Record::new(self, id, which, op, self.place, self.is_engine());
        record.args.user_data = ptr::from_mut::<Record>(&mut record).cast();
        record.args.callback = (op.then != Then::NoCallback).then_some(callback);
        if self.twisted.get() && !common {
            record.args.tag ^= 0x8000;
        }
        let (args, ticket) = (record.args, record.ticket.as_ptr());
        let (shard, bytes) = (record.shard, record.bytes(self.place.size));
        self.ops.borrow_mut().insert(id, record);
        let b = &self.bucketers[which];
        if self.strict {
            let room = self.place.size * width(op.dtype);
            let capacity = match self.program.bucket_bytes[which] {
                0 => Some((25 << 20) / room),
                bytes => usize::try_from(bytes).ok().map(|b| b / room),
            };
            let silent = op.then == Then::NoCallback;
            b.model
                .borrow_mut()
                .submit(id, (op.dtype, op.op), shard, capacity, silent);
        }
        let comm = self.place.comm;
        let freeing = self.freeing.get();
        let body = |b, err| {
            // SAFETY: as the header asks for it; the record lives until the program is over.
            unsafe {
                if common {
                    let (function, data) = (args.callback, args.user_data);
                    rsb_bucketer_reduce_scatter_async(
                        b,
                        comm,
                        args.inputs,
                        args.numel,
                        args.dtype,
                        args.op,
                        function,
                        data,
                        err,
                    )
                } else {
                    rsb_bucketer_submit(b, comm, &args, ticket, err)
                }
            }
        };
        let seen = if freeing {
            call(|err| body(self.bucketer(which), err))
        } else {
            self.on(which, body)
        };
        let mut ops = self.ops.borrow_mut();
        let Some(record) = ops.get_mut(&id) else {
            return;
        };
        if freeing {
            assert_eq!((seen, record.called.get()), (RSB_ERR_BAD_HANDLE, 0));
            ops.remove(&id);
            return;
        }
        self.expect(seen, RSB_OK, "submit");
        if seen != RSB_OK {
            assert_eq!(
                (record.called.get(), record.ticket.get()),
                (0, 0),
                "op {id} was refused"
            );
            ops.remove(&id);
            return;
        }
        assert!(common || record.ticket.get() != 0);
        record.spoil();
        b.taken.set(b.taken.get() + 1);
        b.silent
            .set(b.silent.get() + u64::from(op.then == Then::NoCallback));
        b.bytes
            .set((b.bytes.get().0 + bytes.0, b.bytes.get().1 + bytes.1));
        if !common {
            b.tickets.borrow_mut().push((id, record.ticket.get()));
        }
    }

    fn flush(&self, which: usize) {
        let b = &self.bucketers[which];
        b.model.borrow_mut().launch_all();
        // SAFETY: a handle of ours.
        let seen = self.on(which, |b, err| unsafe { rsb_bucketer_flush(b, err) });
        self.expect(seen, RSB_OK, "flush");
        b.silent.set(0);
        assert!(
            !self.strict || b.model.borrow().is_idle(),
            "flush runs every callback"
        );
    }

    fn wait(&self, which: usize, back: usize, time: u64) {
        let b = &self.bucketers[which];
        let ticket = b.tickets.borrow().iter().rev().nth(back).copied();
        let Some((id, ticket)) = ticket else { return };
        let open = b.model.borrow().is_open(id);
        // SAFETY: a handle of ours.
        let seen = self.on(which, |b, err| unsafe {
            rsb_bucketer_wait(b, ticket, time, err)
        });
        if seen == RSB_PENDING || seen == RSB_ERR_NOT_LAUNCHED {
            assert!(!self.strict || open == (seen == RSB_ERR_NOT_LAUNCHED));
            assert!(time != u64::MAX || seen != RSB_PENDING);
            return;
        }
        self.expect(seen, RSB_OK, "wait");
        let ops = self.ops.borrow();
        let silent = ops[&id].op.then == Then::NoCallback;
        assert!(
            seen != RSB_OK || silent || ops[&id].called.get() == 1,
            "wait before the callback"
        );
    }

    fn gather(&self, bytes: usize) {
        let (size, me) = (self.place.size, self.place.rank);
        let of = |rank: usize| (0..bytes).map(move |i| (i * 7 + rank * 31) as u8);
        let input: Vec<u8> = of(me).collect();
        let mut output = vec![0u8; bytes * size];
        let comm = self.place.comm;
        let seen = call(|err| unsafe {
            // SAFETY: as the header asks for it.
            rsb_comm_all_gather(
                comm,
                input.as_ptr().cast(),
                output.as_mut_ptr().cast(),
                bytes,
                err,
            )
        });
        let able = !matches!(self.program.world, World::Engine { flags, .. } if flags & RSB_TRANSPORT_ALL_GATHER == 0);
        self.expect(
            seen,
            if able { RSB_OK } else { RSB_ERR_UNSUPPORTED },
            "all_gather",
        );
        if seen == RSB_OK {
            let wanted = (0..size).flat_map(|r| of(if self.is_engine() { me } else { r }));
            assert!(output.into_iter().eq(wanted), "all_gather");
        }
    }

    fn release_buffers(&self, which: usize) {
        let b = &self.bucketers[which];
        // SAFETY: a handle of ours.
        let seen = self.on(which, |b, err| unsafe {
            rsb_bucketer_release_buffers(b, err)
        });
        let idle = b.model.borrow().is_idle();
        if self.strict && b.silent.get() == 0 {
            assert_eq!(seen, if idle { RSB_OK } else { RSB_ERR_BUSY });
        }
        assert!(seen == RSB_OK || seen == RSB_ERR_BUSY);
        if seen == RSB_OK && self.kept.borrow().is_empty() {
            assert_eq!(self.stats(which).buffer_bytes, 0);
        }
    }

    fn stats(&self, which: usize) -> rsb_stats {
        let mut stats = rsb_stats::default();
        // SAFETY: room for the struct.
        let seen =
            unsafe { rsb_bucketer_stats(self.bucketer(which), &mut stats, size_of::<rsb_stats>()) };
        assert_eq!(seen, RSB_OK);
        stats
    }

    /// The counters agree with what was done and seen.
    fn audit(&self, which: usize) {
        let (b, s) = (&self.bucketers[which], self.stats(which));
        assert_eq!(s.ops_submitted, b.taken.get());
        assert_eq!(s.ops_bucketed + s.ops_direct, s.ops_submitted);
        assert!(
            s.ops_completed + s.ops_failed <= s.ops_submitted
                && s.buffer_bytes <= s.buffer_bytes_peak
        );
        let (ok, failed) = b.ended.get();
        assert!(ok <= s.ops_completed && failed <= s.ops_failed);
        assert_eq!((s.payload_bytes, s.padding_bytes), b.bytes.get());
        if self.strict {
            let m = b.model.borrow();
            assert_eq!((s.ops_failed, s.ops_direct), (0, m.directs));
            assert_eq!((s.flushes_full, s.flushes_explicit), (m.full, m.explicit));
            assert_eq!(s.collectives_launched, m.launches + m.directs);
        }
    }

    fn free(&self, which: usize) {
        let handle = self.bucketer(which);
        self.audit(which);
        self.inside.set(Some(which));
        self.freeing.set(true);
        // SAFETY: a handle of ours, freed once.
        assert_eq!(unsafe { rsb_bucketer_free(handle) }, RSB_OK);
        self.freeing.set(false);
        self.inside.set(None);
        assert!(!self.strict || !self.bucketers[which].model.borrow().owes());
        let ops = self.ops.borrow();
        let mut mine = ops
            .values()
            .filter(|r| r.bucketer == which && r.op.then != Then::NoCallback);
        assert!(
            mine.all(|r| r.called.get() == 1),
            "free runs every callback"
        );
        drop(ops);
        self.dead.set(handle);
        let b = &self.bucketers[which];
        b.handle.set(0);
        (
            b.taken.set(0),
            b.ended.set((0, 0)),
            b.bytes.set((0, 0)),
            b.silent.set(0),
        );
        b.tickets.borrow_mut().clear();
        *b.model.borrow_mut() = Model::default();
    }

    fn end(&self) {
        let early = self.program.steps.len() % 2 == 1;
        (0..2).for_each(|which| self.flush(which));
        // SAFETY: handles of ours, freed once; idle bucketers do not keep the comm alive.
        unsafe {
            if early {
                rsb_comm_free(self.place.comm);
            }
            (0..2).for_each(|which| self.free(which));
            if !early {
                rsb_comm_free(self.place.comm);
            }
            let mut err = crate::rules::fresh();
            assert_eq!(
                rsb_comm_status(self.place.comm, &mut err),
                RSB_ERR_BAD_HANDLE
            );
        }
        for (shard, data, wanted) in self.kept.take() {
            // SAFETY: kept alive by our reference, the last one.
            unsafe {
                assert_eq!(std::slice::from_raw_parts(data, wanted.len()), wanted);
                rsb_shard_release(shard);
                assert!(rsb_shard_retain(shard).is_null());
            }
        }
        self.memory.end();
    }
}
