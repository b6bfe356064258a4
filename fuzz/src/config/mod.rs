//! Structs from C: what if a caller's struct is shorter, longer or odder than we think?
//!
//! Every struct and every output ends where a page that may not be touched begins, so that one byte
//! read beyond `struct_size` or written beyond `out_size` faults. The status must be one that the
//! header gives for what is wrong; nothing wrong: RSB_OK. What a refused call was to make, it has not
//! made; what was made is released once.

mod ops;

use std::ffi::{c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rsbucket::ffi::*;

use crate::guard::Guarded;
use crate::input::Input;
use crate::rules::{call, listen};

/// Structs of a later version may be longer; this much longer they are not.
const LONGEST: usize = 4096;

/// What is wrong with a call: the statuses that may answer it. Empty: it must be OK.
#[derive(Default)]
struct Wrong(Vec<rsb_status>);

impl Wrong {
    fn when(&mut self, bad: bool, status: rsb_status) {
        if bad {
            self.0.push(status);
        }
    }

    fn judge(&self, status: rsb_status, what: &str) {
        match status {
            RSB_OK => assert!(
                self.0.is_empty(),
                "{what}: OK; expected one of {:?}",
                self.0
            ),
            _ => assert!(
                self.0.contains(&status),
                "{what}: {status}; expected {:?}",
                self.0
            ),
        }
    }
}

/// A struct as a caller of some version gives it, at the end of its page.
fn place<T: Copy>(input: &mut Input, value: &T, wrong: &mut Wrong) -> Option<Guarded> {
    let known = size_of::<T>();
    let said = match input.below(12) {
        0 => known - 1 - input.below(known),
        1 => known + 1 + input.below(64),
        2 => LONGEST - input.below(3),
        3 => LONGEST + 1 + input.below(9),
        4 => usize::MAX - input.below(9),
        5 => input.u64() as usize,
        6 => return None,
        _ => known,
    };
    // What is longer than any struct must not be looked at beyond its size.
    let there = if said > LONGEST { 8 } else { said.max(8) };
    let guarded = Guarded::holding(value, there);
    // SAFETY: there are eight bytes at least, and as many as `said` where more are used.
    unsafe {
        guarded.as_ptr::<usize>().write_unaligned(said);
        if (known + 1..=LONGEST).contains(&said) && input.yes() {
            let at = known + usize::from(input.u16()) % (said - known);
            guarded.as_ptr::<u8>().add(at).write(1 + input.byte() / 2);
            wrong.when(true, RSB_ERR_UNSUPPORTED);
        }
    }
    wrong.when(said < known || said > LONGEST, RSB_ERR_INVALID_ARGUMENT);
    Some(guarded)
}

fn pointer<T>(place: &Option<Guarded>) -> *mut T {
    place.as_ref().map_or(ptr::null_mut(), Guarded::as_ptr)
}

/// How many engines and allocators live.
static LIVE: AtomicI32 = AtomicI32::new(0);

unsafe extern "C" fn start(_: *mut c_void, coll: *const rsb_coll, _: *mut *mut c_void) -> i32 {
    // SAFETY: the library's, and valid during the call.
    assert_eq!(unsafe { (*coll).struct_size }, size_of::<rsb_coll>());
    7
}

unsafe extern "C" fn test(_: *mut c_void, _: *mut c_void, _: *mut i32) -> i32 {
    panic!("nothing was started");
}

unsafe extern "C" fn release(_: *mut c_void) {
    LIVE.fetch_sub(1, Ordering::Relaxed);
}

unsafe extern "C" fn alloc(
    _: *mut c_void,
    bytes: usize,
    align: usize,
    _: i32,
    _: *mut c_void,
) -> *mut c_void {
    // SAFETY: asked for by the library, with an alignment that is a power of two.
    unsafe { libc::memalign(align, bytes) }
}

unsafe extern "C" fn free(_: *mut c_void, at: *mut c_void, _: usize, _: i32, _: *mut c_void) {
    // SAFETY: from `alloc`.
    unsafe { libc::free(at) };
}

pub fn run(data: &[u8]) {
    listen();
    let mut input = Input::new(data);
    while !input.is_empty() {
        match input.below(6) {
            0 => comm_config(&mut input),
            1 => transport(&mut input),
            2 => bucketer_config(&mut input),
            3 | 4 => ops::submit_args(&mut input),
            _ => ops::stats(&mut input),
        }
    }
    assert_eq!(
        LIVE.load(Ordering::Relaxed),
        0,
        "what was made is released once"
    );
}

/// A pointer that is no address: none of these is ever followed.
fn token(input: &mut Input) -> *mut c_void {
    match input.below(4) {
        0 => input.u64() as *mut c_void,
        1 => 8 as *mut c_void,
        _ => ptr::null_mut(),
    }
}

/// A config for a comm; what is wrong with it on one host, whatever is wrong only there, and elsewhere.
fn config_of(input: &mut Input, size: u32, host: bool, wrong: &mut Wrong) -> rsb_comm_config {
    let config = rsb_comm_config {
        struct_size: 0,
        timeout_ns: input.pick(&[1, 0, 1000, u64::MAX - 1, u64::MAX]),
        flags: match input.below(4) {
            0 => input.u64(),
            1 => RSB_COMM_EXACT,
            _ => 0,
        },
        stream: token(input),
        label: input.pick(&[ptr::null(), c"job".as_ptr(), c"\xff\xfe%n".as_ptr()]),
        result_stream: token(input),
        control: token(input).cast(),
        staging_bytes: match input.below(6) {
            0 => input.u16() as usize,
            1 => input.u64() as usize | 1 << 48,
            2 => 1 << 20,
            _ => 0,
        },
    };
    wrong.when(config.flags & !RSB_COMM_EXACT != 0, RSB_ERR_UNSUPPORTED);
    let streams = !config.stream.is_null() || !config.result_stream.is_null();
    wrong.when(streams, RSB_ERR_INVALID_ARGUMENT);
    wrong.when(!config.control.is_null(), RSB_ERR_BAD_HANDLE);
    if host {
        let least = (size as usize * 64).div_ceil(4096) * 4096 * 4;
        let bytes = config.staging_bytes;
        wrong.when(bytes != 0 && bytes < least, RSB_ERR_INVALID_ARGUMENT);
        wrong.when(bytes > isize::MAX as usize / 4, RSB_ERR_INVALID_ARGUMENT);
        wrong.when(bytes >= 1 << 48, RSB_ERR_NO_MEMORY);
    } else {
        wrong.when(config.staging_bytes != 0, RSB_ERR_INVALID_ARGUMENT);
    }
    config
}

fn comm_config(input: &mut Input) {
    let mut wrong = Wrong::default();
    let local = input.yes();
    let size = match input.below(8) {
        0 => input.u64() as u32,
        1 => 0,
        2 => 1025,
        3 => 64,
        _ => 1 + input.below(4) as u32,
    };
    // What needs other processes is another target's.
    let size = if local { size } else { size.min(1) };
    let places = 1024.min(size.max(1)) as usize;
    wrong.when(size == 0 || size > 1024, RSB_ERR_INVALID_ARGUMENT);
    let mut about = Wrong::default();
    let config = config_of(input, size, true, &mut about);
    let config = place(input, &config, &mut wrong);
    if config.is_some() {
        wrong.0.append(&mut about.0);
    }
    let out = (input.below(8) > 0).then(|| Guarded::new(places * 8));
    wrong.when(out.is_none(), RSB_ERR_INVALID_ARGUMENT);
    let handles = pointer::<*mut rsb_comm>(&out);
    // SAFETY: calls as the header asks for them, but for what is in `wrong`.
    let status = if local {
        call(|err| unsafe { rsb_comm_create_local(size, pointer(&config), handles, err) })
    } else {
        let (name, rank) = (input.pick(&NAMES), input.pick(&[0, 0, 0, 1, u32::MAX]));
        wrong.when(
            name.is_null() || name != NAMES[0] && name != NAMES[1],
            RSB_ERR_INVALID_ARGUMENT,
        );
        wrong.when(rank >= size, RSB_ERR_INVALID_ARGUMENT);
        // SAFETY: as above.
        call(|err| unsafe {
            rsb_comm_create_shm(
                name.cast::<c_char>(),
                rank,
                size,
                pointer(&config),
                handles,
                err,
            )
        })
    };
    wrong.judge(status, "comm");
    let Some(out) = out else { return };
    // SAFETY: there are `places` handles, zero where none was made; OK has made `size`.
    unsafe {
        for i in 0..places {
            let comm = handles.add(i).read();
            assert_eq!(comm.is_null(), status != RSB_OK || i >= size as usize);
            if !comm.is_null() {
                assert_eq!((rsb_comm_rank(comm), rsb_comm_size(comm)), (i as u32, size));
                rsb_comm_free(comm);
            }
        }
    }
    drop(out);
}

/// Names of jobs, the good ones first.
static LONG: [u8; 66] = *b"x234567890123456789012345678901234567890123456789012345678901234x\0";
const NAMES: [*const u8; 7] = [
    c"fuzz.1_-".as_ptr().cast(),
    c"-".as_ptr().cast(),
    ptr::null(),
    c"".as_ptr().cast(),
    c"../up".as_ptr().cast(),
    c"a\xc3\xa9".as_ptr().cast(),
    LONG.as_ptr(),
];

fn transport(input: &mut Input) {
    let mut wrong = Wrong::default();
    let flags = match input.below(4) {
        0 => input.u64(),
        _ => 1 + input.below(7) as u64,
    };
    let some = |input: &mut Input| input.below(12) > 0;
    let table = rsb_transport {
        struct_size: 0,
        flags,
        ctx: token(input),
        start: some(input).then_some(start),
        test: some(input).then_some(test),
        abort: None,
        release: some(input).then_some(release),
        reduce_dtypes: input.u64(),
        max_count: input.pick(&[0, 1, usize::MAX]),
        describe: None,
    };
    let missing = table.start.is_none() || table.test.is_none() || table.release.is_none();
    wrong.when(missing, RSB_ERR_INVALID_ARGUMENT);
    // DEVICE is not built in.
    wrong.when(flags & !7 != 0, RSB_ERR_UNSUPPORTED);
    wrong.when(flags & 3 == 0, RSB_ERR_INVALID_ARGUMENT);
    let (rank, size) = match input.below(3) {
        0 => (input.u64() as u32, input.u64() as u32),
        _ => (0, 1 + input.below(3) as u32),
    };
    wrong.when(
        rank >= size || size > i32::MAX as u32,
        RSB_ERR_INVALID_ARGUMENT,
    );
    let mut about = Wrong::default();
    let config = config_of(input, size, false, &mut about);
    let exact = config.flags & RSB_COMM_EXACT != 0 && flags & RSB_TRANSPORT_ALL_TO_ALL == 0;
    about.when(exact, RSB_ERR_UNSUPPORTED);
    let config = place(input, &config, &mut wrong);
    if config.is_some() {
        wrong.0.append(&mut about.0);
    }
    let table = place(input, &table, &mut wrong);
    wrong.when(table.is_none(), RSB_ERR_INVALID_ARGUMENT);
    let out = Guarded::new(8);
    let status = call(|err| unsafe {
        // SAFETY: a call as the header asks for it, but for what is in `wrong`.
        rsb_comm_create_custom(
            pointer(&table),
            rank,
            size,
            pointer(&config),
            out.as_ptr(),
            err,
        )
    });
    wrong.judge(status, "transport");
    // SAFETY: a handle, or the zeros that were there.
    let comm = unsafe { out.as_ptr::<*mut rsb_comm>().read() };
    assert_eq!(comm.is_null(), status != RSB_OK);
    LIVE.fetch_add(i32::from(status == RSB_OK), Ordering::Relaxed);
    // SAFETY: a handle of ours, or NULL.
    unsafe { rsb_comm_free(comm) };
}

fn bucketer_config(input: &mut Input) {
    let mut wrong = Wrong::default();
    let some = |input: &mut Input| input.below(8) > 0;
    let hook = rsb_allocator {
        struct_size: 0,
        ctx: token(input),
        alloc: some(input).then_some(alloc),
        free: some(input).then_some(free),
        release: some(input).then_some(release),
    };
    let mut about = Wrong::default();
    about.when(
        hook.alloc.is_none() || hook.free.is_none(),
        RSB_ERR_INVALID_ARGUMENT,
    );
    let allocator = place(input, &hook, &mut about);
    let config = rsb_config {
        struct_size: 0,
        bucket_bytes: input.u64() as i64,
        flags: if input.below(4) == 0 { input.u64() } else { 0 },
        allocator: pointer(&allocator),
    };
    if allocator.is_none() {
        about.0.clear();
    }
    about.when(config.flags != 0, RSB_ERR_UNSUPPORTED);
    let config = place(input, &config, &mut wrong);
    if config.is_some() {
        wrong.0.append(&mut about.0);
    }
    let out = Guarded::new(8);
    let given = input.below(8) > 0;
    wrong.when(!given, RSB_ERR_INVALID_ARGUMENT);
    let to = if given { out.as_ptr() } else { ptr::null_mut() };
    // SAFETY: a call as the header asks for it, but for what is in `wrong`.
    let status = call(|err| unsafe { rsb_bucketer_create(pointer(&config), to, err) });
    wrong.judge(status, "bucketer");
    // SAFETY: a handle, or the zeros that were there.
    let bucketer = unsafe { out.as_ptr::<*mut rsb_bucketer>().read() };
    assert_eq!(bucketer.is_null(), status != RSB_OK);
    let hooked = config.is_some() && allocator.is_some() && hook.release.is_some();
    LIVE.fetch_add(i32::from(status == RSB_OK && hooked), Ordering::Relaxed);
    // SAFETY: a handle of ours, or NULL.
    assert_eq!(unsafe { rsb_bucketer_free(bucketer) }, RSB_OK);
}
