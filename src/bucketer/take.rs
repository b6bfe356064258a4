//! Takes ops: into an open bucket, or, those larger than one, straight through their comm.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{Flight, Lane, Outcome, Pending, Queue, Results, Use};
use super::{is_sticky, Ask, Asks, Bucketer};
use crate::dtype::{DType, Op};
use crate::error::{Error, Result};
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::{Meter, Rows, Work};
use crate::lane::Endpoint;
use crate::layout::bucket_capacity;
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
            if comm.is_device() {
                self.devices.store(true, Ordering::Relaxed);
            }
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
                staging: 0,
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

    /// The op as it waits for its end.
    #[inline(always)]
    pub(super) fn pending(
        &self,
        ticket: u64,
        rank: u32,
        ask: &Ask<C>,
        block: Option<Block>,
    ) -> Pending<C> {
        let (offset, valid) = ask.work.place(rank);
        Pending {
            ticket,
            tag: ask.work.tag,
            payload: ask.payload,
            data: ask.work.output,
            numel: ask.work.numel,
            valid,
            offset,
            shard: 0,
            stream: std::ptr::null_mut(),
            block,
            dtype: ask.work.finish.output,
        }
    }

    /// Counts an accepted op; its ticket.
    #[inline(always)]
    pub(super) fn count(&self, tickets: &mut u64, work: &Work) -> u64 {
        *tickets += 1;
        let element = work.dtype.size() as u64;
        let all = work.numel as u64 * u64::from(work.size) * element;
        let real = match work.rows {
            Rows::Flat { total, .. } => total as u64 * element,
            Rows::Pieces(_) => all,
        };
        self.counters.payload_bytes.add(real);
        self.counters.padding_bytes.add(all - real);
        self.nonce | *tickets
    }

    /// Notes the number that the bucketer has got on a comm with its first op there.
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

    /// The bucketer's number on a lane's comm, and its bucket size, as ranks compare them.
    #[inline]
    pub(super) fn number(&self, lane: &Lane<C>, comm: &Endpoint) -> (u32, u64) {
        let ordinal = lane.ordinal.unwrap_or_else(|| comm.next_ordinal());
        (ordinal, self.bucket_bytes.unwrap_or(u64::MAX))
    }

    /// Notes how much staging a comm has by now.
    pub(super) fn measure(&self, q: &mut Queue<C>, comm: &Endpoint) {
        if let Some(known) = q.uses.iter_mut().find(|u| u.comm_id == comm.id()) {
            known.staging = known.staging.max(comm.staging());
        }
        let all = q.uses.iter().map(|u| u.staging).sum();
        self.counters.staging_bytes_peak.raise(all);
    }

    /// Measures the staging of a lane's comm if an op has just taken more.
    #[inline]
    fn measure_growth(&self, q: &mut Queue<C>, index: usize) {
        let lane = &q.lanes[index];
        if let Some(open) = &lane.open {
            if open.comm.staging() != lane.staging {
                self.measure_lane(q, index);
            }
        }
    }

    #[cold]
    fn measure_lane(&self, q: &mut Queue<C>, index: usize) {
        if let Some(comm) = q.lanes[index].open.as_ref().map(|o| o.comm.clone()) {
            q.lanes[index].staging = comm.staging();
            self.measure(q, &comm);
        }
    }

    /// Puts an op into the open bucket of its lane. On error nothing has changed.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline(always)]
    unsafe fn gather(
        &self,
        lane: &mut Lane<C>,
        results: &mut Results,
        tickets: &mut u64,
        ask: &mut Ask<C>,
    ) -> Result<u64> {
        let Some(open) = lane.open.as_ref() else {
            return Ok(0);
        };
        let comm = &*open.comm;
        let block = results.take_for(&mut ask.work)?;
        ask.work.bucketer = self.number(lane, comm);
        let (work, rank) = (&ask.work, comm.rank());
        let mut meter = Meter::default();
        let large = work.bytes() >= TIMED;
        let start = (large || tickets.is_multiple_of(SAMPLE)).then(Instant::now);
        // SAFETY: by the promise of this function.
        let taken = unsafe { comm.submit(lane.id, work, &self.pool, &mut meter) };
        if let Some(start) = start {
            let times = if large { 1 } else { SAMPLE };
            let other = meter.wait_ns + meter.reduce_ns + meter.pack_ns;
            let spent = (start.elapsed().as_nanos() as u64).saturating_sub(other);
            self.counters.pack_ns.add(spent * times);
        }
        self.counters.meter(&meter);
        if let Err(e) = taken {
            block.into_iter().for_each(|b| results.cache.put(b));
            return Err(e);
        }
        let ticket = self.count(tickets, work);
        self.counters.ops_bucketed.add(1);
        lane.taken += 1;
        if let Some(open) = &mut lane.open {
            open.used += work.numel;
            open.ops.push(self.pending(ticket, rank, ask, block));
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
        ask: &mut Ask<C>,
    ) -> Result<u64> {
        if q.lanes[index].open.is_none() {
            q.open(index, comm.clone());
        }
        // SAFETY: by the promise of this function.
        let taken = unsafe {
            match comm.is_device() {
                false => self.gather(&mut q.lanes[index], &mut q.results, &mut q.tickets, ask),
                true => self.gather_on_device(&mut q.lanes[index], &mut q.tickets, ask),
            }
        };
        q.opened(index);
        if taken.is_ok() && q.lanes[index].ordinal.is_none() {
            self.first_use(q, index, ask.work.bucketer.0);
        }
        self.measure_growth(q, index);
        taken.map_err(|e| self.refused(q, e))
    }

    /// The common case of a submit: the op fits into the open bucket of the lane that was used last, or
    /// opens one, with room to spare, so that nothing else has to happen. None: it is not that case, or
    /// that lane is not one of comm `id`.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline(always)]
    pub unsafe fn submit_fitting(&self, id: u64, asks: &impl Asks<C>) -> Option<Result<u64>> {
        let mut held = self.lock();
        let q = &mut *held;
        let index = q.recent;
        let lane = q.lanes.get(index)?;
        let capacity = lane.capacity?;
        // On device comms there is always more to do.
        if self.has_devices()
            || lane.comm_id != id
            || lane.ordinal.is_none()
            || q.closing
            || q.owes()
        {
            return None;
        }
        let opens = lane.open.is_none();
        if opens {
            let comm = lane.comm.upgrade()?;
            q.open(index, comm);
        }
        let lane = &mut q.lanes[index];
        let open = lane.open.as_ref()?;
        let mut ask = match asks.plain((open.comm.rank(), open.comm.size())) {
            Some(ask) => ask,
            None => match asks.check(&open.comm) {
                Ok(ask) => ask,
                Err(e) => {
                    q.opened(index);
                    return Some(Err(self.refused(q, e)));
                }
            },
        };
        let same = lane.dtype == ask.work.dtype && lane.op == ask.work.op;
        let fits = same && ask.work.numel < capacity - open.used;
        // SAFETY: by the promise of this function.
        let taken =
            fits.then(|| unsafe { self.gather(lane, &mut q.results, &mut q.tickets, &mut ask) });
        if opens {
            q.opened(index);
        }
        let taken = taken?;
        self.measure_growth(q, index);
        Some(match taken {
            Err(e) => Err(self.refused(q, e)),
            Ok(ticket) => Ok(ticket),
        })
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
        ask: &mut Ask<C>,
        nested: bool,
    ) -> Result<u64> {
        ask.work.bucketer = self.number(&q.lanes[index], comm);
        if comm.is_device() {
            // SAFETY: by the promise of this function.
            return unsafe { self.defer(q, index, comm, ask, nested) };
        }
        let block = q.results.take_for(&mut ask.work)?;
        let mut meter = Meter::default();
        // SAFETY: by the promise of this function.
        let done = unsafe { comm.direct(&ask.work, &self.pool, &mut meter) };
        self.counters.meter(&meter);
        if let Err(e) = done {
            block.into_iter().for_each(|b| q.results.cache.put(b));
            return Err(self.refused(q, e));
        }
        let ticket = self.count(&mut q.tickets, &ask.work);
        if q.lanes[index].ordinal.is_none() {
            self.first_use(q, index, ask.work.bucketer.0);
        }
        self.counters.ops_direct.add(1);
        self.counters.collectives_launched.add(1);
        self.measure(q, comm);
        let mut ops = q.list();
        ops.push(self.pending(ticket, comm.rank(), ask, block));
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
