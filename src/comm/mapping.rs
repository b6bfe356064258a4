//! Memory that ranks share, as one owner of one `mmap`.
//!
//! Peers may write a mapped page at any moment, so no reference into it ever exists: only raw
//! pointers come out. Pages are committed before they are used, because a page that the system
//! cannot provide kills the process that touches it.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use super::keeper::{self, Life};
use crate::error::{Error, Result, Status};

/// Commits go in slices of this size: a signal makes the kernel drop what one call has done so
/// far, so one large call might never end under a fast timer.
const SLICE: usize = 2 << 20;

/// A mapping that is unmapped when dropped. The child of a fork does not have it.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    bytes: usize,
    backing: Backing,
    /// Private bytes of ours before the start.
    before: usize,
    life: Option<Life>,
}

/// What stands behind the pages, which decides how they are committed.
#[derive(Debug)]
enum Backing {
    Anonymous,
    Writable(OwnedFd),
    ReadOnly,
}

// SAFETY: the struct is an address range and a descriptor, and belongs to no thread. What is
// behind the pointer is reached through raw pointers, whose users answer for their accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above; `commit` changes no byte and may run beside any access.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private zeroed memory, for ranks that are threads. Costs nothing until committed.
    pub fn anonymous(bytes: usize) -> Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        Mapping::map(bytes, access, flags, -1, Backing::Anonymous)
    }

    /// The first `bytes` of a memory file, shared with everybody who maps it. A writable mapping
    /// keeps a descriptor of its own, for [`Mapping::commit`].
    pub fn of_file(fd: BorrowedFd, bytes: usize, writable: bool) -> Result<Mapping> {
        let (access, backing) = if writable {
            let own = fd.try_clone_to_owned().map_err(|e| {
                Error::new(
                    Status::NoMemory,
                    format!("a descriptor to map {bytes} bytes: {e}"),
                )
                .native(e.raw_os_error().unwrap_or(0))
            })?;
            (libc::PROT_READ | libc::PROT_WRITE, Backing::Writable(own))
        } else {
            (libc::PROT_READ, Backing::ReadOnly)
        };
        Mapping::map(bytes, access, libc::MAP_SHARED, fd.as_raw_fd(), backing)
    }

    /// Puts this process's liveness word at the start of a writable mapping of a file: peers that map
    /// the file see when this process is gone. Its first page is committed.
    pub fn enliven(mut self) -> Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let all = self.bytes.saturating_add(keeper::BEFORE);
        let mut whole = Mapping::map(all, access, flags, -1, Backing::Anonymous)?;
        // SAFETY: moves the file's mapping over the end of a range that is ours, and as long.
        let moved = unsafe {
            let to = whole.start.add(keeper::BEFORE);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap(self.start.cast(), self.bytes, self.bytes, flags, to)
        };
        if moved == libc::MAP_FAILED {
            let what = format_args!("placing {} bytes of shared memory", self.bytes);
            return Err(Error::os(Status::NoMemory, what));
        }
        whole.backing = std::mem::replace(&mut self.backing, Backing::ReadOnly);
        (whole.start, whole.bytes, whole.before) = (moved.cast(), self.bytes, keeper::BEFORE);
        // Nothing is left where the file was mapped.
        std::mem::forget(self);
        // SAFETY: the word is the file's first bytes, its node the private ones before; both stay
        // mapped until this mapping is dropped, which drops the life first.
        whole.life = Some(unsafe { Life::new(whole.start.cast())? });
        Ok(whole)
    }

    fn map(bytes: usize, access: i32, flags: i32, fd: i32, backing: Backing) -> Result<Mapping> {
        // SAFETY: without MAP_FIXED the kernel chooses a free range, so no memory in use changes.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            let what = format_args!("mapping {bytes} bytes of shared memory");
            return Err(Error::os(Status::NoMemory, what));
        }
        let mapping = Mapping {
            start: start.cast(),
            bytes,
            backing,
            before: 0,
            life: None,
        };
        // SAFETY: the range is the one just mapped.
        #[cfg(target_os = "linux")]
        if unsafe { libc::madvise(start, bytes, libc::MADV_DONTFORK) } != 0 {
            let what = format_args!("keeping {bytes} bytes of shared memory from forks");
            return Err(Error::os(Status::NoMemory, what));
        }
        Ok(mapping)
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// How many bytes were mapped.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing: never, the system maps at least a byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Makes the pages of `offset .. offset + bytes` really there, with what they hold.
    ///
    /// `NO_MEMORY` where the system has none; pages that were got before that stay.
    pub fn commit(&self, offset: usize, bytes: usize) -> Result<()> {
        let end = offset.checked_add(bytes).filter(|&end| end <= self.bytes);
        let Some(end) = end else {
            return Err(Error::new(
                Status::NoMemory,
                format!(
                    "committing {bytes} bytes at {offset}: the mapping has {} bytes",
                    self.bytes
                ),
            ));
        };
        let mut at = offset;
        while at < end {
            let slice = SLICE.min(end - at);
            if self.commit_slice(at, slice) != 0 {
                let what = format_args!("committing {bytes} bytes of shared memory at {offset}");
                let error = Error::os(Status::NoMemory, what);
                match error.native {
                    libc::EINTR => continue,
                    // A kernel before 5.14 cannot populate: it finds the pages at first touch.
                    libc::EINVAL if matches!(self.backing, Backing::Anonymous) => return Ok(()),
                    _ => return Err(error),
                }
            }
            at += slice;
        }
        Ok(())
    }

    /// One system call for a range inside the mapping; 0 or -1 and errno.
    #[cfg(target_os = "linux")]
    fn commit_slice(&self, offset: usize, bytes: usize) -> i32 {
        match &self.backing {
            Backing::Writable(fd) => {
                // SAFETY: takes numbers only. A mapping's size fits an off_t.
                unsafe { libc::fallocate(fd.as_raw_fd(), 0, offset as i64, bytes as i64) }
            }
            Backing::Anonymous => {
                // SAFETY: asks for a number.
                let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
                let down = offset - offset % page;
                // SAFETY: `down` is inside the mapping, whose start and end lie on page borders,
                // and populating changes no byte of it.
                unsafe {
                    let start = self.start.add(down).cast();
                    libc::madvise(start, offset - down + bytes, libc::MADV_POPULATE_WRITE)
                }
            }
            Backing::ReadOnly => {
                // The pages belong to another rank, who commits them.
                // SAFETY: errno is this thread's own.
                unsafe { *libc::__errno_location() = libc::EACCES };
                -1
            }
        }
    }

    /// Elsewhere only private memory is mapped, and the system finds pages at first touch.
    #[cfg(not(target_os = "linux"))]
    fn commit_slice(&self, _offset: usize, _bytes: usize) -> i32 {
        0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.life = None;
        // SAFETY: the range was mapped by `map` and is unmapped once; whoever holds a pointer into
        // it holds the mapping too.
        unsafe {
            let start = self.start.sub(self.before);
            libc::munmap(start.cast(), self.before + self.bytes)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_memory_keeps_what_it_holds() {
        let mapping = Mapping::anonymous(3 * SLICE + 5).unwrap();
        assert_eq!(mapping.len(), 3 * SLICE + 5);
        let at = |i: usize| mapping.as_ptr().wrapping_add(i);
        let places = [0, 4095, 4096, SLICE + 7, 3 * SLICE + 4];
        for (n, &i) in places.iter().enumerate() {
            // SAFETY: inside the mapping, which nobody else uses.
            unsafe { at(i).write_volatile(n as u8 + 1) };
        }
        mapping.commit(4097, 0).unwrap();
        mapping.commit(4097, SLICE + 9).unwrap();
        mapping.commit(0, mapping.len()).unwrap();
        for (n, &i) in places.iter().enumerate() {
            // SAFETY: as above.
            assert_eq!(unsafe { at(i).read_volatile() }, n as u8 + 1);
        }
    }

    #[test]
    fn what_cannot_be_had_is_no_memory() {
        let e = Mapping::anonymous(usize::MAX / 2).unwrap_err();
        assert_eq!((e.status, e.native), (Status::NoMemory, libc::ENOMEM));
        assert!(e.message.contains(&(usize::MAX / 2).to_string()), "{e}");
        let mapping = Mapping::anonymous(4096).unwrap();
        for (offset, bytes) in [(0, 4097), (4096, 1), (1, usize::MAX), (usize::MAX, 1)] {
            let e = mapping.commit(offset, bytes).unwrap_err();
            assert_eq!(e.status, Status::NoMemory);
            assert!(e.message.contains("has 4096 bytes"), "{e}");
        }
        mapping.commit(4096, 0).unwrap();
    }
}
