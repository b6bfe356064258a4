//! Takes ops: into an open bucket, or, those larger than one, straight through their comm.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{Flight, Lane, Open, Outcome, Pending, Queue, Use};
use super::{is_sticky, Ask, Bucketer};
use crate::dtype::{DType, Op};
use crate::error::{Error, Result};
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::{Meter, Rows, Work};
use crate::lane::Endpoint;
use crate::layout::{bucket_capacity, flat_shard};
use crate::memory::Block;

/// Packing less than this is timed only now and then.
const TIMED: usize = 16 << 10;
const SAMPLE: u64 = 64;

impl<C: Copy + Send> Bucketer<C> {
    /// The lane of (comm, dtype, op), made if it is new.
    pub(super) fn lane_of(
        &self,
        q: &mut Queue<C>,
        comm: &Arc<Endpoint>,
        dtype: DType,
        op: Op,
    ) -> usize {
        let fits = |l: &Lane<C>| l.comm_id == comm.id() && l.dtype == dtype && l.op == op;
        if q.lanes.get(q.recent).is_some_and(fits) {
            return q.recent;
        }
        let index = q.lanes.iter().position(fits).unwrap_or_else(|| {
            q.forget_dead();
            q.lanes.push(Lane {
                comm: Arc::downgrade(comm),
                comm_id: comm.id(),
                id: comm.open_lane(dtype, op),
                dtype,
                op,
                capacity: self
                    .bucket_bytes
                    .map(|b| bucket_capacity(b, comm.size(), dtype.size())),
                ordinal: q.ordinal(comm.id()),
                taken: 0,
                open: None,
                closed: false,
            });
            q.lanes.len() - 1
        });
        q.recent = index;
        index
    }

    pub(super) fn call(&self, ordinal: u32, kind: CallKind) -> Call {
        Call::bare(kind, ordinal, self.bucket_bytes.unwrap_or(u64::MAX), 0)
    }

    /// The op for the lanes, with memory for its result.
    #[inline]
    pub(super) fn prepare(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Endpoint,
        ask: &Ask<C>,
    ) -> Result<(Work, Pending<C>)> {
        let (rank, size) = (comm.rank(), comm.size());
        let (numel, flat, offset, valid) = match ask.rows {
            Rows::Pieces(_) => (ask.numel, false, 0, ask.numel),
            Rows::Flat { total, .. } => {
                let (offset, valid) = flat_shard(total, size, rank);
                (total, true, offset, valid)
            }
        };
        let mut block: Option<Block> = None;
        if ask.output.is_null() && !comm.is_device() {
            let bytes = ask.numel * ask.finish.output.size();
            let reserved = q.reserved.take();
            block = match reserved.filter(|(_, had)| *had == bytes) {
                Some((block, _)) => Some(block),
                None => {
                    reserved.into_iter().for_each(|(b, _)| q.cache.put(b));
                    Some(q.cache.take(bytes)?)
                }
            };
        }
        let output = block.map_or(ask.output, |b| b.ptr);
        let ordinal = q.lanes[index]
            .ordinal
            .unwrap_or_else(|| comm.next_ordinal());
        let call = Call {
            flat,
            types: Some((ask.dtype, ask.op)),
            tag: ask.tag,
            numel: numel as u64,
            scale: ask.finish.scale,
            ..self.call(ordinal, CallKind::Submit)
        };
        let work = Work {
            rows: ask.rows,
            size,
            numel: ask.numel,
            dtype: ask.dtype,
            op: ask.op,
            finish: ask.finish,
            output,
            output_is_ours: block.is_some(),
            borrow: ask.borrow,
            call,
            stream: ask.stream,
        };
        let pending = Pending {
            ticket: self.nonce | (q.tickets + 1),
            tag: ask.tag,
            payload: ask.payload,
            data: output,
            block,
            shard: 0,
            stream: std::ptr::null_mut(),
            numel: ask.numel,
            valid,
            offset,
            dtype: ask.finish.output,
        };
        Ok((work, pending))
    }

    /// Counts an accepted op.
    #[inline]
    pub(super) fn count(&self, q: &mut Queue<C>, index: usize, work: &Work) {
        q.tickets += 1;
        if q.lanes[index].ordinal.is_none() {
            self.first_use(q, index, work.call.ordinal);
        }
        let element = work.dtype.size() as u64;
        let all = work.numel as u64 * u64::from(work.size) * element;
        let real = if work.call.flat {
            work.call.numel * element
        } else {
            all
        };
        self.counters.payload_bytes.add(real);
        self.counters.padding_bytes.add(all - real);
    }

    /// Notes the number that the bucketer has got on a comm.
    #[cold]
    pub(super) fn first_use(&self, q: &mut Queue<C>, index: usize, ordinal: u32) {
        let (comm, comm_id) = (q.lanes[index].comm.clone(), q.lanes[index].comm_id);
        for lane in q.lanes.iter_mut().filter(|l| l.comm_id == comm_id) {
            lane.ordinal = Some(ordinal);
        }
        q.uses.push(Use {
            comm,
            comm_id,
            ordinal,
            staging: 0,
        });
    }

    /// Notes how much staging a comm has by now.
    pub(super) fn measure(&self, q: &mut Queue<C>, comm: &Endpoint) {
        if let Some(known) = q.uses.iter_mut().find(|u| u.comm_id == comm.id()) {
            known.staging = known.staging.max(comm.staging());
        }
        let all = q.uses.iter().map(|u| u.staging).sum();
        self.counters.staging_bytes_peak.raise(all);
    }

    /// Puts an op into the open bucket of its lane. On error nothing has changed.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline]
    pub(super) unsafe fn gather(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Endpoint,
        ask: &Ask<C>,
    ) -> Result<u64> {
        let (work, mut pending) = self.prepare(q, index, comm, ask)?;
        let mut meter = Meter::default();
        let rare = q.tickets.is_multiple_of(SAMPLE);
        let start = (rare || work.bytes() >= TIMED).then(Instant::now);
        // SAFETY: by the promise of this function.
        let taken = unsafe {
            match comm.is_device() {
                false => comm.submit(q.lanes[index].id, &work, &self.pool, &mut meter),
                true => self.place(q, index, comm, &work, &mut pending, &mut meter),
            }
        };
        if let Some(start) = start {
            let times = if work.bytes() >= TIMED { 1 } else { SAMPLE };
            let spent =
                (start.elapsed().as_nanos() as u64).saturating_sub(meter.wait_ns + meter.reduce_ns);
            self.counters.pack_ns.add(spent * times);
        }
        self.counters.meter(&meter);
        if let Err(e) = taken {
            pending.block.into_iter().for_each(|b| q.cache.put(b));
            return Err(self.refused(q, e));
        }
        self.count(q, index, &work);
        self.counters.ops_bucketed.add(1);
        let ticket = pending.ticket;
        let lane = &mut q.lanes[index];
        lane.taken += 1;
        if let Some(open) = &mut lane.open {
            open.used += work.numel;
            open.ops.push_back(pending);
        }
        Ok(ticket)
    }

    /// As [`Bucketer::gather`], into a bucket that is opened for it if need be.
    ///
    /// # Safety
    /// As for `submit`.
    pub(super) unsafe fn gather_first(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Arc<Endpoint>,
        ask: &Ask<C>,
    ) -> Result<u64> {
        if q.lanes[index].open.is_none() {
            let open = Open {
                comm: comm.clone(),
                order: q.orders + 1,
                used: 0,
                ops: q.spare.pop().unwrap_or_default(),
            };
            q.lanes[index].open = Some(open);
        }
        // SAFETY: by the promise of this function.
        let taken = unsafe { self.gather(q, index, comm, ask) };
        let open = &mut q.lanes[index].open;
        match open.as_ref().map_or(0, |o| o.ops.len()) {
            0 => *open = None,
            1 => q.orders += 1,
            _ => {}
        }
        taken
    }

    /// The common case of a submit: the op fits into the open bucket of the lane that was used last,
    /// with room to spare, so that nothing else has to happen. None: it is not that case.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline]
    pub unsafe fn submit_fitting(&self, comm: &Endpoint, ask: &Ask<C>) -> Option<Result<u64>> {
        let mut q = self.lock();
        let index = q.recent;
        let lane = q.lanes.get(index)?;
        let same = lane.comm_id == comm.id() && lane.dtype == ask.dtype && lane.op == ask.op;
        let left = lane.capacity? - lane.open.as_ref()?.used;
        if !same || ask.numel >= left || q.closing || q.owes() {
            return None;
        }
        // SAFETY: by the promise of this function.
        Some(unsafe { self.gather(&mut q, index, comm, ask) })
    }

    /// Carries out an op that is larger than a bucket; it is in `flights`, or `due`, afterwards.
    ///
    /// # Safety
    /// As for `submit`.
    pub(super) unsafe fn direct(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Arc<Endpoint>,
        ask: &Ask<C>,
        nested: bool,
    ) -> Result<u64> {
        if comm.is_device() {
            // SAFETY: by the promise of this function.
            return unsafe { self.defer(q, index, comm, ask, nested) };
        }
        let (work, pending) = self.prepare(q, index, comm, ask)?;
        let mut meter = Meter::default();
        // SAFETY: by the promise of this function.
        let done = unsafe { comm.direct(&work, &self.pool, &mut meter) };
        self.counters.meter(&meter);
        if let Err(e) = done {
            pending.block.into_iter().for_each(|b| q.cache.put(b));
            return Err(self.refused(q, e));
        }
        self.count(q, index, &work);
        self.counters.ops_direct.add(1);
        self.counters.collectives_launched.add(1);
        self.measure(q, comm);
        let ticket = pending.ticket;
        let mut ops = q.spare.pop().unwrap_or_default();
        ops.push_back(pending);
        let flight = Flight {
            comm: comm.clone(),
            lane: 0,
            first: 0,
            end: 1,
            ops,
            outcome: Some(Outcome {
                done: 1,
                failure: None,
            }),
            direct: true,
            owed: false,
        };
        if nested {
            q.due.push_back(flight);
            self.is_due.store(true, Ordering::Relaxed);
        } else {
            q.flights.push_back(flight);
        }
        Ok(ticket)
    }

    /// A submit that a failed comm refused is a failure that the next flush tells of.
    pub(super) fn refused(&self, q: &mut Queue<C>, e: Error) -> Error {
        if is_sticky(e.status) {
            q.note(&Arc::new(e.clone()));
        }
        e
    }
}
