//! A group whose ranks are processes of this host: the ring's memory, mapped by all of them.

use std::sync::Arc;
use std::time::Instant;

use super::control::{Layout, CALLS};
use super::group::Group;
use super::rendezvous::{self, Join, Watch};
use super::word::Verdict;
use crate::error::{unsupported, Result};

/// Changes with every change of what lies where in shared memory, or what it means.
const PROTOCOL: u64 = 1;

/// Joins the other ranks of `name`, and waits for all of them until the deadline, or until `lost` knows
/// that one will not come.
pub fn join(
    name: &str,
    (rank, size): (u32, u32),
    layout: Layout,
    deadline: Option<Instant>,
    lost: Option<Watch>,
) -> Result<Group> {
    if cfg!(not(all(
        target_os = "linux",
        any(target_arch = "x86_64", target_arch = "aarch64")
    ))) {
        return Err(unsupported!(
            "comm: shared memory between processes needs Linux on x86-64 or aarch64"
        ));
    }
    let staging = layout.geometry.chunks * layout.geometry.chunk_bytes;
    let settings = [
        ("protocol version", PROTOCOL),
        ("staging_bytes", staging as u64),
        ("chunk bytes", layout.geometry.chunk_bytes as u64),
        ("calls kept", CALLS as u64),
    ];
    let joined = rendezvous::join(&Join {
        name,
        rank,
        size,
        deadline,
        settings: &settings,
        own_bytes: layout.total,
        own_committed: layout.staging_at,
        group_bytes: 4096,
        lost,
    })?;
    let bases = (0..size as usize)
        .map(|r| joined.peers[r].as_ref().unwrap_or(&joined.own).as_ptr())
        .collect();
    let verdict = joined.group.as_ptr().cast::<Verdict>().cast_const();
    let joined = Arc::new(joined);
    let memory = joined.clone();
    let commit = move |at, bytes| memory.own.commit(at, bytes);
    // SAFETY: the mappings live as long as the Arc; this rank's own is the only writable one but for
    // the group's page, which all may write and only atomics do; fresh shared memory is zero.
    Ok(unsafe {
        Group::new(
            rank,
            layout,
            bases,
            false,
            verdict,
            Box::new(commit),
            Box::new(joined),
        )
    })
}
