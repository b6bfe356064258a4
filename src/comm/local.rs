//! A group whose ranks are threads: the ring's memory in this process alone.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use super::control::Layout;
use super::group::Group;
use super::mapping::Mapping;
use crate::error::{Error, Result, Status};

/// The memory of a group whose ranks are threads.
pub struct Threads {
    ranks: Vec<Mapping>,
    word: AtomicU64,
    /// The smaller group that survivors form, and what of it is not taken yet.
    next: Mutex<Option<Reborn>>,
}

struct Reborn {
    survivors: Vec<u32>,
    threads: Arc<Threads>,
    ends: Vec<Option<Group>>,
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
        word: AtomicU64::new(0),
        next: Mutex::new(None),
    });
    let group = |rank: u32| {
        let bases = memory.ranks.iter().map(Mapping::as_ptr).collect();
        let mine = memory.clone();
        let commit = move |at, bytes| mine.ranks[rank as usize].commit(at, bytes);
        // SAFETY: the mappings and the word live as long as the Arc; rank r's memory is only
        // written through rank r's end; anonymous memory is zero.
        unsafe {
            Group::new(
                rank,
                layout,
                bases,
                &memory.word,
                Box::new(commit),
                Box::new(memory.clone()),
            )
        }
    };
    Ok(((0..size).map(group).collect(), memory))
}

/// Rank `rank`'s end of the group that `survivors` form: the first of them makes it for all.
pub fn reborn(
    threads: &Threads,
    survivors: &[u32],
    rank: u32,
    layout: Layout,
) -> Result<(Group, Arc<Threads>)> {
    let mut next = threads.next.lock().unwrap_or_else(PoisonError::into_inner);
    if next.as_ref().is_none_or(|n| n.survivors != survivors) {
        let (ends, threads) = create(survivors.len() as u32, layout)?;
        *next = Some(Reborn {
            survivors: survivors.to_vec(),
            threads,
            ends: ends.into_iter().map(Some).collect(),
        });
    }
    let place = survivors.iter().position(|&r| r == rank);
    let made = next.as_mut().zip(place);
    let Some((made, end)) = made.and_then(|(n, p)| n.ends[p].take().map(|end| (n, end))) else {
        let text = format!("rank {rank} has its end of the smaller comm already");
        return Err(Error::new(Status::InvalidArgument, text));
    };
    if end.layout().geometry != layout.geometry {
        let text = format!(
            "staging_bytes differs between the survivors: {} chunks and {}",
            layout.geometry.chunks,
            end.layout().geometry.chunks
        );
        return Err(Error::new(Status::ConfigMismatch, text));
    }
    Ok((end, made.threads.clone()))
}
