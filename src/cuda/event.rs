//! Events: marks in a stream, which other streams wait for and the host only ever polls.

use std::ffi::c_uint;
use std::sync::Arc;

use cudarc::driver::sys::{CUevent, CUstream};

use super::context::Context;
use super::driver::{Driver, NOT_READY};
use crate::error::Result;

/// `CU_EVENT_DISABLE_TIMING`: cheaper to record and to wait for.
pub(super) const NO_TIMING: c_uint = 2;

/// An event of ours.
pub struct Event {
    raw: CUevent,
    context: Arc<Context>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new one, which counts as passed until it is recorded. The context is current.
    pub fn new(context: &Arc<Context>) -> Result<Event> {
        let (driver, mut raw) = (context.driver(), std::ptr::null_mut());
        // SAFETY: `raw` receives the event.
        let code = unsafe { (driver.cuEventCreate)(&mut raw, NO_TIMING) };
        driver.check(code, "cuEventCreate")?;
        Ok(Event {
            raw,
            context: context.clone(),
        })
    }

    /// Marks the present end of a stream.
    pub(crate) fn record(&self, stream: CUstream) -> Result<()> {
        let driver = self.context.driver();
        // SAFETY: both are live; streams of callers by the header's rule.
        let code = unsafe { (driver.cuEventRecord)(self.raw, stream) };
        driver.check(code, "cuEventRecord")
    }

    /// What comes next in `stream` comes after this mark.
    pub(crate) fn hold(&self, stream: CUstream) -> Result<()> {
        let driver = self.context.driver();
        // SAFETY: as above.
        let code = unsafe { (driver.cuStreamWaitEvent)(stream, self.raw, 0) };
        driver.check(code, "cuStreamWaitEvent")
    }

    /// Whether the device has passed it. Also tells of a device that has failed.
    pub fn passed(&self) -> Result<bool> {
        let driver = self.context.driver();
        // SAFETY: the event is live.
        match unsafe { (driver.cuEventQuery)(self.raw) } {
            NOT_READY => Ok(false),
            code => driver.check(code, "cuEventQuery").map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter_to_end() {
            // SAFETY: destroyed once; waits for it that are enqueued still hold.
            Driver::end(|| unsafe { (self.context.driver().cuEventDestroy_v2)(self.raw) });
        }
    }
}
