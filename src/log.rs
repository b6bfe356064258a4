//! Where the library speaks: a hook that the process may set. Nothing is ever printed.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::error::{Error, Result, Status};
use crate::handle::Table;

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

const SINK_KIND: u8 = 0xb4;
static SINKS: Table<Box<dyn Sink>> = Table::new(SINK_KIND);
/// The sink's token, with the least important level it wants in place of the kind; 0: no sink.
static CURRENT: AtomicU64 = AtomicU64::new(0);
const LEVEL_AT: u32 = 56;

/// Sets the process's sink, and the least important level it wants. The one before is dropped once
/// nobody is inside it. A forked child keeps its parent's.
pub fn set(sink: Option<Box<dyn Sink>>, max: Level) -> Result<()> {
    let next = match sink {
        None => 0,
        Some(sink) => {
            let token = SINKS.insert(Arc::new(sink)).ok_or_else(|| {
                Error::new(Status::NoMemory, "too many loggers are inside their calls")
            })?;
            (max as u64) << LEVEL_AT | token & ((1 << LEVEL_AT) - 1)
        }
    };
    let before = CURRENT.swap(next, Ordering::AcqRel);
    drop(SINKS.remove_inherited(token_of(before)));
    Ok(())
}

fn token_of(current: u64) -> u64 {
    match current {
        0 => 0,
        _ => u64::from(SINK_KIND) << LEVEL_AT | current & ((1 << LEVEL_AT) - 1),
    }
}

/// Speaks, if somebody listens. No lock is held while the sink runs.
pub fn write(level: Level, target: &str, message: fmt::Arguments<'_>) {
    loop {
        let current = CURRENT.load(Ordering::Acquire);
        if level as u64 > current >> LEVEL_AT {
            return;
        }
        // Replaced just now: there is another, or none.
        let Ok(sink) = SINKS.get_inherited(token_of(current)) else {
            continue;
        };
        return sink.take(level, target, &message.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    struct Counting(Arc<[AtomicUsize; 2]>);

    impl Sink for Counting {
        fn take(&self, _: Level, target: &str, message: &str) {
            if target == "log test" && message == "7 of 9" {
                self.0[0].fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    impl Drop for Counting {
        fn drop(&mut self) {
            self.0[1].fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn sinks_hear_their_levels_and_are_dropped_once() {
        let counts = Arc::new([const { AtomicUsize::new(0) }; 2]);
        let count = |which: usize| counts[which].load(Ordering::Relaxed);
        let speak = |level| write(level, "log test", format_args!("{} of 9", 7));
        for (round, max) in [Level::Error, Level::Debug, Level::Info]
            .into_iter()
            .enumerate()
        {
            set(Some(Box::new(Counting(counts.clone()))), max).unwrap();
            assert_eq!(count(1), round, "dropped");
            let heard = count(0);
            for level in [Level::Error, Level::Warn, Level::Info, Level::Debug] {
                speak(level);
            }
            assert_eq!(count(0) - heard, max as usize);
        }
        // Changed while others speak: every sink is dropped, once.
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| (0..2000).for_each(|_| speak(Level::Error)));
                s.spawn(|| {
                    for _ in 0..200 {
                        set(Some(Box::new(Counting(counts.clone()))), Level::Error).unwrap();
                    }
                });
            }
        });
        set(None, Level::Error).unwrap();
        speak(Level::Error);
        assert_eq!(count(1), 403);
    }
}
