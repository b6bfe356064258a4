//! A callback that forks: the child may come back through the call that its parent is in. Nothing of
//! the comm is mapped there, so the call must end at once, with an error, and leave everything alone.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use rsbucket::ffi::*;

/// The child of the fork; 0 in the child; -1 before.
static CHILD: AtomicI32 = AtomicI32::new(-1);
static CALLED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C-unwind" fn fork_once(_: *mut c_void, result: *const rsb_result) {
    // SAFETY: valid during the callback.
    assert_eq!(unsafe { (*result).status }, RSB_OK);
    CALLED.fetch_add(1, Ordering::Relaxed);
    if CHILD.load(Ordering::Relaxed) == -1 {
        // SAFETY: the child only returns, looks, and leaves.
        CHILD.store(unsafe { libc::fork() }, Ordering::Relaxed);
    }
}

fn error() -> rsb_error {
    rsb_error {
        status: 0,
        native_code: 0,
        peer: 0,
        reserved: 0,
        message: [0; 240],
    }
}

#[test]
fn the_child_of_a_fork_in_a_callback_leaves_its_parents_call() {
    let (mut err, mut comm, mut bucketer) = (error(), ptr::null_mut(), ptr::null_mut());
    let config = rsb_config {
        struct_size: size_of::<rsb_config>(),
        bucket_bytes: 4096,
        flags: 0,
        allocator: ptr::null(),
    };
    let input = [1.5f64; 600];
    let rows = [input.as_ptr().cast::<c_void>()];
    // SAFETY: calls as the header asks for them.
    unsafe {
        assert_eq!(
            rsb_comm_create_local(1, ptr::null(), &mut comm, &mut err),
            RSB_OK
        );
        assert_eq!(
            rsb_bucketer_create(&config, &mut bucketer, &mut err),
            RSB_OK
        );
        let submit = |numel, dtype, err: &mut rsb_error| {
            let (rows, none) = (rows.as_ptr(), ptr::null_mut());
            let op = RSB_OP_SUM;
            rsb_bucketer_reduce_scatter_async(
                bucketer,
                comm,
                rows,
                numel,
                dtype,
                op,
                Some(fork_once),
                none,
                err,
            )
        };
        for dtype in [RSB_DTYPE_F64, RSB_DTYPE_F32, RSB_DTYPE_I32] {
            assert_eq!(submit(7, dtype, &mut err), RSB_OK);
        }
        // A direct op runs the callbacks of what was launched before it, then has work to do.
        assert_eq!(rsb_bucketer_launch(bucketer, &mut err), RSB_OK);
        let status = submit(600, RSB_DTYPE_F64, &mut err);
        let child = CHILD.load(Ordering::Relaxed);
        if child == 0 {
            let alone = CALLED.load(Ordering::Relaxed) == 1;
            let dead = rsb_bucketer_flush(bucketer, &mut err) == RSB_ERR_ABORTED;
            let good = status == RSB_ERR_ABORTED && alone && dead;
            libc::_exit(if good { 0 } else { 1 });
        }
        assert_eq!(status, RSB_OK);
        let mut ended = -1;
        assert_eq!(libc::waitpid(child, &mut ended, 0), child);
        assert_eq!(ended, 0, "how the child has ended");
        assert_eq!(rsb_bucketer_flush(bucketer, &mut err), RSB_OK);
        assert_eq!(CALLED.load(Ordering::Relaxed), 4);
        assert_eq!(rsb_bucketer_free(bucketer), RSB_OK);
        rsb_comm_free(comm);
    }
}
