//! The chunks of memory that a rank's staging is made of: taken for what is staged, free again once all
//! ranks have reduced it. The most recently freed is used first, so that little memory stays hot, and a
//! rank that is far ahead of its peers waits a little before it makes more of it real.

use super::state::State;
use crate::comm::group::Group;
use crate::error::{Error, Result, Status};

/// Chunks that travel before a rank waits rather than take cold memory.
const AHEAD: usize = 8;

impl State {
    /// Bytes of staging made real so far.
    pub fn committed(&self, group: &Group) -> u64 {
        u64::from(self.fresh) * group.layout().geometry.chunk_bytes as u64
    }

    /// A free chunk of memory that was used before.
    pub fn warm_slot(&mut self, group: &Group) -> Option<u32> {
        if self.slotted > 0 {
            self.reclaim(group);
        }
        self.free.pop()
    }

    /// Whether this rank is so far ahead of its peers that it may as well let them run.
    pub fn is_ahead(&self, group: &Group) -> bool {
        let room = match self.stuck {
            Some((slowest, slotted)) if slowest == group.slowest().1 => slotted,
            _ => 0,
        };
        self.slotted >= room + AHEAD
    }

    /// Whether it has waited for them in vain, and they have not caught up since.
    pub fn is_far_ahead(&self) -> bool {
        self.slotted > AHEAD
    }

    /// Notes that the slowest rank stands still: it is waited for again once it has moved, or as many more
    /// chunks travel.
    pub fn note_stuck(&mut self, group: &Group) {
        self.stuck = Some((group.slowest().1, self.slotted));
    }

    /// A free chunk of memory, used before or made real now. `Ok(None)`: one must be awaited.
    pub fn slot(&mut self, group: &Group) -> Result<Option<u32>> {
        if let Some(slot) = self.warm_slot(group) {
            return Ok(Some(slot));
        }
        let travelling = self.slotted > 0;
        if (self.fresh as usize) < group.layout().geometry.chunks {
            match group.commit_chunk(self.fresh) {
                Ok(()) => {
                    self.fresh += 1;
                    return Ok(Some(self.fresh - 1));
                }
                Err(e) if !travelling => return Err(e),
                Err(_) => {}
            }
        } else if !travelling {
            let text = "staging_bytes: every chunk is open in some lane; expected more staging";
            return Err(Error::new(Status::NoMemory, text));
        }
        Ok(None)
    }

    /// Gives back a chunk of memory that was not used.
    pub fn unslot(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Takes back the memory of chunks that all ranks have reduced.
    pub fn reclaim(&mut self, group: &Group) {
        if self.closed.is_empty() {
            return;
        }
        let done = group.slowest().1.min(self.reduced);
        while self.first_closed() < done {
            let Some(chunk) = self.closed.pop_front() else {
                break;
            };
            self.slotted -= usize::from(chunk.slot.is_some());
            self.free.extend(chunk.slot);
        }
    }

    /// Whether a line is free for one more chunk.
    pub fn has_line(&mut self, group: &Group) -> bool {
        let lines = group.layout().lines;
        if self.closed.len() >= lines {
            self.reclaim(group);
        }
        self.closed.len() < lines
    }
}
