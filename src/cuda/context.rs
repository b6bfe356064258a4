//! The context that a comm works in: pushed around our calls, so that the caller's own stays current
//! before and after them.

use std::ffi::c_int;

use cudarc::driver::sys::{CUcontext, CUstream};

use super::driver::{Driver, SUCCESS};
use super::event::NO_TIMING;
use crate::error::{invalid, Result};

/// A context, and whether a reference to it is ours.
pub struct Context {
    driver: &'static Driver,
    raw: CUcontext,
    ordinal: i32,
    retained: bool,
}

// SAFETY: contexts may be current in several threads at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// `CU_STREAM_CAPTURE_MODE_RELAXED`: our polling must not spoil a capture that goes on elsewhere.
const RELAXED: c_int = 2;

/// Whether a code is about what was handed over, and not about the device: `CUDA_ERROR_INVALID_VALUE`,
/// `_INVALID_CONTEXT`, `_INVALID_HANDLE`, `_CONTEXT_IS_DESTROYED`.
fn is_wrong_handle(code: c_int) -> bool {
    matches!(code, 1 | 201 | 400 | 709)
}

/// While it lives, the context is this thread's current one.
pub struct Entered<'a> {
    driver: &'a Driver,
    mode: Option<c_int>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: undoes on the same thread what was done when this was made.
        unsafe {
            if let Some(mode) = &mut self.mode {
                (self.driver.cuThreadExchangeStreamCaptureMode)(mode);
            }
            // Once more, should it fail: the caller's context must be current again.
            if (self.driver.cuCtxPopCurrent_v2)(&mut popped) != SUCCESS {
                (self.driver.cuCtxPopCurrent_v2)(&mut popped);
            }
        }
    }
}

impl Context {
    /// The current context of this thread, if there is one.
    fn current(driver: &'static Driver) -> Result<Option<Context>> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` receives a context or null.
        let code = unsafe { (driver.cuCtxGetCurrent)(&mut raw) };
        driver.check(code, "cuCtxGetCurrent")?;
        if raw.is_null() {
            return Ok(None);
        }
        let mut ordinal = 0;
        // SAFETY: a context is current.
        let code = unsafe { (driver.cuCtxGetDevice)(&mut ordinal) };
        driver.check(code, "cuCtxGetDevice")?;
        Ok(Some(Context {
            driver,
            raw,
            ordinal,
            retained: false,
        }))
    }

    /// The current context, which a custom engine works in.
    pub fn of_caller(driver: &'static Driver) -> Result<Context> {
        Context::current(driver)?.ok_or_else(|| {
            invalid!("transport->flags: DEVICE, and no CUDA context is current; expected one")
        })
    }

    /// The context of device `ordinal`: the current one if it is of that device, else the primary one.
    pub fn of_device(driver: &'static Driver, ordinal: i32) -> Result<Context> {
        if let Some(current) = Context::current(driver)?.filter(|c| c.ordinal == ordinal) {
            return Ok(current);
        }
        let (mut device, mut raw) = (0, std::ptr::null_mut());
        // SAFETY: both receive what they are made for.
        unsafe {
            driver.check((driver.cuDeviceGet)(&mut device, ordinal), "cuDeviceGet")?;
            driver.check(
                (driver.cuDevicePrimaryCtxRetain)(&mut raw, device),
                "cuDevicePrimaryCtxRetain",
            )?;
        }
        Ok(Context {
            driver,
            raw,
            ordinal,
            retained: true,
        })
    }

    /// The driver.
    pub fn driver(&self) -> &'static Driver {
        self.driver
    }

    /// The device.
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// Whether both are the same to the driver.
    pub fn is(&self, other: &Context) -> bool {
        self.raw == other.raw
    }

    /// Makes the context current while the result lives.
    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context lives while this comm does: by our reference, or by the caller's.
        let code = unsafe { (self.driver.cuCtxPushCurrent_v2)(self.raw) };
        self.driver.check(code, "cuCtxPushCurrent")?;
        let mut entered = Entered {
            driver: self.driver,
            mode: None,
        };
        let mut mode = RELAXED;
        // SAFETY: `mode` is an int; it receives the thread's own mode.
        let code = unsafe { (self.driver.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        self.driver
            .check(code, "cuThreadExchangeStreamCaptureMode")?;
        entered.mode = Some(mode);
        Ok(entered)
    }

    /// The same for an end that must be made: tried once more.
    pub fn enter_to_end(&self) -> Result<Entered<'_>> {
        self.enter().or_else(|_| self.enter())
    }

    /// Refuses a stream of another device or context. The context is current.
    pub(crate) fn check_stream(&self, stream: CUstream, name: &str) -> Result<()> {
        if stream.is_null() {
            return Ok(());
        }
        let mut owner: CUcontext = std::ptr::null_mut();
        // SAFETY: the stream is the caller's, live by the header's rule.
        let code = unsafe { (self.driver.cuStreamGetCtx)(stream, &mut owner) };
        if is_wrong_handle(code) {
            return Err(invalid!(
                "{name}: cuStreamGetCtx says {}; expected a stream of device {}",
                self.driver.name(code),
                self.ordinal
            ));
        }
        self.driver.check(code, "cuStreamGetCtx")?;
        if owner != self.raw {
            let code = self.mark_once(stream)?;
            if is_wrong_handle(code) {
                return Err(invalid!(
                    "{name}: a stream of another device or context (cuEventRecord says {}); expected \
                     one of the comm's, on device {}",
                    self.driver.name(code),
                    self.ordinal
                ));
            }
            self.driver.check(code, "cuEventRecord")?;
        }
        Ok(())
    }

    /// What the driver says to an event of this context in `stream`: contexts may be two names of one.
    fn mark_once(&self, stream: CUstream) -> Result<c_int> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the event lives between its making and its end; the stream is the caller's, live.
        unsafe {
            let code = (self.driver.cuEventCreate)(&mut event, NO_TIMING);
            self.driver.check(code, "cuEventCreate")?;
            let code = (self.driver.cuEventRecord)(event, stream);
            Driver::end(|| (self.driver.cuEventDestroy_v2)(event));
            Ok(code)
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.retained {
            // SAFETY: retained once when this was made.
            Driver::end(|| unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.ordinal) });
        }
    }
}
