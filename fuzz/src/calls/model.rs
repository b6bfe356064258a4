//! Rules 3 and 9 as a model: which op is in which bucket, what is launched, whose callback is next.

use std::collections::VecDeque;

/// Names one op of a rank.
pub type Id = usize;

/// The open bucket of one (dtype, op).
struct Open {
    lane: (u32, u32),
    /// Each with whether it has no callback.
    ops: Vec<(Id, bool)>,
    fill: usize,
}

#[derive(Default)]
pub struct Model {
    open: Vec<Open>,
    /// Launched and not called back, with the number of the launch.
    due: VecDeque<(Id, u64)>,
    /// Direct ops: at which launch each was submitted. Those of callbacks run first.
    direct: VecDeque<(Id, u64)>,
    pub launches: u64,
    pub directs: u64,
    pub full: u64,
    pub explicit: u64,
}

impl Model {
    /// An op that was accepted: `capacity` elements in a bucket; none: bucketing is off.
    pub fn submit(
        &mut self,
        id: Id,
        lane: (u32, u32),
        numel: usize,
        capacity: Option<usize>,
        silent: bool,
    ) {
        let Some(capacity) = capacity.filter(|&c| numel <= c) else {
            self.directs += 1;
            if !silent {
                self.direct.push_back((id, self.launches));
            }
            return;
        };
        let find = |open: &[Open]| open.iter().position(|o| o.lane == lane);
        if let Some(at) = find(&self.open) {
            if self.open[at].fill + numel > capacity {
                self.full += 1;
                self.launch(at);
            }
        }
        let at = find(&self.open).unwrap_or_else(|| {
            self.open.push(Open {
                lane,
                ops: Vec::new(),
                fill: 0,
            });
            self.open.len() - 1
        });
        self.open[at].ops.push((id, silent));
        self.open[at].fill += numel;
        if self.open[at].fill == capacity {
            self.full += 1;
            self.launch(at);
        }
    }

    fn launch(&mut self, at: usize) {
        let number = self.launches;
        let loud = self.open.remove(at).ops.into_iter().filter(|op| !op.1);
        self.due.extend(loud.map(|(id, _)| (id, number)));
        self.launches += 1;
    }

    /// A launch or flush: the open buckets, in the order of their first submit.
    pub fn launch_all(&mut self) {
        while !self.open.is_empty() {
            self.explicit += 1;
            self.launch(0);
        }
    }

    /// A callback runs: it must be this op's turn. Whether it was launched at all.
    pub fn called(&mut self, id: Id) {
        if let Some(at) = self.direct.iter().position(|d| d.0 == id) {
            let since = self.direct[at].1;
            assert!(
                self.due.iter().all(|d| d.1 >= since),
                "op {id} before launched ones"
            );
            self.direct.remove(at);
            return;
        }
        assert_eq!(
            self.due.pop_front().map(|d| d.0),
            Some(id),
            "the next callback"
        );
    }

    pub fn is_open(&self, id: Id) -> bool {
        self.open.iter().any(|o| o.ops.iter().any(|op| op.0 == id))
    }

    pub fn is_idle(&self) -> bool {
        self.open.is_empty() && self.due.is_empty() && self.direct.is_empty()
    }

    /// Whether a callback is still to run.
    pub fn owes(&self) -> bool {
        let mut waiting = self.open.iter().flat_map(|o| &o.ops);
        !(self.due.is_empty() && self.direct.is_empty() && waiting.all(|op| op.1))
    }

    /// Forgets an op that was in an open bucket; whether it was.
    pub fn cancel(&mut self, id: Id) -> bool {
        let was = self.is_open(id);
        for open in &mut self.open {
            open.ops.retain(|&(i, _)| i != id);
        }
        was
    }
}
