//! What a committed chunk comes to: this rank's row reduced into results, or gathered bytes copied out.

#[cfg(any(loom, shuttle))]
use super::model::Reduction;
use super::state::{Chunk, Content};
use crate::comm::group::Group;
use crate::lane::work::Work;
#[cfg(not(any(loom, shuttle)))]
use crate::reduce::Reduction;

/// Reduces this rank's row of a chunk into the results, or copies a gathered part out.
///
/// # Safety
/// `rows[r]` is where rank r's chunk begins; all of it may be read, and outputs written.
pub(super) unsafe fn carry_out(
    group: &Group,
    chunk: &Chunk,
    rows: &[*const u8],
    sources: &mut Vec<*const u8>,
) {
    let rank = group.rank() as usize;
    match &chunk.content {
        Content::Nothing => {}
        Content::Rows { dtype, op, pieces } => {
            let stride = match group.inline_stride(chunk.fill) {
                Some(stride) if chunk.inline => stride,
                _ => group.layout().geometry.row_bytes,
            };
            let row = rank * stride;
            let mut reduction = Reduction::new(*dtype, *op, group.size());
            for piece in pieces {
                sources.clear();
                // SAFETY: every piece lies inside a row, and every row inside a chunk.
                sources.extend(rows.iter().map(|base| unsafe { base.add(row + piece.at) }));
                if !piece.own.is_null() {
                    sources[rank] = piece.own;
                }
                reduction.write_past(piece.past);
                // SAFETY: by the promise of this function; an output overlaps at most the own row,
                // exactly (checked at submit).
                unsafe { reduction.rows(sources, piece.count, &piece.finish, piece.output) };
            }
        }
        Content::Lent { work } => {
            // SAFETY: every rank's op lives until all have consumed this chunk; the ops are alike.
            unsafe { reduce_lent(group, &**work, rows, sources) }
        }
        Content::Gather {
            output,
            stride,
            bytes,
        } => {
            for (r, base) in rows.iter().enumerate().filter(|&(r, _)| r != rank) {
                // SAFETY: every rank has `bytes` in its chunk; the output has room for all ranks.
                unsafe { base.copy_to_nonoverlapping(output.add(r * stride), *bytes) };
            }
        }
    }
}

/// Reduces this rank's row of an op straight from everybody's input.
///
/// # Safety
/// `rows[r]` is rank r's op, which is like `work` and whose input may be read; the output may be written.
unsafe fn reduce_lent(
    group: &Group,
    work: &Work,
    rows: &[*const u8],
    sources: &mut Vec<*const u8>,
) {
    let (_, valid) = work.place(group.rank());
    let mut reduction = Reduction::new(work.dtype, work.op, group.size());
    reduction.write_past(work.is_past_caches());
    sources.clear();
    // SAFETY: by the promise of this function.
    sources.extend(
        rows.iter()
            .map(|op| unsafe { (*op.cast::<Work>()).row(group.rank()).0 }),
    );
    // SAFETY: the row has `valid` elements, the output has room for them.
    unsafe { reduction.rows(sources, valid, &work.finish, work.output) };
    // The tail of a flat tensor counts as zeros.
    sources.fill(ZEROS.as_ptr());
    let (mut done, most) = (valid, ZEROS.len() / work.dtype.size());
    while done < work.numel {
        let count = (work.numel - done).min(most);
        // SAFETY: as above; there are as many zeros.
        unsafe {
            let output = work.output.add(done * work.finish.output.size());
            reduction.rows(sources, count, &work.finish, output);
        }
        done += count;
    }
}

static ZEROS: [u8; 256] = [0; 256];
