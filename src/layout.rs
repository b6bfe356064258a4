//! Pure arithmetic: how a tensor is cut into shards, how many elements a bucket takes, and how
//! staging memory is cut into chunks and rows. No memory is touched here.

use crate::error::{invalid, Result};

/// Elements of one shard when `numel` elements are cut over `size` ranks: `ceil(numel / size)`;
/// 0 for no ranks.
pub const fn shard_numel(numel: usize, size: u32) -> usize {
    if size == 0 {
        0
    } else {
        numel.div_ceil(size as usize)
    }
}

/// What rank `rank` gets of a flat tensor: (offset of its shard, elements of it that are real).
/// Past the end the offset still counts on, and nothing is real.
pub const fn flat_shard(numel: usize, size: u32, rank: u32) -> (usize, usize) {
    let shard = shard_numel(numel, size);
    let offset = shard * rank as usize;
    let left = numel.saturating_sub(offset);
    (offset, if left < shard { left } else { shard })
}

/// Elements of each rank's part that one bucket takes.
pub const fn bucket_capacity(bucket_bytes: u64, size: u32, element: usize) -> usize {
    let per_rank = bucket_bytes / (size as u64 * element as u64);
    if per_rank > isize::MAX as u64 {
        isize::MAX as usize
    } else {
        per_rank as usize
    }
}

/// Bytes of `numel` elements for each of `size` ranks, if such memory can exist.
pub fn total_bytes(numel: usize, size: u32, element: usize) -> Option<usize> {
    let bytes = numel.checked_mul(size as usize)?.checked_mul(element)?;
    (bytes <= isize::MAX as usize).then_some(bytes)
}

/// Where an op of `bytes` begins in a row that is filled up to `fill`: on its own natural
/// alignment, at most a cache line, so that kernels seldom straddle lines and tiny ops pack tight.
pub const fn aligned(fill: usize, bytes: usize) -> usize {
    let align = if bytes >= 64 {
        64
    } else {
        bytes.next_power_of_two()
    };
    // A power of two: a mask costs less than the division that the compiler would have to make.
    (fill + (align - 1)) & !(align - 1)
}

const PAGE: usize = 4096;
/// A chunk is about the size that stays in a core's L2 cache while all ranks' rows are summed.
const CHUNK: usize = 256 << 10;
/// The fewest chunks that staging may have: half of them can be open.
const MIN_CHUNKS: usize = 4;

/// Default of `staging_bytes`.
pub const DEFAULT_STAGING: usize = 32 << 20;

/// How a rank's staging memory is cut: `chunks` chunks of `chunk_bytes`, each with a row of
/// `row_bytes` for every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Chunks of one rank's staging.
    pub chunks: usize,
    /// Bytes of a chunk, whole pages.
    pub chunk_bytes: usize,
    /// Bytes of a chunk that belong to one destination rank, whole cache lines.
    pub row_bytes: usize,
}

impl Geometry {
    /// The least staging that `size` ranks can work with.
    pub const fn least_staging(size: u32) -> usize {
        (size as usize * 64).div_ceil(PAGE) * PAGE * MIN_CHUNKS
    }

    /// Cuts `staging_bytes` for `size` ranks.
    pub fn new(staging_bytes: usize, size: u32) -> Result<Geometry> {
        let least = Self::least_staging(size) / MIN_CHUNKS;
        let wanted = (staging_bytes / 16 / PAGE * PAGE).min(CHUNK);
        let chunk_bytes = wanted.max(least);
        let chunks = staging_bytes / chunk_bytes;
        if chunks < MIN_CHUNKS || staging_bytes > isize::MAX as usize / 4 {
            return Err(invalid!(
                "staging_bytes: {staging_bytes}; expected {} to {} for {size} ranks, or 0 for {DEFAULT_STAGING}",
                least * MIN_CHUNKS,
                isize::MAX as usize / 4
            ));
        }
        Ok(Geometry {
            chunks,
            chunk_bytes,
            row_bytes: chunk_bytes / size as usize / 64 * 64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_the_tensor_once() {
        for size in [1u32, 2, 3, 4, 7, 8] {
            for numel in 0..60 {
                let mut covered = 0;
                for rank in 0..size {
                    let (offset, valid) = flat_shard(numel, size, rank);
                    if valid > 0 {
                        assert_eq!(offset, covered);
                    }
                    covered += valid;
                }
                assert_eq!(covered, numel);
            }
        }
        assert_eq!(shard_numel(5, 0), 0);
        assert_eq!(shard_numel(usize::MAX, 1), usize::MAX);
    }

    #[test]
    fn capacity_is_rounded_down_to_the_element() {
        assert_eq!(bucket_capacity(25 << 20, 8, 4), 819_200);
        assert_eq!(bucket_capacity(31, 2, 4), 3);
        assert_eq!(bucket_capacity(7, 2, 4), 0);
        assert_eq!(bucket_capacity(u64::MAX, 1, 1), isize::MAX as usize);
    }

    #[test]
    fn products_never_wrap() {
        assert_eq!(total_bytes(usize::MAX / 4, 4, 8), None);
        assert_eq!(total_bytes(usize::MAX, 1, 1), None);
        assert_eq!(total_bytes(3, 4, 8), Some(96));
        assert_eq!(total_bytes(0, u32::MAX, 8), Some(0));
    }

    #[test]
    fn ops_start_on_their_natural_alignment() {
        assert_eq!(aligned(1, 1), 1);
        assert_eq!(aligned(4, 4), 4);
        assert_eq!(aligned(4, 12), 16);
        assert_eq!(aligned(68, 4096), 128);
        assert_eq!(aligned(0, 0), 0);
    }

    #[test]
    fn staging_is_cut_for_every_size() {
        let g = Geometry::new(DEFAULT_STAGING, 2).expect("default");
        assert_eq!(
            (g.chunks, g.chunk_bytes, g.row_bytes),
            (128, 256 << 10, 128 << 10)
        );
        for size in [1u32, 2, 3, 7, 16, 64, 1000] {
            for staging in [16 << 10, 100_000, 1 << 20, DEFAULT_STAGING] {
                let Ok(g) = Geometry::new(staging, size) else {
                    continue;
                };
                assert!(g.chunks >= 4 && g.row_bytes >= 64);
                assert!(g.chunks * g.chunk_bytes <= staging);
                assert!(g.row_bytes * size as usize <= g.chunk_bytes);
            }
        }
        assert!(Geometry::new(16 << 10, 1000).is_err());
        assert!(Geometry::new(usize::MAX, 2).is_err());
    }
}
