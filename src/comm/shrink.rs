//! How the survivors of a lost rank agree on who they are, and meet again in a smaller group.
//!
//! Every rank says in its own control memory that it has come. Once each rank has come or is gone
//! (which its liveness word tells reliably), those that have come and are not gone are the survivors. If
//! one of them goes right then, the others see that while they meet, and look again who is left; ranks
//! that differ about it for a moment miss each other, since the survivors are part of the name of the
//! place where they meet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Layout;
use super::group::Group;
use super::local::{self, Threads};
use super::patience::Patience;
use super::shm;
use crate::error::{Error, Result, Status};

/// One attempt to meet: long enough for a crowded machine. After it a survivor that has given up is
/// waited for, and named, as one that has not come.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Where a group came from, for forming a smaller one.
#[derive(Clone)]
pub enum Origin {
    /// Threads that share this.
    Local(Arc<Threads>),
    /// Processes that met under this name, and how often their group has shrunk.
    Shm {
        /// The job's name.
        name: String,
        /// 0 for the group that was created.
        generation: u32,
    },
}

/// The smaller group of all survivors, and where it came from.
pub fn shrink(
    group: &Group,
    origin: &Origin,
    layout: impl Fn(u32) -> Result<Layout>,
    timeout: Option<Duration>,
) -> Result<(Group, Origin)> {
    let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
    group.arrive(true);
    let result = loop {
        let survivors = match survivors(group, deadline) {
            Ok(survivors) => survivors,
            Err(e) => break Err(e),
        };
        let layout = match layout(survivors.len() as u32) {
            Ok(layout) => layout,
            Err(e) => break Err(e),
        };
        let formed = match origin {
            Origin::Local(threads) => {
                let late = || deadline.is_some_and(|d| Instant::now() >= d);
                let gone = || survivors.iter().any(|&r| group.is_gone(r).is_some());
                local::reborn(threads, &survivors, group.rank(), layout, || {
                    late() || gone()
                })
                .map(|(end, threads)| (end, Origin::Local(threads)))
            }
            Origin::Shm { name, generation } => {
                meet(group, name, generation + 1, &survivors, layout, deadline)
            }
        };
        let Err(e) = formed else { break formed };
        let late = deadline.is_some_and(|d| Instant::now() >= d);
        if late || !matches!(e.status, Status::PeerLost | Status::Timeout) {
            break Err(e);
        }
    };
    if result.is_err() {
        group.arrive(false);
    }
    result
}

/// Waits until every rank has come to shrink or is gone: those that have come.
pub(crate) fn survivors(group: &Group, deadline: Option<Instant>) -> Result<Vec<u32>> {
    let gone = |r: u32| group.is_gone(r).is_some();
    let mut patience = Patience::new(group.spin());
    loop {
        let here = |r: u32| group.has_arrived(r) || gone(r);
        let Some(rank) = (0..group.size()).find(|&r| !here(r)) else {
            return Ok((0..group.size()).filter(|&r| !gone(r)).collect());
        };
        if deadline.is_some_and(|d| Instant::now() >= d) {
            let text = format!("rank {rank} is alive and has not come to rsb_comm_shrink");
            return Err(Error::new(Status::Timeout, text).blame(rank));
        }
        patience.pause(|| here(rank), |slice| group.nap(rank, slice));
    }
}

/// Meets the other survivors as processes.
fn meet(
    group: &Group,
    name: &str,
    generation: u32,
    survivors: &[u32],
    layout: Layout,
    deadline: Option<Instant>,
) -> Result<(Group, Origin)> {
    // A job's name may have any length up to the longest: its place is taken by a number of it.
    let fold = |n: u64, b: u8| (n ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = |bytes: &[u8]| bytes.iter().fold(0xcbf2_9ce4_8422_2325, |n, &b| fold(n, b));
    let ranks: Vec<u8> = survivors.iter().flat_map(|r| r.to_ne_bytes()).collect();
    let (job, who) = (hash(name.as_bytes()), hash(&ranks));
    let place = format!("shrunk-{job:016x}.{generation}.{who:016x}");
    let rank = survivors
        .iter()
        .position(|&r| r == group.rank())
        .unwrap_or(0) as u32;
    let soon = Instant::now() + ATTEMPT;
    let lost = || {
        let gone = |(new, &old): (usize, &u32)| Some(group.is_gone(old)?.blame(new as u32));
        survivors.iter().enumerate().find_map(gone)
    };
    let end = shm::join(
        &place,
        (rank, survivors.len() as u32),
        layout,
        Some(deadline.map_or(soon, |d| d.min(soon))),
        Some(&lost),
    )
    .map_err(|e| renamed(e, survivors))?;
    let name = name.to_string();
    Ok((end, Origin::Shm { name, generation }))
}

/// An error of the new group, blaming by the old numbers.
fn renamed(mut e: Error, survivors: &[u32]) -> Error {
    let place = usize::try_from(e.peer);
    match place.ok().and_then(|new| Some((new, *survivors.get(new)?))) {
        Some((new, old)) if new as u32 != old => {
            e.message = format!("{} (rank {new} of the survivors is rank {old})", e.message);
            e.blame(old)
        }
        _ => e,
    }
}
