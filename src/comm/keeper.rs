//! Tells peers at once when this process is gone.
//!
//! A small thread of ours has every comm's liveness word on its robust list: when it ends, by whatever
//! kills or replaces the process, the kernel marks those words before it tears the address space down
//! (futex(2), get_robust_list(2)), within about 0.1 ms; a socket or a pidfd would tell only after,
//! 200 ms later for 2 GB, and not at all to those whose socket a forked child still holds. The thread
//! sleeps, and ends with the last comm.

use std::ptr;
use std::sync::atomic::AtomicPtr;
use std::sync::{mpsc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, Result, Status};
use crate::fork;
use crate::sync::{fence, AtomicU32, Ordering};

/// Set in a liveness word by the kernel when the keeper that owned it has ended.
pub const OWNER_DIED: u32 = libc::FUTEX_OWNER_DIED;

/// Bytes before a liveness word's page that must be private, writable memory of the same mapping: the
/// kernel finds the word at a fixed distance from its node in the list.
pub const BEFORE: usize = 4096;

/// Whether the process that owned this word is gone.
#[inline]
pub fn is_gone(word: &AtomicU32) -> bool {
    word.load(Ordering::Acquire) & OWNER_DIED != 0
}

/// An entry of the kernel's robust list.
#[repr(C)]
struct Node {
    next: *mut Node,
}

/// What set_robust_list(2) takes.
#[repr(C)]
struct Head {
    list: Node,
    futex_offset: libc::c_long,
    pending: *mut Node,
}

/// The keeper of one process.
struct Keeper {
    epoch: u32,
    /// Its parent's, which is never freed: it may be locked.
    _before: AtomicPtr<Keeper>,
    running: Mutex<Option<Running>>,
}

struct Running {
    words: usize,
    tid: u32,
    head: Box<Head>,
    end: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

// SAFETY: the list is changed under the keeper's mutex alone; the kernel reads it when the thread has
// ended, or the process is about to.
unsafe impl Send for Running {}

/// This process's keeper. A forked child makes one of its own: its parent's mutex may be taken.
fn keeper() -> &'static Keeper {
    static CURRENT: AtomicPtr<Keeper> = AtomicPtr::new(ptr::null_mut());
    let epoch = fork::epoch();
    loop {
        let seen = CURRENT.load(Ordering::Acquire);
        // SAFETY: keepers are leaked, so a pointer that was ever stored stays valid.
        if let Some(keeper) = unsafe { seen.as_ref() }.filter(|k| k.epoch == epoch) {
            return keeper;
        }
        let fresh = Box::into_raw(Box::new(Keeper {
            epoch,
            _before: AtomicPtr::new(seen),
            running: Mutex::new(None),
        }));
        let swap = CURRENT.compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire);
        if swap.is_err() {
            // SAFETY: nobody has seen it.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

/// A liveness word on the list of this process's keeper, until dropped.
#[derive(Debug)]
pub struct Life {
    word: *const AtomicU32,
    epoch: u32,
}

// SAFETY: a pointer to an atomic in a mapping that outlives this; the list is changed under a mutex.
unsafe impl Send for Life {}
// SAFETY: as above.
unsafe impl Sync for Life {}

impl Life {
    /// Puts `word` on the list.
    ///
    /// # Safety
    /// The word, and a writable private `Node` [`BEFORE`] bytes before it, stay mapped until this is
    /// dropped.
    pub unsafe fn new(word: *const AtomicU32) -> Result<Life> {
        let keeper = keeper();
        let mut running = keeper
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let keeping = match running.as_mut() {
            Some(keeping) => keeping,
            None => running.insert(start()?),
        };
        let node = node_of(word);
        // SAFETY: by the promise of this function; every moment leaves a list that the kernel can
        // walk, since the process may die at any.
        unsafe {
            (*node).next = keeping.head.list.next;
            fence(Ordering::SeqCst);
            ptr::write_volatile(&mut keeping.head.list.next, node);
            (*word).store(keeping.tid | libc::FUTEX_WAITERS, Ordering::Release);
        }
        keeping.words += 1;
        Ok(Life {
            word,
            epoch: keeper.epoch,
        })
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let keeper = keeper();
        if keeper.epoch != self.epoch {
            // In a forked child: the parent's life goes on.
            return;
        }
        let mut running = keeper
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(keeping) = running.as_mut() else {
            return;
        };
        let node = node_of(self.word);
        // SAFETY: every node on the list is mapped until its Life is dropped; see `new`.
        unsafe {
            (*self.word).store(0, Ordering::Release);
            let mut at: *mut Node = &mut keeping.head.list;
            while (*at).next != node {
                at = (*at).next;
            }
            ptr::write_volatile(&mut (*at).next, (*node).next);
        }
        keeping.words -= 1;
        if keeping.words == 0 {
            if let Some(Running {
                end, thread, head, ..
            }) = running.take()
            {
                drop(end);
                let _ = thread.join();
                drop(head);
            }
        }
    }
}

fn node_of(word: *const AtomicU32) -> *mut Node {
    word.cast_mut().cast::<u8>().wrapping_sub(BEFORE).cast()
}

/// Starts the thread, with an empty list and every signal blocked.
fn start() -> Result<Running> {
    let mut head = Box::new(Head {
        list: Node {
            next: ptr::null_mut(),
        },
        futex_offset: BEFORE as libc::c_long,
        pending: ptr::null_mut(),
    });
    // The list is a ring through its head.
    head.list.next = &mut head.list;
    let at = ptr::from_mut::<Head>(&mut head) as usize;
    let (end, ended) = mpsc::channel::<()>();
    let (say, told) = mpsc::channel();
    let run = move || {
        // SAFETY: the head outlives the thread: whoever ends it joins it before dropping the head.
        let set =
            unsafe { libc::syscall(libc::SYS_set_robust_list, at, std::mem::size_of::<Head>()) };
        // SAFETY: takes nothing.
        let tid = unsafe { libc::syscall(libc::SYS_gettid) };
        let _ = say.send((set == 0).then_some(tid as u32));
        let _ = ended.recv();
    };
    let thread = spawn(run)?;
    match told.recv() {
        Ok(Some(tid)) => Ok(Running {
            words: 0,
            tid,
            head,
            end,
            thread,
        }),
        _ => Err(Error::new(
            Status::Unsupported,
            "the kernel has no robust lists, without which a dead rank is not noticed",
        )),
    }
}

/// A thread on which no signal handler of the program ever runs.
fn spawn(run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    // SAFETY: both sets are ours; the caller's mask is restored right after.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let builder = std::thread::Builder::new().name("rsbucket".into());
        let spawned = builder.stack_size(64 << 10).spawn(run);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        spawned.map_err(|e| {
            let text = format!("a thread that tells peers of this process's end: {e}");
            Error::new(Status::NoMemory, text).native(e.raw_os_error().unwrap_or(0))
        })
    }
}
