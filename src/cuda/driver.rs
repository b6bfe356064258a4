//! libcuda, found at run time: its functions as a table, so that the library loads and the host paths
//! work where there is no driver.
//!
//! cudarc has the types. Its functions are not called: their result is a closed Rust enum, which the
//! code of a newer driver would make undefined behaviour, and they panic where a symbol is missing.
//! Here results are integers, and every symbol is there before the first call. Nor is its loader used:
//! it takes `libcuda.so` before `libcuda.so.1`, and where a toolkit's `stubs` are on the loader's path
//! that is a library whose every call fails.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUcontext, CUevent, CUfunction, CUmodule, CUstream};
use libloading::Library;

use crate::error::{unsupported, Error, Result, Status};

/// A device address.
pub type Address = sys::CUdeviceptr;

/// `CUDA_SUCCESS`.
pub const SUCCESS: c_int = 0;
/// `CUDA_ERROR_INVALID_VALUE`.
pub const INVALID_VALUE: c_int = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub const OUT_OF_MEMORY: c_int = 2;
/// `CUDA_ERROR_NOT_READY`.
pub const NOT_READY: c_int = 600;
/// CUDA 11.2, the first with stream-ordered memory, as `cuDriverGetVersion` counts.
const LEAST: c_int = 11020;

/// The driver's library, by the name that it has on every machine, else by a toolkit's link to it.
fn open() -> std::result::Result<Library, String> {
    // SAFETY: loading libcuda runs its constructors, as linking it would.
    let named = |name: &str| unsafe { Library::new(name) };
    named("libcuda.so.1").or_else(|why| {
        named("libcuda.so").map_err(|_| {
            format!(
                "libcuda.so.1 is nowhere where the loader looks (LD_LIBRARY_PATH, the system's \
                 directories): {why}"
            )
        })
    })
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident ( $($arg:ty),* );)*) => {
        /// The functions of libcuda that are used.
        #[allow(non_snake_case)]
        pub struct Driver {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl Driver {
            fn find() -> std::result::Result<Driver, String> {
                // What is called below must never be unloaded.
                let library = ManuallyDrop::new(open()?);
                Ok(Driver {
                    $($name: {
                        let name = stringify!($name);
                        type Found = unsafe extern "C" fn($($arg),*) -> c_int;
                        // SAFETY: the type is the one in cuda.h, a CUresult being an int.
                        let found = unsafe { library.get::<Found>(name.as_bytes()) };
                        *found.map_err(|_| format!("libcuda.so.1 has no {name}"))?
                    },)*
                })
            }
        }
    };
}

table! {
    /// Must come first.
    cuInit(c_uint);
    /// The CUDA version that the driver supports.
    cuDriverGetVersion(*mut c_int);
    /// The name of a code.
    cuGetErrorName(c_int, *mut *const c_char);
    /// A device by ordinal.
    cuDeviceGet(*mut c_int, c_int);
    /// The context that the runtime API and PyTorch use.
    cuDevicePrimaryCtxRetain(*mut CUcontext, c_int);
    /// Gives it back.
    cuDevicePrimaryCtxRelease_v2(c_int);
    /// The calling thread's context.
    cuCtxGetCurrent(*mut CUcontext);
    /// Makes a context current, above the others.
    cuCtxPushCurrent_v2(CUcontext);
    /// Takes it off again.
    cuCtxPopCurrent_v2(*mut CUcontext);
    /// What a thread may do while another captures a graph.
    cuThreadExchangeStreamCaptureMode(*mut c_int);
    /// The device of the current context.
    cuCtxGetDevice(*mut c_int);
    /// Least and greatest priority; greater is a smaller number.
    cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
    /// A stream of ours.
    cuStreamCreateWithPriority(*mut CUstream, c_uint, c_int);
    /// Its end; what it holds is still carried out.
    cuStreamDestroy_v2(CUstream);
    /// The context of a stream.
    cuStreamGetCtx(CUstream, *mut CUcontext);
    /// Whether a stream is being captured into a graph.
    cuStreamIsCapturing(CUstream, *mut c_int);
    /// What comes after in the stream comes after the event.
    cuStreamWaitEvent(CUstream, CUevent, c_uint);
    /// An event.
    cuEventCreate(*mut CUevent, c_uint);
    /// Its place in a stream.
    cuEventRecord(CUevent, CUstream);
    /// Whether that place has been passed.
    cuEventQuery(CUevent);
    /// Its end.
    cuEventDestroy_v2(CUevent);
    /// What a pointer points to.
    cuPointerGetAttribute(*mut c_void, c_int, Address);
    /// Memory in a stream's order.
    cuMemAllocAsync(*mut Address, usize, CUstream);
    /// Gives it back in a stream's order.
    cuMemFreeAsync(Address, CUstream);
    /// Copies in a stream's order.
    cuMemcpyAsync(Address, Address, usize, CUstream);
    /// Kernels from PTX.
    cuModuleLoadData(*mut CUmodule, *const c_void);
    /// Their end.
    cuModuleUnload(CUmodule);
    /// One of them.
    cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    /// Starts one.
    cuLaunchKernel(CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
                   *mut *mut c_void, *mut *mut c_void);
}

impl Driver {
    /// The driver of this machine, or why there is none to use.
    pub fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
        let found = DRIVER.get_or_init(|| {
            let driver = Driver::find()?;
            driver.start()?;
            Ok(driver)
        });
        found
            .as_ref()
            .map_err(|why| unsupported!("CUDA is not usable here: {why}"))
    }

    fn start(&self) -> std::result::Result<(), String> {
        let mut version = 0;
        // SAFETY: cuInit takes no memory, and `version` is an int.
        let codes = unsafe { [(self.cuInit)(0), (self.cuDriverGetVersion)(&mut version)] };
        if let Some(code) = codes.into_iter().find(|&c| c != SUCCESS) {
            return Err(format!("libcuda.so.1: cuInit says {}", self.name(code)));
        }
        if version < LEAST {
            return Err(format!(
                "the driver is for CUDA {}.{}; expected 11.2 or later",
                version / 1000,
                version % 1000 / 10
            ));
        }
        Ok(())
    }

    /// The driver's name for a code.
    pub fn name(&self, code: c_int) -> String {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: `text` receives a static string, if the code is known.
        let known = unsafe { (self.cuGetErrorName)(code, &mut text) } == SUCCESS;
        if !known || text.is_null() {
            return format!("CUresult {code}");
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    }

    /// Ends an object, trying once more should that fail: nobody is left who could.
    pub fn end(end: impl Fn() -> c_int) {
        if end() != SUCCESS {
            end();
        }
    }

    /// The result of function `what`.
    pub fn check(&self, code: c_int, what: &str) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            code => Err(self.failure(code, what)),
        }
    }

    #[cold]
    fn failure(&self, code: c_int, what: &str) -> Error {
        let text = format!("{what} failed with {} ({code})", self.name(code));
        let status = match code {
            OUT_OF_MEMORY => Status::NoMemory,
            _ => Status::Transport,
        };
        Error::new(status, text).native(code)
    }
}
