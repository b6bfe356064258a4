//! What a rank says about a failure that it was first to report, in memory that its peers read.

use super::control::{Detail, MESSAGE};
use crate::error::{Error, Status};
use crate::sync::Ordering;

/// Writes down what a rank says about a failure, cut to what fits.
pub fn write(detail: &Detail, cause: &Error) {
    let mut len = cause.message.len().min(MESSAGE - 1);
    while !cause.message.is_char_boundary(len) {
        len -= 1;
    }
    for (i, word) in detail.text.iter().enumerate() {
        let mut bytes = [0u8; 8];
        let from = cause
            .message
            .as_bytes()
            .get(i * 8..len.min(i * 8 + 8))
            .unwrap_or(&[]);
        bytes[..from.len()].copy_from_slice(from);
        word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
    }
    detail.native.store(cause.native, Ordering::Relaxed);
    detail.len.store(len as u32, Ordering::Relaxed);
}

/// What a rank has written down, as a peer reads it: data, never trusted.
pub fn read(detail: &Detail) -> Error {
    let len = (detail.len.load(Ordering::Relaxed) as usize).min(MESSAGE - 1);
    let text: Vec<u8> = detail
        .text
        .iter()
        .flat_map(|w| w.load(Ordering::Relaxed).to_ne_bytes())
        .take(len)
        .collect();
    let mut error = Error::new(Status::Transport, String::from_utf8_lossy(&text));
    error.native = detail.native.load(Ordering::Relaxed);
    error
}
