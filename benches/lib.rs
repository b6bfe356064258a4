//! The library through its C functions, as the benches call it: one rank of a local comm.

use rsbucket::ffi::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

/// One rank's comm and bucketer, and buffers for `ops` ops of one element.
pub struct Rank {
    comm: *mut rsb_comm,
    bucketer: *mut rsb_bucketer,
    input: Vec<f32>,
    output: Vec<f32>,
    called: u64,
}

// SAFETY: handles may be used from any thread, and each rank is moved to one thread whole.
unsafe impl Send for Rank {}

/// The ranks of a new local comm.
pub fn ranks(size: u32, ops: usize) -> Vec<Rank> {
    let mut comms = vec![null_mut(); size as usize];
    // SAFETY: there is room for `size` handles; no config means defaults.
    let status = unsafe { rsb_comm_create_local(size, null(), comms.as_mut_ptr(), null_mut()) };
    assert_eq!(status, RSB_OK);
    comms
        .into_iter()
        .map(|comm| {
            let mut bucketer = null_mut();
            // SAFETY: `bucketer` takes the handle; no config means defaults.
            let status = unsafe { rsb_bucketer_create(null(), &mut bucketer, null_mut()) };
            assert_eq!(status, RSB_OK);
            Rank {
                comm,
                bucketer,
                input: (0..size as usize).map(|i| i as f32 + 1.0).collect(),
                output: vec![0.0; ops],
                called: 0,
            }
        })
        .collect()
}

unsafe extern "C-unwind" fn count(user_data: *mut c_void, result: *const rsb_result) {
    // SAFETY: `user_data` is the counter of the rank whose call runs this callback, and the result
    // is readable while it runs.
    unsafe {
        assert_eq!((*result).status, RSB_OK);
        *user_data.cast::<u64>() += 1;
    }
}

impl Rank {
    /// Submits one op of one element for each output, and flushes: every callback has run.
    pub fn pass(&mut self) {
        let called = (&raw mut self.called).cast();
        let mut args = rsb_submit_args {
            struct_size: size_of::<rsb_submit_args>(),
            inputs: null(),
            flat_input: self.input.as_ptr().cast(),
            output: null_mut(),
            numel: self.input.len(),
            dtype: RSB_DTYPE_F32,
            output_dtype: 0,
            op: RSB_OP_SUM,
            flags: 0,
            scale: 0.0,
            tag: 0,
            stream: null_mut(),
            callback: Some(count),
            user_data: called,
        };
        for output in &mut self.output {
            args.output = (output as *mut f32).cast();
            // SAFETY: the handles are live, and inputs and outputs outlive the flush below.
            let status = unsafe {
                rsb_bucketer_submit(self.bucketer, self.comm, &args, null_mut(), null_mut())
            };
            assert_eq!(status, RSB_OK);
        }
        let before = self.called;
        // SAFETY: the handle is live.
        let status = unsafe { rsb_bucketer_flush(self.bucketer, null_mut()) };
        assert_eq!(status, RSB_OK);
        assert!(self.called > before || self.output.is_empty());
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // SAFETY: both handles are this rank's own, freed once.
        unsafe {
            rsb_bucketer_free(self.bucketer);
            rsb_comm_free(self.comm);
        }
    }
}
