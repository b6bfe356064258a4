//! The cross-check of ranks over a host comm, `control`: found on the host, while the device works.
//!
//! Every call on the device comm also extends the control comm's own sequence, and each launch sends a
//! byte over it. So its ranks compare what they were asked, as they always do, and name the first call
//! that differs. Nobody waits: what has come is looked at in the next calls.

use std::sync::Arc;

use crate::dtype::{DType, Finish, Op};
use crate::error::{Error, Result};
use crate::fingerprint::Call;
use crate::lane::work::{Meter, Rows, Work};
use crate::lane::{Endpoint, LaneId};
use crate::memory::{Pool, System};

static NOTHING: u8 = 0;

/// The check of one comm.
pub struct Check {
    control: Arc<Endpoint>,
    lane: LaneId,
    pool: Arc<Pool>,
    /// What a beat gives to every rank, and where its result goes.
    inputs: Box<[*const u8]>,
    output: Box<u8>,
}

// SAFETY: the pointers are to a static and to memory of this struct.
unsafe impl Send for Check {}

impl Check {
    pub fn new(control: Arc<Endpoint>, size: u32) -> Check {
        Check {
            lane: control.open_lane(DType::U8, Op::Sum),
            control,
            pool: Pool::new(Box::new(System)),
            inputs: vec![&raw const NOTHING; size as usize].into(),
            output: Box::new(0),
        }
    }

    /// Takes a call into what is compared. What fails shows at the next beat.
    pub fn note(&self, call: &Call) {
        let _ = self.control.announce(call, &mut Meter::default());
    }

    /// Sends where this rank is.
    pub fn beat(&mut self) -> Result<()> {
        let mut meter = Meter::default();
        let work = Work {
            rows: Rows::Pieces(self.inputs.as_ptr()),
            size: self.inputs.len() as u32,
            numel: 1,
            dtype: DType::U8,
            op: Op::Sum,
            finish: Finish::plain(DType::U8),
            output: &mut *self.output,
            output_is_ours: true,
            borrow: false,
            tag: 0,
            stream: std::ptr::null_mut(),
            bucketer: (0, 0),
        };
        // SAFETY: both memories live until the lane is closed.
        unsafe {
            self.control
                .submit(self.lane, &work, &self.pool, &mut meter)?
        };
        self.control.launch(self.lane, &mut meter)
    }

    /// What the ranks have found so far. Never waits.
    pub fn look(&self) -> Result<()> {
        self.control.carry_on(&mut Meter::default());
        let (_, failure): (u64, Option<Error>) = self.control.completed(self.lane);
        failure.map_or(Ok(()), Err)
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        self.control.close_lane(self.lane);
    }
}
