//! Endpoints of device memory: how they are made, and what only they are asked.

use std::ffi::c_void;
use std::sync::Arc;

use super::device::{DeviceBuckets, Placed, Streams};
use super::work::{Meter, Work};
use super::{check_engine, endpoint, only_on_host, Endpoint, LaneId, Lanes, Options};
use crate::comm::engine::{Abilities, Engine};
use crate::comm::nccl::Nccl;
use crate::cuda::context::Context;
use crate::cuda::driver::Driver;
use crate::cuda::Device;
use crate::error::{invalid, Result};
use crate::memory::Pool;

impl Endpoint {
    /// Rank `rank` of `size` on an engine of device memory, which works in the context that is current.
    /// On error the engine is not released.
    pub fn device(
        engine: Box<dyn Engine>,
        abilities: Abilities,
        place: (u32, u32),
        options: &Options,
    ) -> Result<Arc<Endpoint>> {
        check_engine(abilities, place.0, place.1, options)?;
        let driver = Driver::get().map_err(|mut e| {
            e.message = format!("transport->flags: DEVICE: {}", e.message);
            e
        })?;
        let context = Context::of_caller(driver)?;
        Endpoint::on_device(engine, abilities, place, options, context)
    }

    /// A communicator of NCCL's that the caller has made.
    ///
    /// # Safety
    /// `comm` is NULL, or a live ncclComm_t that outlives the endpoint.
    pub unsafe fn nccl(comm: *mut c_void, options: &Options) -> Result<Arc<Endpoint>> {
        if comm.is_null() {
            return Err(invalid!(
                "nccl_comm: NULL; expected an ncclComm_t (PyTorch makes one with its first collective)"
            ));
        }
        let driver = Driver::get()?;
        // SAFETY: by the promise of this function.
        let nccl = unsafe { Nccl::wrap(comm)? };
        let (place, abilities) = (nccl.place(), Nccl::abilities());
        check_engine(abilities, place.0, place.1, options)?;
        let context = Context::of_device(driver, nccl.device())?;
        Endpoint::on_device(Box::new(nccl), abilities, place, options, context)
    }

    fn on_device(
        engine: Box<dyn Engine>,
        abilities: Abilities,
        place: (u32, u32),
        options: &Options,
        context: Context,
    ) -> Result<Arc<Endpoint>> {
        let streams = Streams {
            producer: options.stream.cast(),
            result: (!options.result_stream.is_null()).then_some(options.result_stream.cast()),
        };
        let entered = context.enter()?;
        context.check_stream(streams.producer, "config->stream")?;
        if let Some(result) = streams.result {
            context.check_stream(result, "config->result_stream")?;
        }
        drop(entered);
        let device = Device::new(context)?;
        let lanes = DeviceBuckets::new(engine, abilities, place, options, device, streams);
        Ok(endpoint(&options.label, Lanes::Device(Box::new(lanes))))
    }

    /// The buckets of a device comm; none: it is a host comm.
    fn buckets(&self) -> Option<&DeviceBuckets> {
        match &*self.lanes {
            Lanes::Device(buckets) => Some(buckets),
            _ => None,
        }
    }

    /// Whether it moves memory of a GPU, in the order of streams.
    #[inline]
    pub fn is_device(&self) -> bool {
        matches!(*self.lanes, Lanes::Device(_))
    }

    /// Device comm: in whose order results are ready; else null.
    pub fn result_stream(&self) -> *mut c_void {
        let none = std::ptr::null_mut();
        self.buckets().map_or(none, |b| b.result_stream().cast())
    }

    /// Device comm: refuses an op whose memory or stream is not right, before anything changes.
    pub fn vet(
        &self,
        pointers: impl Iterator<Item = (*const u8, &'static str, Option<u32>)>,
        stream: *mut c_void,
    ) -> Result<()> {
        match self.buckets() {
            Some(buckets) => self.naming(buckets.vet(pointers, stream.cast())),
            None => Ok(()),
        }
    }

    /// Device comm: refuses to launch while a stream that it would touch is being captured.
    pub fn refuse_captures(&self) -> Result<()> {
        match self.buckets() {
            Some(buckets) => self.naming(buckets.refuse_captures()),
            None => Ok(()),
        }
    }

    /// Device comm: takes an op, waiting or `direct`; where its result will be, and, for a direct one,
    /// its number in the lane of direct ops.
    ///
    /// # Safety
    /// As for `submit`.
    pub unsafe fn place(
        &self,
        id: LaneId,
        work: &Work,
        direct: bool,
        pool: &Pool,
        meter: &mut Meter,
    ) -> Result<(u64, Placed)> {
        let Some(buckets) = self.buckets() else {
            return Err(only_on_host());
        };
        // SAFETY: by the promise of this function.
        self.naming(unsafe {
            match direct {
                true => buckets.defer(id, work, pool, meter),
                false => buckets
                    .submit(id, work, pool, meter)
                    .map(|placed| (0, placed)),
            }
        })
    }

    /// Device comm: enqueues direct ops that wait; `join`: what its stream holds next comes after all
    /// results.
    pub fn settle(&self, join: bool) -> Result<()> {
        match self.buckets() {
            Some(buckets) => self.naming(buckets.settle(join)),
            None => Ok(()),
        }
    }
}
