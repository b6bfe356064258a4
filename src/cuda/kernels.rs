//! Our kernels: packing, and the reduction with its last step. Loaded from the PTX that is checked in,
//! which every driver since CUDA 11.2 compiles for its device; `kernels.cu` is its source.

use std::ffi::{c_void, CStr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{CUfunction, CUmodule, CUstream};

use super::context::Context;
use super::driver::{Address, Driver, OUT_OF_MEMORY, SUCCESS};
use crate::dtype::{DType, Op};
use crate::error::{unsupported, Result};

/// The kernels, for the driver's compiler.
const PTX: &str = concat!(include_str!("kernels.ptx"), "\0");
/// Bytes of the source that a block takes.
const CHUNK: usize = 16384;
/// Threads of a block.
const THREADS: u32 = 256;
/// Pieces that one launch packs, in the small form and in the large one.
const FEW: usize = 16;
const MANY: usize = 127;
/// Pieces that one launch finishes.
const PARTS: usize = 101;
/// Marks a segment whose result is added to what is there.
const ACCUMULATE: u32 = 0x100;

/// One piece to pack; all in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Copy {
    /// Where it lies.
    pub from: Address,
    /// Where it goes in the bucket.
    pub at: u64,
    /// How long it is; of one row, for rows.
    pub bytes: u64,
    end: u32,
    /// 0: one piece. Else rows end to end, and one more than the bytes that the last ones lack.
    pub rows: u32,
}

impl Copy {
    /// `bytes` from `from` to place `at`.
    pub fn piece(from: *const u8, at: usize, bytes: usize) -> Copy {
        Copy {
            from: from as Address,
            at: at as u64,
            bytes: bytes as u64,
            end: 0,
            rows: 0,
        }
    }

    /// Rows of `bytes` end to end, of which the last `lacking` bytes do not exist and count as zeros.
    pub fn rows(from: *const u8, at: usize, bytes: usize, lacking: usize) -> Copy {
        Copy {
            rows: 1 + lacking as u32,
            ..Copy::piece(from, at, bytes)
        }
    }
}

#[repr(C)]
struct Pack<const N: usize> {
    bucket: Address,
    stride: u64,
    rows: u32,
    segments: u32,
    segment: [Copy; N],
}

/// One result to write.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Part {
    /// Where it goes.
    pub to: Address,
    /// Its first element in a row.
    pub at: u64,
    /// Its elements.
    pub count: u64,
    /// The factor.
    pub scale: f64,
    end: u32,
    output: u32,
}

impl Part {
    /// `count` elements from `at` on, to `to`.
    pub fn new(to: *mut u8, at: usize, count: usize, finish: &crate::dtype::Finish) -> Part {
        let accumulate = if finish.accumulate { ACCUMULATE } else { 0 };
        Part {
            to: to as Address,
            at: at as u64,
            count: count as u64,
            scale: finish.scale,
            end: 0,
            output: finish.output as u32 | accumulate,
        }
    }
}

#[repr(C)]
struct Reduce {
    source: Address,
    stride: u64,
    divisor: f64,
    factor: f64,
    rows: u32,
    op: u32,
    segments: u32,
    reserved: u32,
    segment: [Part; PARTS],
}

const _: () = assert!(
    size_of::<Pack<FEW>>() == 536
        && size_of::<Pack<MANY>>() == 4088
        && size_of::<Reduce>() == 4088
        && size_of::<Copy>() == 32
        && size_of::<Part>() == 40
);

/// Rows to reduce.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// The first.
    pub source: *const u8,
    /// Elements from one to the next.
    pub stride: usize,
    /// How many.
    pub count: u32,
    /// What was or is to be done with them.
    pub op: Op,
    /// Type of their elements.
    pub dtype: DType,
    /// Ranks that gave them: what AVG divides by.
    pub size: u32,
}

/// The kernels in one context, which its comms share: unloading them waits for whatever the context has
/// under way, so a comm that goes must not do it while others work.
pub struct Kernels {
    context: Arc<Context>,
    module: CUmodule,
    /// Whether some may still wait to run when the last comm goes.
    busy: AtomicBool,
    pack: CUfunction,
    pack_few: CUfunction,
    reduce: [CUfunction; DType::ALL.len()],
}

// SAFETY: functions of a module may be launched from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Those of the context, loaded if no comm of it has them. The context is current.
    pub fn of(context: &Arc<Context>) -> Result<Arc<Kernels>> {
        static ALL: Mutex<Vec<Weak<Kernels>>> = Mutex::new(Vec::new());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|kernels| kernels.strong_count() > 0);
        let mut live = all.iter().filter_map(Weak::upgrade);
        if let Some(kernels) = live.find(|kernels| kernels.context.is(context)) {
            return Ok(kernels);
        }
        let kernels = Arc::new(Kernels::load(context)?);
        all.push(Arc::downgrade(&kernels));
        Ok(kernels)
    }

    fn load(context: &Arc<Context>) -> Result<Kernels> {
        let (driver, mut module) = (context.driver(), std::ptr::null_mut());
        // SAFETY: the text ends with a NUL.
        let code = unsafe { (driver.cuModuleLoadData)(&mut module, PTX.as_ptr().cast()) };
        if code == OUT_OF_MEMORY {
            driver.check(code, "cuModuleLoadData")?;
        }
        if code != SUCCESS {
            return Err(unsupported!(
                "device {}: the driver does not take our kernels, {} ({code}); expected compute \
                 capability 7.0 or later",
                context.ordinal(),
                driver.name(code)
            )
            .native(code));
        }
        let none = std::ptr::null_mut();
        let mut kernels = Kernels {
            context: context.clone(),
            module,
            busy: AtomicBool::new(false),
            pack: none,
            pack_few: none,
            reduce: [none; DType::ALL.len()],
        };
        kernels.pack = kernels.function(c"rsb_pack")?;
        kernels.pack_few = kernels.function(c"rsb_pack_few")?;
        let reduce = [
            c"rsb_reduce_f32",
            c"rsb_reduce_f64",
            c"rsb_reduce_f16",
            c"rsb_reduce_bf16",
            c"rsb_reduce_i32",
            c"rsb_reduce_i64",
            c"rsb_reduce_u8",
            c"rsb_reduce_i8",
        ];
        for (index, name) in reduce.into_iter().enumerate() {
            kernels.reduce[index] = kernels.function(name)?;
        }
        Ok(kernels)
    }

    fn function(&self, name: &CStr) -> Result<CUfunction> {
        let (driver, mut function) = (self.context.driver(), std::ptr::null_mut());
        // SAFETY: the module is loaded.
        let code =
            unsafe { (driver.cuModuleGetFunction)(&mut function, self.module, name.as_ptr()) };
        driver.check(code, "cuModuleGetFunction")?;
        Ok(function)
    }

    /// Some still wait to run as a comm goes: unloading them would wait for the device, so they stay.
    pub fn keep(&self) {
        self.busy.store(true, Ordering::Relaxed);
    }

    fn launch<P>(&self, function: CUfunction, blocks: u32, p: &P, stream: CUstream) -> Result<()> {
        let driver = self.context.driver();
        let mut arguments = [std::ptr::from_ref(p).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one parameter, of this type, which is copied by the call.
        let code = unsafe {
            let extra = std::ptr::null_mut();
            (driver.cuLaunchKernel)(
                function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                extra,
            )
        };
        driver.check(code, "cuLaunchKernel")
    }

    /// Packs pieces into a bucket in `stream`; rows are `stride` bytes apart. As few launches as the
    /// pieces need.
    pub fn pack(
        &self,
        bucket: *mut u8,
        stride: usize,
        rows: u32,
        copies: &[Copy],
        stream: CUstream,
    ) -> Result<()> {
        match copies.len() {
            0..=FEW => self.pack_by::<FEW>(self.pack_few, bucket, stride, rows, copies, stream),
            _ => self.pack_by::<MANY>(self.pack, bucket, stride, rows, copies, stream),
        }
    }

    fn pack_by<const N: usize>(
        &self,
        function: CUfunction,
        bucket: *mut u8,
        stride: usize,
        rows: u32,
        copies: &[Copy],
        stream: CUstream,
    ) -> Result<()> {
        for few in copies.chunks(N) {
            let mut pack = Pack {
                bucket: bucket as Address,
                stride: stride as u64,
                rows,
                segments: few.len() as u32,
                segment: [Copy::default(); N],
            };
            let mut end = 0;
            for (segment, copy) in pack.segment.iter_mut().zip(few) {
                let times = if copy.rows == 0 { 1 } else { rows };
                end += times * chunks(copy.bytes as usize);
                *segment = Copy { end, ..*copy };
            }
            if end > 0 {
                self.launch(function, end, &pack, stream)?;
            }
        }
        Ok(())
    }

    /// Reduces rows and carries out the last step, in `stream`.
    pub fn reduce(&self, rows: &Rows, parts: &[Part], stream: CUstream) -> Result<()> {
        let ranks = f64::from(rows.size);
        let (divisor, factor) = match rows.op {
            Op::Avg if rows.size.is_power_of_two() => (1.0, 1.0 / ranks),
            Op::Avg => (ranks, 1.0),
            _ => (1.0, 1.0),
        };
        for few in parts.chunks(PARTS) {
            let mut reduce = Reduce {
                source: rows.source as Address,
                stride: rows.stride as u64,
                divisor,
                factor,
                rows: rows.count,
                op: rows.op as u32,
                segments: few.len() as u32,
                reserved: 0,
                segment: [few[0]; PARTS],
            };
            let mut end = 0;
            for (segment, part) in reduce.segment.iter_mut().zip(few) {
                end += chunks(part.count as usize * rows.dtype.size());
                *segment = Part { end, ..*part };
            }
            if end > 0 {
                let function = self.reduce[rows.dtype as usize - 1];
                self.launch(function, end, &reduce, stream)?;
            }
        }
        Ok(())
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.busy.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(_entered) = self.context.enter_to_end() {
            // SAFETY: once, by the last comm that had them.
            Driver::end(|| unsafe { (self.context.driver().cuModuleUnload)(self.module) });
        }
    }
}

fn chunks(bytes: usize) -> u32 {
    bytes.div_ceil(CHUNK) as u32
}
