//! A GPU as comms use it: its driver ([`driver`]), context, streams, events, memory and our kernels.
//!
//! Nothing here waits for the device: what has to come later is enqueued behind an event, and what is
//! over is found by polling.

pub mod context;
pub mod driver;
pub mod event;
pub mod kernels;
pub mod memory;
pub mod stream;

use std::ffi::c_void;
use std::sync::Arc;

use self::context::{Context, Entered};
use self::driver::{Address, Driver, INVALID_VALUE};
use self::event::Event;
use self::kernels::Kernels;
use self::stream::Stream;
use crate::error::{invalid, Result};

pub use cudarc::driver::sys::CUstream;

/// What a comm has on its GPU.
pub struct Device {
    kernels: Arc<Kernels>,
    /// Where collectives run, ahead of other work.
    comm: Stream,
    /// In whose order buckets are had and given back. It carries no work, so memory is there at once.
    memory: Stream,
    context: Arc<Context>,
}

impl Device {
    /// Streams and kernels in a context.
    pub fn new(context: Context) -> Result<Arc<Device>> {
        let context = Arc::new(context);
        let entered = context.enter()?;
        let device = Device {
            comm: Stream::new(&context, true)?,
            memory: Stream::new(&context, false)?,
            kernels: Kernels::of(&context)?,
            context: context.clone(),
        };
        drop(entered);
        Ok(Arc::new(device))
    }

    /// The driver.
    pub fn driver(&self) -> &'static Driver {
        self.context.driver()
    }

    /// The kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The stream of collectives.
    pub fn comm(&self) -> CUstream {
        self.comm.raw()
    }

    /// The stream in whose order buckets come and go.
    pub fn memory(&self) -> CUstream {
        self.memory.raw()
    }

    /// Its context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Its context made current while the result lives.
    pub fn enter(&self) -> Result<Entered<'_>> {
        self.context.enter()
    }

    /// A new event. The context is current.
    pub fn event(&self) -> Result<Event> {
        Event::new(&self.context)
    }

    /// Copies memory of the device in `stream`.
    ///
    /// # Safety
    /// Both have `bytes` bytes until `stream` has passed.
    pub unsafe fn copy(
        &self,
        to: *mut u8,
        from: *const u8,
        bytes: usize,
        stream: CUstream,
    ) -> Result<()> {
        // SAFETY: by the promise of this function.
        let code =
            unsafe { (self.driver().cuMemcpyAsync)(to as Address, from as Address, bytes, stream) };
        self.driver().check(code, "cuMemcpyAsync")
    }

    /// Refuses what is not memory of this device. The context is current.
    pub fn check_pointer(&self, pointer: *const u8, name: impl Fn() -> String) -> Result<()> {
        const MEMORY_TYPE: i32 = 2;
        const IS_MANAGED: i32 = 8;
        const DEVICE_ORDINAL: i32 = 9;
        const OF_DEVICE: u32 = 2;
        let driver = self.driver();
        let ask = |attribute: i32, into: *mut c_void| {
            // SAFETY: the attributes are at most four bytes; any number may be asked about.
            match unsafe { (driver.cuPointerGetAttribute)(into, attribute, pointer as Address) } {
                // Unknown to the driver: plain host memory.
                INVALID_VALUE => Ok(false),
                code => driver.check(code, "cuPointerGetAttribute").map(|()| true),
            }
        };
        let (mut kind, mut managed, mut ordinal) = (0u32, 0u32, -1i32);
        if !ask(MEMORY_TYPE, (&raw mut kind).cast())? || kind != OF_DEVICE {
            // Every device reaches managed memory, which may say that it is the host's.
            if ask(IS_MANAGED, (&raw mut managed).cast())? && managed != 0 {
                return Ok(());
            }
            return Err(invalid!(
                "{}: {pointer:p} is host memory; expected memory of device {}",
                name(),
                self.context.ordinal()
            ));
        }
        let known = ask(DEVICE_ORDINAL, (&raw mut ordinal).cast())?;
        if !known || ordinal != self.context.ordinal() {
            return Err(invalid!(
                "{}: {pointer:p} is memory of device {ordinal}; expected device {}",
                name(),
                self.context.ordinal()
            ));
        }
        Ok(())
    }
}
