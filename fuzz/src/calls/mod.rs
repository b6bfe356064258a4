//! Any program of C calls: does every call do what the header says, whatever came before it?
//!
//! A program runs on one rank alone, on two or three ranks as threads, or on an engine of ours. Bad
//! calls are mixed in; ranks may disagree, abort, or lose their engine or their memory. Values are
//! checked to the bit, callbacks against a model of the buckets (each once, in order), statuses
//! exactly while nothing has failed, counters at the end; and what is OK on one rank is OK on all.

mod bad;
mod callback;
mod engine;
mod memory;
mod model;
mod program;
mod rank;
mod record;
mod values;

use std::collections::BTreeMap;
use std::ptr;

use rsbucket::ffi::*;

use self::engine::Engine;
use self::program::{Program, World};
use self::rank::Rank;
use crate::input::Input;
use crate::rules::{call, listen};

/// How each op ended on one rank.
type Ends = BTreeMap<usize, rsb_status>;

pub fn run(data: &[u8]) {
    listen();
    let program = Program::read(&mut Input::new(data));
    match program.world {
        World::Alone => drop(Rank::run(&program, &local(1)[0])),
        World::Threads(size) => agree(&threads(&program, size)),
        World::Engine { .. } => on_engine(&program),
    }
}

/// A comm, and who this is on it.
pub struct Place {
    pub comm: *mut rsb_comm,
    pub rank: usize,
    pub size: usize,
}

// SAFETY: a handle is a number, for any thread.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

fn config() -> rsb_comm_config {
    rsb_comm_config {
        struct_size: size_of::<rsb_comm_config>(),
        timeout_ns: 0,
        flags: 0,
        stream: ptr::null_mut(),
        label: ptr::null(),
        result_stream: ptr::null_mut(),
        control: ptr::null_mut(),
        staging_bytes: 0,
    }
}

fn local(size: usize) -> Vec<Place> {
    let mut comms = vec![ptr::null_mut(); size];
    let config = rsb_comm_config {
        staging_bytes: 64 << 10,
        ..config()
    };
    // SAFETY: a call as the header asks for it.
    let made =
        call(|err| unsafe { rsb_comm_create_local(size as u32, &config, comms.as_mut_ptr(), err) });
    assert_eq!(made, RSB_OK);
    let place = |(rank, comm)| Place { comm, rank, size };
    comms.into_iter().enumerate().map(place).collect()
}

fn threads(program: &Program, size: usize) -> Vec<Ends> {
    let places = local(size);
    std::thread::scope(|scope| {
        let run = |place| scope.spawn(move || Rank::run(program, place));
        let ranks: Vec<_> = places.iter().map(run).collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

/// What was committed is OK on every rank that took it, and on none otherwise.
fn agree(ranks: &[Ends]) {
    for ends in ranks {
        for (id, status) in ends {
            let others = ranks.iter().filter_map(|r| r.get(id));
            let mut differ = others.filter(|&s| (*s == RSB_OK) != (*status == RSB_OK));
            assert_eq!(
                differ.next(),
                None,
                "op {id} ended with {status} on one rank"
            );
        }
    }
}

fn on_engine(program: &Program) {
    let World::Engine {
        size,
        rank,
        flags,
        dtypes,
        most,
        delay,
        good,
        exact,
    } = program.world
    else {
        return;
    };
    let mut engine = Engine::new(size, rank, delay, good);
    let table = engine.table(flags, dtypes, most);
    let config = rsb_comm_config {
        flags: if exact { RSB_COMM_EXACT } else { 0 },
        ..config()
    };
    let mut comm = ptr::null_mut();
    // SAFETY: a call as the header asks for it; the engine outlives the comm.
    let made = call(|err| unsafe {
        rsb_comm_create_custom(&table, rank as u32, size as u32, &config, &mut comm, err)
    });
    assert_eq!(made, RSB_OK);
    Rank::run(program, &Place { comm, rank, size });
    assert_eq!(engine.released, 1, "the engine is released once");
}
