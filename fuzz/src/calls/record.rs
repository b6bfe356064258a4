//! One op of a rank: its memory, and what must come out of it.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;

use rsbucket::ffi::*;

use super::model::Id;
use super::program::{Op, Output};
use super::rank::Rank;
use super::values::{combine, finish, value, width, write};
use super::Place;

pub struct Record {
    pub rank: *const Rank<'static>,
    pub id: Id,
    pub bucketer: usize,
    pub op: Op,
    pub args: rsb_submit_args,
    pub ticket: Cell<rsb_ticket>,
    pub called: Cell<u32>,
    /// Elements of a shard.
    pub shard: usize,
    /// The bytes that must come out.
    pub wanted: Vec<u8>,
    /// How many of its elements came from callers, and where they begin.
    pub valid: (usize, usize),
    input: Vec<u8>,
    _pieces: Vec<*const c_void>,
    _output: Vec<u8>,
}

impl Record {
    /// The op, ready to be submitted. `echo`: all ranks give what this one gives.
    pub fn new(
        rank: &Rank,
        id: Id,
        bucketer: usize,
        op: Op,
        place: &Place,
        echo: bool,
    ) -> Box<Record> {
        let (size, me, element) = (place.size, place.rank, width(op.dtype));
        let shard = if op.flat {
            op.numel.div_ceil(size)
        } else {
            op.numel
        };
        let total = if op.flat { op.numel } else { shard * size };
        let real = |to: usize, i: usize| to * shard + i < total;
        let mut input = Vec::new();
        for to in 0..size {
            for i in 0..shard {
                // Beyond the end of a flat input is not ours to be read: nonsense lies there.
                let number = if real(to, i) {
                    value(me, to, i, id)
                } else {
                    3.0
                };
                write(op.dtype, number, &mut input);
            }
        }
        let given = |from: usize, i: usize| match (real(me, i), echo) {
            (false, _) => 0.0,
            (true, true) => value(me, me, i, id),
            (true, false) => value(from, me, i, id),
        };
        let row = |to: usize| input.as_ptr().wrapping_add(to * shard * element);
        let pieces: Vec<*const c_void> = (0..size).map(|to| row(to).cast()).collect();
        let (mut args, mut output, mut wanted) = (args_of(&op), Vec::new(), Vec::new());
        let out = if op.output_dtype == 0 {
            op.dtype
        } else {
            op.output_dtype
        };
        for i in 0..shard {
            let held = value(9, me, i, id);
            write(out, held, &mut output);
            let sum = combine(op.op, (0..size).map(|from| given(from, i)));
            write(out, finish(&args, size, sum, held), &mut wanted);
        }
        if op.flat {
            args.flat_input = input.as_ptr().cast();
        } else {
            args.inputs = pieces.as_ptr();
        }
        args.output = match op.output {
            Output::Library => ptr::null_mut(),
            Output::Callers => output.as_mut_ptr().cast(),
            Output::InPlace => pieces[me].cast_mut(),
        };
        let offset = if op.flat { shard * me } else { 0 };
        Box::new(Record {
            rank: ptr::from_ref(rank).cast(),
            id,
            bucketer,
            op,
            args,
            ticket: Cell::new(0),
            called: Cell::new(0),
            shard,
            wanted,
            valid: (total.saturating_sub(me * shard).min(shard), offset),
            input,
            _pieces: pieces,
            _output: output,
        })
    }

    /// Inputs are ours again, unless they were lent or are the output.
    pub fn spoil(&mut self) {
        if self.op.flags & RSB_SUBMIT_BORROW == 0 && self.op.output != Output::InPlace {
            self.input.fill(0xaa);
        }
    }

    /// (payload, padding), in bytes.
    pub fn bytes(&self, size: usize) -> (u64, u64) {
        let element = width(self.op.dtype);
        let real = if self.op.flat {
            self.op.numel
        } else {
            self.shard * size
        };
        let all = self.shard * size;
        ((real * element) as u64, ((all - real) * element) as u64)
    }

    pub fn output_dtype(&self) -> u32 {
        if self.op.output_dtype == 0 {
            self.op.dtype
        } else {
            self.op.output_dtype
        }
    }
}

fn args_of(op: &Op) -> rsb_submit_args {
    rsb_submit_args {
        struct_size: size_of::<rsb_submit_args>(),
        inputs: ptr::null(),
        flat_input: ptr::null(),
        output: ptr::null_mut(),
        numel: op.numel,
        dtype: op.dtype,
        output_dtype: op.output_dtype,
        op: op.op,
        flags: op.flags,
        scale: op.scale,
        tag: op.tag,
        stream: ptr::null_mut(),
        callback: None,
        user_data: ptr::null_mut(),
    }
}
