//! Streams of ours, and what is asked of those of callers.

use std::ffi::{c_int, c_uint};
use std::ops::RangeInclusive;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;

use super::context::Context;
use super::driver::{Driver, SUCCESS};
use crate::error::{unsupported, Result};

/// `CU_STREAM_NON_BLOCKING`: not in the order of the legacy default stream.
const NON_BLOCKING: c_uint = 1;

/// The codes from `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED` to `CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD`.
const CAPTURE_ERRORS: RangeInclusive<c_int> = 900..=908;

/// A stream of ours.
pub struct Stream {
    raw: CUstream,
    context: Arc<Context>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new one, ahead of others if `urgent`. The context is current.
    pub fn new(context: &Arc<Context>, urgent: bool) -> Result<Stream> {
        let driver = context.driver();
        let (mut least, mut greatest) = (0, 0);
        let mut raw = std::ptr::null_mut();
        // SAFETY: all receive what they are made for.
        unsafe {
            let code = (driver.cuCtxGetStreamPriorityRange)(&mut least, &mut greatest);
            driver.check(code, "cuCtxGetStreamPriorityRange")?;
            let priority = if urgent { greatest } else { least };
            let code = (driver.cuStreamCreateWithPriority)(&mut raw, NON_BLOCKING, priority);
            driver.check(code, "cuStreamCreateWithPriority")?;
        }
        Ok(Stream {
            raw,
            context: context.clone(),
        })
    }

    /// As the driver names it.
    pub fn raw(&self) -> CUstream {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter_to_end() {
            // SAFETY: destroyed once; what it holds is still carried out.
            Driver::end(|| unsafe { (self.context.driver().cuStreamDestroy_v2)(self.raw) });
        }
    }
}

/// Refuses a stream that is being captured into a graph: what a bucketer enqueues depends on the calls
/// before, so a replay could not repeat it. The context is current.
pub(crate) fn refuse_capture(context: &Context, stream: CUstream, name: &str) -> Result<()> {
    let (driver, mut capturing): (_, c_int) = (context.driver(), 0);
    // SAFETY: the stream is live by the header's rule, and `capturing` an int.
    let code = unsafe { (driver.cuStreamIsCapturing)(stream, &mut capturing) };
    // The legacy stream says by an error that another one is being captured.
    if !CAPTURE_ERRORS.contains(&code) {
        driver.check(code, "cuStreamIsCapturing")?;
    }
    if code != SUCCESS || capturing != 0 {
        return Err(unsupported!(
            "{name}: it is being captured into a CUDA graph ({}); expected a stream that is not",
            driver.name(code)
        ));
    }
    Ok(())
}
