//! A group whose ranks are threads: the ring's memory in this process alone.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::control::Layout;
use super::group::Group;
use super::mapping::Mapping;
use super::word::Verdict;
use crate::error::{Error, Result, Status};

/// How long a survivor waits before it looks again whether the others still live.
const SLICE: Duration = Duration::from_millis(1);

/// The memory of a group whose ranks are threads.
pub struct Threads {
    ranks: Vec<Mapping>,
    verdict: Verdict,
    /// The smaller group that survivors are forming.
    next: Mutex<Option<Arc<Forming>>>,
}

/// A group that survivors form: all of them get their ends, or none.
struct Forming {
    survivors: Vec<u32>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The new group's memory, and its ends until they are taken.
type Formed = (Arc<Threads>, Vec<Option<Group>>);

#[derive(Default)]
struct State {
    /// Who has come, and how each wants the memory to be.
    come: Vec<(u32, Layout)>,
    /// Once all have come: what became of it, and the ends that are not taken yet.
    formed: Option<Result<Formed>>,
}

/// The ends of a group of `size` threads, and what they share.
pub fn create(size: u32, layout: Layout) -> Result<(Vec<Group>, Arc<Threads>)> {
    let ranks = (0..size)
        .map(|_| Mapping::anonymous(layout.total))
        .collect::<Result<Vec<_>>>()?;
    for memory in &ranks {
        // The recorded calls come as they are made: private pages need no promise.
        memory.commit(0, layout.calls_at)?;
    }
    let memory = Arc::new(Threads {
        ranks,
        verdict: Verdict::new(),
        next: Mutex::new(None),
    });
    let group = |rank: u32| {
        let bases = memory.ranks.iter().map(Mapping::as_ptr).collect();
        let mine = memory.clone();
        let commit = move |at, bytes| mine.ranks[rank as usize].commit(at, bytes);
        // SAFETY: the mappings and the verdict live as long as the Arc; rank r's memory is only
        // written through rank r's end; anonymous memory is zero.
        unsafe {
            Group::new(
                rank,
                layout,
                bases,
                true,
                &memory.verdict,
                Box::new(commit),
                Box::new(memory.clone()),
            )
        }
    };
    Ok(((0..size).map(group).collect(), memory))
}

/// Rank `rank`'s end of the group that `survivors` form. Waits until all of them have come; gives up
/// when `hopeless` says so.
pub fn reborn(
    threads: &Threads,
    survivors: &[u32],
    rank: u32,
    layout: Layout,
    hopeless: impl Fn() -> bool,
) -> Result<(Group, Arc<Threads>)> {
    let forming = meeting_of(threads, survivors);
    let mut state = forming.state.lock().unwrap_or_else(PoisonError::into_inner);
    state.come.push((rank, layout));
    if state.come.len() == survivors.len() {
        state.formed = Some(form(&state.come));
        forming.changed.notify_all();
    }
    loop {
        match &mut state.formed {
            Some(Ok((next, ends))) => {
                let place = survivors.iter().position(|&r| r == rank);
                if let Some(end) = place.and_then(|p| ends[p].take()) {
                    return Ok((end, next.clone()));
                }
                let text = format!("rank {rank} is in rsb_comm_shrink twice");
                return Err(Error::new(Status::InvalidArgument, text));
            }
            Some(Err(e)) => return Err(e.clone()),
            None if hopeless() => {
                state.come.retain(|&(r, _)| r != rank);
                let text = "a survivor has not come to form the smaller comm";
                return Err(Error::new(Status::Timeout, text));
            }
            None => {}
        }
        let waited = forming.changed.wait_timeout(state, SLICE);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Where `survivors` meet: a meeting that is over is none.
fn meeting_of(threads: &Threads, survivors: &[u32]) -> Arc<Forming> {
    let mut next = threads.next.lock().unwrap_or_else(PoisonError::into_inner);
    let open = |f: &&Arc<Forming>| {
        let state = f.state.lock().unwrap_or_else(PoisonError::into_inner);
        f.survivors == survivors && state.formed.is_none()
    };
    if let Some(forming) = next.as_ref().filter(open) {
        return forming.clone();
    }
    let forming = Arc::new(Forming {
        survivors: survivors.to_vec(),
        state: Mutex::default(),
        changed: Condvar::new(),
    });
    *next = Some(forming.clone());
    forming
}

/// The group of all who have come, if they agree about it.
fn form(come: &[(u32, Layout)]) -> Result<Formed> {
    let (first, layout) = come[0];
    if let Some((other, theirs)) = come.iter().find(|(_, l)| l.geometry != layout.geometry) {
        let text = format!(
            "staging_bytes differs: {} chunks on rank {first}, {} on rank {other}",
            layout.geometry.chunks, theirs.geometry.chunks
        );
        return Err(Error::new(Status::ConfigMismatch, text));
    }
    let (ends, threads) = create(come.len() as u32, layout)?;
    Ok((threads, ends.into_iter().map(Some).collect()))
}
