//! Memory that ends exactly where the next page may not be touched: whoever reads or writes one byte
//! beyond it faults. The sanitizer does not see what is mapped; the processor does.

use std::ptr;

const PAGE: usize = 4096;

pub struct Guarded {
    map: *mut u8,
    pages: usize,
    bytes: usize,
}

impl Guarded {
    /// `bytes` zeros before a page that faults.
    pub fn new(bytes: usize) -> Guarded {
        let pages = bytes.div_ceil(PAGE).max(1);
        let (access, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: the kernel chooses a free range; its last page is taken out of use.
        let map = unsafe {
            let map = libc::mmap(ptr::null_mut(), (pages + 1) * PAGE, access, flags, -1, 0);
            assert!(map != libc::MAP_FAILED);
            let end = map.cast::<u8>().add(pages * PAGE);
            assert_eq!(libc::mprotect(end.cast(), PAGE, libc::PROT_NONE), 0);
            map.cast()
        };
        Guarded { map, pages, bytes }
    }

    /// As much of `value`'s bytes as `bytes` holds.
    pub fn holding<T: Copy>(value: &T, bytes: usize) -> Guarded {
        let guarded = Guarded::new(bytes);
        let known = bytes.min(size_of::<T>());
        // SAFETY: the value has that many bytes, and so has the memory.
        unsafe {
            guarded
                .as_ptr::<u8>()
                .copy_from(ptr::from_ref(value).cast(), known)
        };
        guarded
    }

    /// The first byte.
    pub fn as_ptr<T>(&self) -> *mut T {
        self.map.wrapping_add(self.pages * PAGE - self.bytes).cast()
    }

    /// What it holds, a copy.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: the bytes are mapped, and nobody writes them meanwhile.
        unsafe { std::slice::from_raw_parts(self.as_ptr::<u8>(), self.bytes).to_vec() }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped once.
        unsafe { libc::munmap(self.map.cast(), (self.pages + 1) * PAGE) };
    }
}
