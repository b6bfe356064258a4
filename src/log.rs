//! Where the library speaks: a hook that the process may set. Nothing is ever printed.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How much a message matters; the numbers of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum Level {
    /// Something failed.
    Error = 1,
    /// Something is unusual.
    Warn = 2,
    /// What happens seldom.
    Info = 3,
    /// What happens often.
    Debug = 4,
}

/// Takes messages; dropped after its last use.
pub trait Sink: Send + Sync {
    /// One message of `target`, a part of the library.
    fn take(&self, level: Level, target: &str, message: &str);
}

static SINK: Mutex<Option<Arc<dyn Sink>>> = Mutex::new(None);
static MAX: AtomicI32 = AtomicI32::new(0);

/// Sets the process's sink, and the least important level it wants. The one before is dropped once
/// nobody is inside it.
pub fn set(sink: Option<Arc<dyn Sink>>, max: Level) {
    let level = if sink.is_some() { max as i32 } else { 0 };
    let before = {
        let mut current = SINK.lock().unwrap_or_else(PoisonError::into_inner);
        MAX.store(level, Ordering::Relaxed);
        std::mem::replace(&mut *current, sink)
    };
    drop(before);
}

/// Speaks, if somebody listens. No lock is held while the sink runs.
pub fn write(level: Level, target: &str, message: fmt::Arguments<'_>) {
    if level as i32 > MAX.load(Ordering::Relaxed) {
        return;
    }
    let sink = SINK.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(sink) = sink {
        sink.take(level, target, &message.to_string());
    }
}
