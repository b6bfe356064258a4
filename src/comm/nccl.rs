//! NCCL as an engine, on a communicator that the caller has made.
//!
//! libnccl is found at run time by a table of our own, since a communicator must be used by the very
//! copy that made it. Results are integers: a later version may return codes that this one does not
//! know.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

use super::engine::{Abilities, Collective, Engine, Kind};
use crate::dtype::{DType, Op};
use crate::error::{unsupported, Error, Result, Status};

/// Names the library to load where none is loaded yet.
const VARIABLE: &str = "RSBUCKET_NCCL_LIB";
/// What it is called.
const NAME: &CStr = c"libnccl.so.2";
/// 2.10, the first with bfloat16, as `ncclGetVersion` counts.
const LEAST: c_int = 21000;
/// As in the original: 0 forbids the collectives of one call.
const FALLBACK: &str = "ENABLE_NCCL_BASE_COLLECTIVES";

const SUCCESS: c_int = 0;
/// A communicator that does not block is still at work on a call.
const IN_PROGRESS: c_int = 7;

type Comm = *mut c_void;
type Stream = *mut c_void;

macro_rules! table {
    ($(required $name:ident ( $($arg:ty),* ) -> $out:ty;)* $(optional $maybe:ident ( $($marg:ty),* ) -> $mout:ty;)*) => {
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> $out,)*
            $($maybe: Option<unsafe extern "C" fn($($marg),*) -> $mout>,)*
        }

        impl Functions {
            /// # Safety
            /// `library` is an open library that is never closed, whose symbols of these names, if
            /// any, are those of nccl.h.
            unsafe fn find(library: *mut c_void) -> std::result::Result<Functions, &'static str> {
                let symbol = |name: &str| {
                    let name = CString::new(name).unwrap_or_default();
                    // SAFETY: by the promise of this function.
                    unsafe { libc::dlsym(library, name.as_ptr()) }
                };
                Ok(Functions {
                    $($name: {
                        let at = symbol(stringify!($name));
                        if at.is_null() {
                            return Err(stringify!($name));
                        }
                        // SAFETY: by the promise of this function; ncclResult_t is an int.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> $out>(at) }
                    },)*
                    $($maybe: {
                        let at = symbol(stringify!($maybe));
                        // SAFETY: as above; a null pointer is none.
                        unsafe { std::mem::transmute::<*mut c_void, Option<unsafe extern "C" fn($($marg),*) -> $mout>>(at) }
                    },)*
                })
            }
        }
    };
}

table! {
    required ncclGetVersion(*mut c_int) -> c_int;
    required ncclGetErrorString(c_int) -> *const c_char;
    required ncclCommCount(Comm, *mut c_int) -> c_int;
    required ncclCommUserRank(Comm, *mut c_int) -> c_int;
    required ncclCommCuDevice(Comm, *mut c_int) -> c_int;
    required ncclCommGetAsyncError(Comm, *mut c_int) -> c_int;
    required ncclGroupStart() -> c_int;
    required ncclGroupEnd() -> c_int;
    required ncclReduce(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Comm, Stream) -> c_int;
    required ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    required ncclSend(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    required ncclRecv(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    optional ncclReduceScatter(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    optional ncclAllGather(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int;
    optional ncclGetLastError(Comm) -> *const c_char;
}

/// The library of this process.
pub struct Library {
    functions: Functions,
}

impl Library {
    /// The copy that is loaded already, else the one that is named, else the system's. What fails is
    /// tried again the next time.
    pub fn get() -> Result<&'static Library> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let library = Library::find()?;
        Ok(LIBRARY.get_or_init(|| library))
    }

    fn find() -> Result<Library> {
        let named = std::env::var(VARIABLE).ok().filter(|path| !path.is_empty());
        let (library, name) = open(named.as_deref())?;
        let refused = |why: String| unsupported!("NCCL is not usable here: {name}: {why}");
        // SAFETY: a libnccl; it is never closed.
        let functions = unsafe { Functions::find(library) }.map_err(|symbol| {
            refused(format!("it has no {symbol}; expected NCCL 2.10 or later"))
        })?;
        let mut version = 0;
        // SAFETY: `version` is an int.
        let code = unsafe { (functions.ncclGetVersion)(&mut version) };
        if code != SUCCESS || version < LEAST {
            return Err(refused(format!(
                "it is NCCL {}; expected 2.10 or later",
                spoken(version)
            ))
            .native(code));
        }
        Ok(Library { functions })
    }
}

/// Opens the library: where it lies, and its name for messages.
fn open(named: Option<&str>) -> Result<(*mut c_void, String)> {
    // SAFETY: the name ends with a NUL; nothing is loaded by this.
    let loaded = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    if !loaded.is_null() {
        return Ok((loaded, "the loaded libnccl.so.2".into()));
    }
    let (path, name) = match named {
        Some(path) => (
            CString::new(path).unwrap_or_default(),
            format!("{VARIABLE}={path}"),
        ),
        None => (NAME.to_owned(), "libnccl.so.2".into()),
    };
    // SAFETY: loading a library runs its constructors; this is the one that the user wants.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        // SAFETY: dlerror's text is this thread's until its next call.
        let why = unsafe { libc::dlerror() };
        let why = match why.is_null() {
            true => "it cannot be loaded".into(),
            // SAFETY: as above.
            false => unsafe { CStr::from_ptr(why) }.to_string_lossy(),
        };
        return Err(unsupported!(
            "NCCL is not usable here: looked for a loaded libnccl.so.2, then for {name}{}: {why}",
            match named {
                Some(_) => "",
                None => " (RSBUCKET_NCCL_LIB is not set)",
            }
        ));
    }
    Ok((library, name))
}

/// A version as NCCL counts it, before and after 2.9.
fn spoken(version: c_int) -> String {
    let unit = if version < 10_000 { 1000 } else { 10_000 };
    format!(
        "{}.{}.{}",
        version / unit,
        version % unit / 100,
        version % 100
    )
}

fn type_code(dtype: DType) -> c_int {
    match dtype {
        DType::I8 => 0,
        DType::U8 => 1,
        DType::I32 => 2,
        DType::I64 => 4,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
    }
}

/// Never `ncclAvg`: it multiplies by 1/n rounded to the element's type. AVG is a sum here.
fn op_code(op: Op) -> c_int {
    match op {
        Op::Sum | Op::Avg => 0,
        Op::Prod => 1,
        Op::Max => 2,
        Op::Min => 3,
    }
}

/// A communicator of the caller's, borrowed.
pub struct Nccl {
    functions: &'static Functions,
    comm: Comm,
    rank: u32,
    size: u32,
    device: i32,
    /// Whether collectives of one call must not be used.
    fallback: bool,
    /// The last group is still at work, as it may be on a communicator that does not block.
    unsettled: AtomicBool,
}

// SAFETY: the communicator may be used from any thread, one at a time, which the lane's lock sees to.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// The engine over a communicator.
    ///
    /// # Safety
    /// `comm` is a live ncclComm_t that outlives the engine.
    pub unsafe fn wrap(comm: Comm) -> Result<Nccl> {
        let functions = &Library::get()?.functions;
        let (mut size, mut rank, mut device, mut state) = (0, 0, 0, 0);
        // SAFETY: by the promise of this function; all receive ints.
        let answers = unsafe {
            [
                (
                    "ncclCommGetAsyncError",
                    (functions.ncclCommGetAsyncError)(comm, &mut state),
                ),
                ("ncclCommCount", (functions.ncclCommCount)(comm, &mut size)),
                (
                    "ncclCommUserRank",
                    (functions.ncclCommUserRank)(comm, &mut rank),
                ),
                (
                    "ncclCommCuDevice",
                    (functions.ncclCommCuDevice)(comm, &mut device),
                ),
            ]
        };
        let failed = answers.into_iter().find(|(_, code)| *code != SUCCESS);
        let failed = failed.or((state != SUCCESS).then_some(("the communicator", state)));
        let mut nccl = Nccl {
            functions,
            comm,
            rank: 0,
            size: 1,
            device,
            fallback: false,
            unsettled: AtomicBool::new(false),
        };
        if let Some((what, code)) = failed {
            let text = format!(
                "nccl_comm: {what} says {code}, {}; expected a communicator that is ready",
                nccl.describe(code)
            );
            return Err(Error::new(Status::Transport, text).native(code));
        }
        (nccl.rank, nccl.size) = (rank as u32, size as u32);
        let forbidden = std::env::var(FALLBACK).is_ok_and(|v| v.trim() == "0");
        nccl.fallback = forbidden || functions.ncclReduceScatter.is_none();
        Ok(nccl)
    }

    /// This rank and the number of ranks.
    pub fn place(&self) -> (u32, u32) {
        (self.rank, self.size)
    }

    /// The device of this rank.
    pub fn device(&self) -> i32 {
        self.device
    }

    /// It does everything, but that its MIN and MAX pass a NaN over, as fmin and fmax do.
    pub fn abilities() -> Abilities {
        Abilities {
            reduce_scatter: true,
            all_to_all: true,
            all_gather: true,
            reduce_dtypes: 0,
            max_count: usize::MAX,
            strided: true,
            keeps_nan: false,
        }
    }

    /// A reduction for every rank: the fallback, and what part-full buckets take.
    ///
    /// # Safety
    /// As for `start`.
    unsafe fn reduces(&self, c: &Collective) -> c_int {
        let (f, bytes) = (self.functions, c.stride * c.dtype.size());
        let (dtype, op) = (type_code(c.dtype), op_code(c.op));
        for root in 0..self.size {
            let send = c.send.wrapping_add(root as usize * bytes);
            // SAFETY: by the promise of this function. Only the root's `recv` is written.
            let code = unsafe {
                let (send, recv, root) = (send.cast(), c.recv.cast(), root as c_int);
                (f.ncclReduce)(send, recv, c.count, dtype, op, root, self.comm, c.stream)
            };
            if code != SUCCESS {
                return code;
            }
        }
        SUCCESS
    }

    /// # Safety
    /// As for `start`.
    unsafe fn exchange(&self, c: &Collective) -> c_int {
        let (f, element) = (self.functions, c.dtype.size());
        let (count, dtype) = (c.count, type_code(c.dtype));
        for peer in 0..self.size {
            let send = c.send.wrapping_add(peer as usize * c.stride * element);
            let recv = c.recv.wrapping_add(peer as usize * c.count * element);
            // SAFETY: by the promise of this function.
            let codes = unsafe {
                let peer = peer as c_int;
                [
                    (f.ncclSend)(send.cast(), count, dtype, peer, self.comm, c.stream),
                    (f.ncclRecv)(recv.cast(), count, dtype, peer, self.comm, c.stream),
                ]
            };
            if let Some(code) = codes.into_iter().find(|&code| code != SUCCESS) {
                return code;
            }
        }
        SUCCESS
    }

    /// # Safety
    /// As for `start`.
    unsafe fn broadcasts(&self, c: &Collective) -> c_int {
        let (f, bytes) = (self.functions, c.count * c.dtype.size());
        for root in 0..self.size {
            let recv = c.recv.wrapping_add(root as usize * bytes);
            // SAFETY: by the promise of this function. Only the root's `send` is read.
            let code = unsafe {
                let (send, recv) = (c.send.cast(), recv.cast());
                let (dtype, root) = (type_code(c.dtype), root as c_int);
                (f.ncclBroadcast)(send, recv, c.count, dtype, root, self.comm, c.stream)
            };
            if code != SUCCESS {
                return code;
            }
        }
        SUCCESS
    }

    /// The communicator's own state.
    fn state(&self) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live, by the promise of `wrap`.
        match unsafe { (self.functions.ncclCommGetAsyncError)(self.comm, &mut state) } {
            SUCCESS => state,
            code => code,
        }
    }
}

fn answer(code: c_int) -> std::result::Result<(), i32> {
    match code {
        SUCCESS => Ok(()),
        code => Err(code),
    }
}

/// The same, where a communicator that does not block may still be at work.
fn allowed(code: c_int) -> std::result::Result<(), i32> {
    answer(if code == IN_PROGRESS { SUCCESS } else { code })
}

impl Engine for Nccl {
    unsafe fn start(&self, c: &Collective) -> std::result::Result<usize, i32> {
        let (send, recv) = (c.send.cast(), c.recv.cast());
        // SAFETY: by the promise of this function; the stream is of the communicator's device.
        let code = unsafe {
            let f = self.functions;
            match (c.kind, f.ncclReduceScatter, f.ncclAllGather) {
                (Kind::ReduceScatter, Some(reduce_scatter), _)
                    if !self.fallback && c.stride == c.count =>
                {
                    let (dtype, op) = (type_code(c.dtype), op_code(c.op));
                    reduce_scatter(send, recv, c.count, dtype, op, self.comm, c.stream)
                }
                (Kind::ReduceScatter, ..) => self.reduces(c),
                (Kind::AllToAll, ..) => self.exchange(c),
                (Kind::AllGather, _, Some(all_gather)) if !self.fallback => {
                    all_gather(send, recv, c.count, type_code(c.dtype), self.comm, c.stream)
                }
                (Kind::AllGather, ..) => self.broadcasts(c),
            }
        };
        allowed(code).map(|()| 0)
    }

    fn test(&self, _request: usize) -> std::result::Result<bool, i32> {
        Ok(true)
    }

    /// The communicator is its owner's to abort.
    fn abort(&self) {}

    fn describe(&self, code: i32) -> String {
        let text = |at: *const c_char| {
            // SAFETY: NCCL's texts are static, or live until this thread's next call.
            (!at.is_null()).then(|| unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned())
        };
        // SAFETY: any code may be asked about.
        let meaning = text(unsafe { (self.functions.ncclGetErrorString)(code) });
        let meaning = meaning.unwrap_or_else(|| "NCCL has no words for it".into());
        // SAFETY: the communicator is live, or NULL, which is allowed.
        let last = self
            .functions
            .ncclGetLastError
            .map(|f| unsafe { f(self.comm) });
        match last.and_then(text).filter(|t| !t.trim().is_empty()) {
            Some(last) => format!("{meaning} ({})", last.trim()),
            None => meaning,
        }
    }

    fn group(&self) -> std::result::Result<(), i32> {
        // SAFETY: closed again by `ungroup`, on the same thread.
        answer(unsafe { (self.functions.ncclGroupStart)() })
    }

    fn ungroup(&self) -> std::result::Result<(), i32> {
        // SAFETY: opened by `group`.
        let code = unsafe { (self.functions.ncclGroupEnd)() };
        self.unsettled.store(code == IN_PROGRESS, Ordering::Relaxed);
        allowed(code)
    }

    fn settled(&self) -> std::result::Result<bool, i32> {
        if !self.unsettled.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let code = self.state();
        self.unsettled.store(code == IN_PROGRESS, Ordering::Relaxed);
        allowed(code).map(|()| code != IN_PROGRESS)
    }

    fn health(&self) -> std::result::Result<(), i32> {
        allowed(self.state())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_spoken_as_nccl_means_them() {
        assert_eq!(spoken(2804), "2.8.4");
        assert_eq!(spoken(21003), "2.10.3");
        assert_eq!(spoken(23007), "2.30.7");
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        let e = open(Some("/nowhere/libnccl.so.2")).err();
        // Another test of this process may have loaded one.
        if let Some(e) = e {
            assert_eq!(e.status, Status::Unsupported);
            assert!(
                e.message
                    .contains("RSBUCKET_NCCL_LIB=/nowhere/libnccl.so.2"),
                "{}",
                e.message
            );
        }
    }

    #[test]
    fn what_is_no_nccl_is_refused_by_its_missing_symbol() {
        // SAFETY: libc itself, which is always open.
        let library = unsafe { libc::dlopen(std::ptr::null(), libc::RTLD_NOW) };
        // SAFETY: it has none of the symbols, so that none is taken for another's.
        let found = unsafe { Functions::find(library) };
        assert_eq!(found.err(), Some("ncclGetVersion"));
    }

    #[test]
    fn averages_travel_as_sums() {
        assert_eq!(op_code(Op::Avg), op_code(Op::Sum));
        let codes: std::collections::BTreeSet<c_int> = DType::ALL.map(type_code).into();
        assert_eq!(codes.len(), DType::ALL.len());
    }
}
