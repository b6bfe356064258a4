//! Hostile control memory: what would a peer that writes anything anywhere do to us?
//!
//! One rank of ours runs a program of C calls under a short timeout. The control memory of its peers,
//! and the group word, belong to the fuzzer: a mirror thread plays peers that do what we do, and lies
//! where the script says; between our calls any word of it may change. The library may answer with
//! errors, waits that end, or wrong sums. It may not panic, reach outside of the memory (which the
//! sanitizer guards), wait for ever, lose a callback, or name a rank that does not exist.

use std::alloc::{alloc_zeroed, dealloc};
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use rsbucket::comm::control::{CallRecord, Head, Layout, Line, CALLS};
use rsbucket::comm::group::Group;
use rsbucket::comm::shrink::Origin;
use rsbucket::comm::word::Verdict;
use rsbucket::ffi::*;
use rsbucket::lane::{Endpoint, Options};

use crate::input::Input;
use crate::rules::{full, listen, run_dir, told, STICKY};

/// The memory of all ranks, and what all of them may write.
struct Memory {
    layout: Layout,
    ranks: Vec<*mut u8>,
    verdict: Verdict,
}

// SAFETY: peers' memory is used through atomics alone; our rank's is the library's.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn room(layout: &Layout) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(layout.total, 4096).unwrap()
    }

    fn new(layout: Layout, size: usize) -> Memory {
        // SAFETY: the layout is not empty.
        let rank = |_| unsafe { alloc_zeroed(Memory::room(&layout)) };
        Memory {
            layout,
            ranks: (0..size).map(rank).collect(),
            verdict: Verdict::new(),
        }
    }

    fn head(&self, rank: usize) -> &Head {
        // SAFETY: every rank's memory begins with a head, all of it atomics.
        unsafe { &*self.ranks[rank].cast() }
    }

    fn line(&self, rank: usize, seq: u64) -> &Line {
        let at = seq as usize & (self.layout.lines - 1);
        // SAFETY: inside the ring of lines.
        unsafe {
            &*self.ranks[rank]
                .add(self.layout.lines_at)
                .cast::<Line>()
                .add(at)
        }
    }

    /// Word `at` of a rank's control memory, or of what all may write.
    fn spot(&self, rank: usize, lie: &Lie) -> &AtomicU64 {
        let (start, bytes) = match lie.place {
            0 if lie.at % 4 == 0 => {
                let ended = std::ptr::from_ref(&self.verdict.ended).cast();
                // SAFETY: the flag has a cache line of its own, all of it ours.
                return unsafe { &*ended };
            }
            0 => return &self.verdict.word.0,
            1 => (0, size_of::<Head>()),
            2 => (self.layout.lines_at, self.layout.lines * size_of::<Line>()),
            _ => (self.layout.calls_at, CALLS * size_of::<CallRecord>()),
        };
        // SAFETY: inside the part that was chosen, which is all atomics, eight bytes at a time.
        unsafe { &*self.ranks[rank].add(start + lie.at * 8 % bytes).cast() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for &rank in &self.ranks {
            // SAFETY: allocated by `new`.
            unsafe { dealloc(rank, Memory::room(&self.layout)) };
        }
    }
}

/// One word of peers' memory that changes; `when`: as our rank publishes that chunk.
#[derive(Clone, Copy, Debug)]
struct Lie {
    when: u64,
    rank: usize,
    place: usize,
    at: usize,
    value: u64,
}

impl Lie {
    fn read(input: &mut Input) -> Lie {
        let (when, rank, place) = (input.below(32) as u64, input.below(3), input.below(4));
        let at = input.u16() as usize;
        let value = match input.below(8) {
            0 => 0,
            1 => u64::from(input.byte()),
            2 => u64::MAX - u64::from(input.byte()),
            3 => u64::from(input.byte()) << 32 | u64::from(input.byte()),
            // An end of the group: status, origin, culprit, committed.
            4 => u64::from(input.byte()) << 56 | u64::from(input.u16()) << 32 | 0x8000_0000,
            5 => u64::from(input.byte()) << 56 | u64::from(input.u16()) << 36 | 3,
            6 => u64::from(libc::FUTEX_OWNER_DIED),
            _ => input.u64(),
        };
        Lie {
            when,
            rank,
            place,
            at,
            value,
        }
    }

    fn tell(&self, memory: &Memory, us: usize) {
        let size = memory.ranks.len();
        let rank = (us + 1 + self.rank % (size - 1)) % size;
        memory.spot(rank, self).store(self.value, Ordering::SeqCst);
    }
}

/// Plays the peers: publishes what our rank publishes, and lies on time.
fn mirror(memory: &Memory, us: usize, lies: &[Lie], over: &AtomicBool) {
    let mut seq = 0;
    while !over.load(Ordering::Acquire) {
        let ours = memory.line(us, seq);
        if ours.ready.load(Ordering::Acquire) != seq + 1 {
            std::thread::yield_now();
            continue;
        }
        for rank in (0..memory.ranks.len()).filter(|&r| r != us) {
            let theirs = memory.line(rank, seq);
            let words = [
                (&theirs.lo, &ours.lo),
                (&theirs.hi, &ours.hi),
                (&theirs.calls, &ours.calls),
                (&theirs.place, &ours.place),
            ];
            for (to, from) in words {
                to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        let now = |lie: &&Lie| lie.when == seq;
        lies.iter().filter(now).for_each(|lie| lie.tell(memory, us));
        for rank in (0..memory.ranks.len()).filter(|&r| r != us) {
            memory
                .line(rank, seq)
                .ready
                .store(seq + 1, Ordering::Release);
            memory
                .head(rank)
                .consumed
                .0
                .store(seq + 1, Ordering::Release);
        }
        seq += 1;
    }
}

/// How often callbacks ran.
static CALLED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C-unwind" fn called(size: *mut c_void, result: *const rsb_result) {
    CALLED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the result, its error and its data live during the call.
    unsafe {
        let r = &*result;
        let element = rsb_dtype_size(r.dtype);
        if r.status == RSB_OK {
            let data = r.data.cast::<u8>();
            (0..r.numel * element).for_each(|i| _ = std::hint::black_box(data.add(i).read()));
        } else {
            check(&*r.error, size as usize);
            assert_eq!((*r.error).status, r.status);
        }
    }
}

fn check(err: &rsb_error, size: usize) {
    full(err);
    assert!(
        err.peer < size as i32,
        "rank {} of {size}: {err:?}",
        err.peer
    );
}

pub fn run(data: &[u8]) {
    listen();
    // Where survivors that do not exist are looked for.
    run_dir();
    let mut input = Input::new(data);
    let size = 2 + input.below(2);
    let us = input.below(size);
    let staging = input.pick(&[16 << 10, 32 << 10, 128 << 10]);
    let options = Options {
        timeout: Some(Duration::from_micros(input.pick(&[100, 500, 2000]))),
        ..Options::default()
    };
    let layout = Layout::new(staging, size as u32).unwrap();
    let memory = Arc::new(Memory::new(layout, size));
    let bases = memory.ranks.clone();
    // SAFETY: the memory lives as long as the group keeps it; our rank's is written by it alone.
    let group = unsafe {
        let commit = Box::new(|_, _| Ok(()));
        let keep = Box::new(memory.clone());
        Group::new(
            us as u32,
            layout,
            bases,
            false,
            &memory.verdict,
            commit,
            keep,
        )
    };
    let origin = Origin::Shm {
        name: "fuzz".into(),
        generation: 0,
    };
    let comm = handle_of(Endpoint::on_group(group, origin, &options));
    let lies: Vec<Lie> = (0..input.below(6)).map(|_| Lie::read(&mut input)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mirrored = input.below(8) > 0;
        let peers = mirrored.then(|| scope.spawn(|| mirror(&memory, us, &lies, &over)));
        program(&mut input, comm, &memory, us);
        over.store(true, Ordering::Release);
        // Joined, so that nothing of the thread is left when the leak check looks.
        peers.map(|thread| thread.join().unwrap());
    });
}

/// Our rank's calls, with lies between them.
fn program(input: &mut Input, comm: *mut rsb_comm, memory: &Memory, us: usize) {
    let size = memory.ranks.len();
    let call = |body: &mut dyn FnMut(*mut rsb_error) -> rsb_status| {
        let mut err = crate::rules::fresh();
        let status = body(&mut err);
        if told(status, &err) < 0 {
            check(&err, size);
        }
        status
    };
    let config = rsb_config {
        struct_size: size_of::<rsb_config>(),
        bucket_bytes: input.pick(&[4096, 64, 65536, -1]),
        flags: 0,
        allocator: ptr::null(),
    };
    let mut bucketer = ptr::null_mut();
    // SAFETY: from here on, calls as the header asks for them.
    call(&mut |err| unsafe { rsb_bucketer_create(&config, &mut bucketer, err) });
    let rows: Vec<u8> = (0..8 * 6000).map(|i| (i * 7 % 251) as u8).collect();
    let pieces = vec![rows.as_ptr().cast::<c_void>(); size];
    let mut gathered = vec![0u8; 9000 * size];
    let (mut accepted, mut ticket, mut made) = (0, 0, Vec::new());
    CALLED.store(0, Ordering::Relaxed);
    for _ in 0..48 {
        if input.is_empty() {
            break;
        }
        match input.below(12) {
            0..=2 => {
                let numel = input.pick(&[0, 1, 3, 16, 63, 300, 1500, 6000]);
                let mut args = rsb_submit_args {
                    struct_size: size_of::<rsb_submit_args>(),
                    inputs: pieces.as_ptr(),
                    flat_input: ptr::null(),
                    output: ptr::null_mut(),
                    numel,
                    dtype: 1 + input.below(8) as u32,
                    output_dtype: 0,
                    op: input.pick(&[1, 3, 4, 5]),
                    flags: input.pick(&[0, RSB_SUBMIT_BORROW]),
                    scale: 0.0,
                    tag: u64::from(input.byte()),
                    stream: ptr::null_mut(),
                    callback: Some(called),
                    user_data: size as *mut c_void,
                };
                if input.yes() {
                    (args.inputs, args.flat_input) = (ptr::null(), rows.as_ptr().cast());
                }
                // SAFETY: the rows have room for the largest op.
                let submit = &mut |err| unsafe {
                    rsb_bucketer_submit(bucketer, comm, &args, &mut ticket, err)
                };
                accepted += u32::from(call(submit) == RSB_OK);
            }
            // SAFETY: handles of ours, here and below.
            3 => drop(call(&mut |err| unsafe {
                rsb_bucketer_launch(bucketer, err)
            })),
            4 => drop(call(&mut |err| unsafe {
                rsb_bucketer_flush(bucketer, err)
            })),
            // SAFETY: as above.
            5 => drop(call(&mut |err| unsafe {
                rsb_bucketer_poll(bucketer, ptr::null_mut(), err)
            })),
            6 => {
                let time = input.pick(&[0, 50_000, u64::MAX]);
                let which = ticket.saturating_sub(input.below(3) as u64);
                // SAFETY: as above.
                call(&mut |err| unsafe { rsb_bucketer_wait(bucketer, which, time, err) });
            }
            7 => {
                let bytes = input.pick(&[0, 1, 64, 4096, 9000]);
                let (from, to) = (rows.as_ptr().cast(), gathered.as_mut_ptr().cast());
                // SAFETY: both have room for the largest.
                call(&mut |err| unsafe { rsb_comm_all_gather(comm, from, to, bytes, err) });
            }
            8 => {
                let config = rsb_comm_config {
                    struct_size: size_of::<rsb_comm_config>(),
                    timeout_ns: 1_000_000,
                    flags: 0,
                    stream: ptr::null_mut(),
                    label: c"smaller".as_ptr(),
                    result_stream: ptr::null_mut(),
                    control: ptr::null_mut(),
                    staging_bytes: 16 << 10,
                };
                let mut smaller = ptr::null_mut();
                // SAFETY: as above.
                if call(&mut |err| unsafe { rsb_comm_shrink(comm, &config, &mut smaller, err) })
                    == RSB_OK
                {
                    made.push(smaller);
                }
            }
            9 => {
                let mut err = crate::rules::fresh();
                // SAFETY: as above.
                let status = told(unsafe { rsb_comm_status(comm, &mut err) }, &err);
                assert!(status == RSB_OK || STICKY.contains(&status), "{err:?}");
                if input.below(4) == 3 {
                    // SAFETY: as above.
                    unsafe { rsb_comm_abort(comm) };
                }
            }
            _ => Lie::read(input).tell(memory, us),
        }
    }
    // SAFETY: handles of ours, freed once.
    unsafe {
        rsb_comm_free(comm);
        rsb_bucketer_free(bucketer);
        made.into_iter().for_each(|comm| rsb_comm_free(comm));
    }
    assert_eq!(
        CALLED.load(Ordering::Relaxed),
        accepted,
        "callbacks of accepted ops"
    );
}
