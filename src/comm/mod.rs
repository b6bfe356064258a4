//! What ranks share: memory with a protocol over it ([`group`]), for threads or, found by a
//! [`rendezvous`], for processes ([`shm`]); or an [`engine`] that carries collectives, such as
//! [`nccl`].

pub mod control;
mod detail;
pub mod engine;
pub mod group;
pub mod keeper;
pub mod local;
pub mod mapping;
pub mod nccl;
pub mod patience;
pub mod rendezvous;
pub mod rundir;
pub mod shm;
pub mod shrink;
pub mod word;
