//! Device memory for the pools: the driver's, in the order of a stream, or the caller's allocator's.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;

use super::driver::{Address, Driver, SUCCESS};
use super::Device;
use crate::memory::Allocator;

/// Memory of a device in the order of one stream.
pub struct Memory {
    device: Arc<Device>,
    stream: CUstream,
    /// The caller's allocator, for this device and stream; none: the driver's.
    hook: Option<Box<dyn Allocator>>,
}

// SAFETY: the driver takes calls from any thread.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory of `device`, had and given back in the order of `stream`.
    pub fn new(device: &Arc<Device>, stream: CUstream, hook: Option<Box<dyn Allocator>>) -> Memory {
        Memory {
            device: device.clone(),
            stream,
            hook,
        }
    }
}

impl Allocator for Memory {
    fn alloc(&self, bytes: usize) -> *mut u8 {
        let Ok(_entered) = self.device.enter() else {
            return null_mut();
        };
        if let Some(hook) = &self.hook {
            return hook.alloc(bytes);
        }
        let (driver, mut address) = (self.device.driver(), 0 as Address);
        // SAFETY: the context is current, and the stream lives as long as the pool.
        match unsafe { (driver.cuMemAllocAsync)(&mut address, bytes, self.stream) } {
            SUCCESS => address as *mut u8,
            _ => null_mut(),
        }
    }

    unsafe fn free(&self, ptr: *mut u8, bytes: usize) {
        // Without its context the memory is gone anyway; the hook must hear of it all the same.
        let _entered = self.device.context().enter_to_end();
        match &self.hook {
            // SAFETY: by the promise of this function.
            Some(hook) => unsafe { hook.free(ptr, bytes) },
            None => {
                // SAFETY: `ptr` came from `alloc`.
                let free = || unsafe {
                    (self.device.driver().cuMemFreeAsync)(ptr as Address, self.stream)
                };
                Driver::end(free);
            }
        }
    }
}
