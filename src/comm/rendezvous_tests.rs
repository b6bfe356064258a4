//! Ranks as threads, each with its own directory handle and sockets, so that what they do to each
//! other is what processes do. Strangers and dying ranks are raw sockets that speak the protocol.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{mpsc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use super::socket::{wait, Socket, MOST_DESCRIPTORS};
use super::wire::{Hello, Message, VERSION};
use super::{door, join_in, memfd, Join, Joined, Mapping, TOKEN};
use crate::error::{Error, Result, Status};

pub const NAME: &str = "a.Job_1-x";
pub const OWN: usize = 3 * 4096 + 129;
pub const GROUP: usize = 4096 + 64;
const SETTINGS: &[(&str, u64)] = &[("staging_bytes", 1 << 25), ("chunk", 77)];

/// A private directory that is gone afterwards.
pub struct Place(pub PathBuf);

impl Place {
    pub fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("rsbucket-t{}-{n}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Place(path)
    }

    pub fn join(&self, join: &Join) -> Result<Joined> {
        self.join_as(join, "")
    }

    pub fn join_as(&self, join: &Join, token: &str) -> Result<Joined> {
        join_in(
            join,
            &environment(&[("RSBUCKET_RUN_DIR", &self.0), (TOKEN, token.as_ref())]),
        )
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join(door::file_of(NAME).unwrap())
    }

    /// A raw connection to rank 0, once it is there.
    pub fn connect(&self) -> Socket {
        loop {
            if let Ok(socket) = Socket::connect(&self.socket()) {
                return socket;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A raw rank that is a member.
    pub fn member(&self, rank: u32, size: u32, memory: OwnedFd) -> Socket {
        let socket = self.connect();
        let hello = Message::Hello(hello(rank, size)).encode();
        socket.send(&hello, &[memory.as_fd()]).unwrap();
        assert_eq!(hear(&socket), Some(Message::Welcome));
        socket
    }

    pub fn assert_empty(&self) {
        assert_eq!(fs::read_dir(&self.0).unwrap().count(), 0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn environment(values: &[(&str, &Path)]) -> impl Fn(&str) -> Option<OsString> {
    let own = |(k, v): &(&str, &Path)| (k.to_string(), v.as_os_str().to_owned());
    let values: HashMap<String, OsString> = values.iter().map(own).collect();
    move |name| values.get(name).cloned()
}

/// A rank that waits longer than any test takes that goes well.
pub fn rank(rank: u32, size: u32) -> Join<'static> {
    Join {
        name: NAME,
        rank,
        size,
        deadline: Some(Instant::now() + Duration::from_secs(60)),
        settings: SETTINGS,
        own_bytes: OWN,
        own_committed: 0,
        group_bytes: GROUP,
        lost: None,
    }
}

pub fn within(millis: u64, join: Join<'static>) -> Join<'static> {
    let deadline = Some(Instant::now() + Duration::from_millis(millis));
    Join { deadline, ..join }
}

pub fn hello(rank: u32, size: u32) -> Hello {
    Hello {
        version: VERSION,
        rank,
        size,
        token: Vec::new(),
        patience: None,
        settings: SETTINGS.iter().map(|&(n, v)| (n.to_owned(), v)).collect(),
    }
}

/// The next message; none: the other end is closed.
pub fn hear(socket: &Socket) -> Option<Message> {
    loop {
        match socket.receive(MOST_DESCRIPTORS) {
            Ok(packet) => return Some(Message::decode(&packet.bytes).unwrap()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                wait(&mut [socket.awaiting(libc::POLLIN)], None).unwrap();
            }
            Err(_) => return None,
        }
    }
}

pub fn memory(bytes: usize) -> OwnedFd {
    memfd::own(bytes, 0).unwrap().1.into()
}

/// All of `ranks` at once, each in its thread.
pub fn all(place: &Place, ranks: Vec<Join<'static>>) -> Vec<Result<Joined>> {
    thread::scope(|scope| {
        let run = |join: Join<'static>| scope.spawn(move || place.join(&join));
        let threads: Vec<_> = ranks.into_iter().map(run).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

pub fn full(size: u32) -> Vec<Join<'static>> {
    (0..size).map(|r| rank(r, size)).collect()
}

pub fn error(result: Result<Joined>) -> Error {
    result.map(|_| ()).unwrap_err()
}

/// What rank `rank` writes at byte `i` in round `round`.
fn value(rank: usize, i: usize, round: usize) -> u8 {
    (i * 31 + i / 251 + rank * 97 + round * 13 + 1) as u8
}

fn maps() -> String {
    fs::read_to_string("/proc/self/maps").unwrap()
}

fn access_of<'a>(mapping: &Mapping, maps: &'a str) -> &'a str {
    let start = format!("{:x}-", mapping.as_ptr() as usize);
    let line = maps.lines().find(|l| l.starts_with(&start)).unwrap();
    assert!(line.contains("memfd:rsbucket"), "{line}");
    line.split(' ').nth(1).unwrap()
}

/// Every rank writes its own memory and its part of the group's; every rank reads all of it.
fn exchange(joined: Joined, rank: usize, round: usize, barrier: &Barrier) {
    let size = joined.peers.len();
    let part = GROUP / size;
    assert_eq!((joined.own.len(), joined.group.len()), (OWN, GROUP));
    joined.own.commit(0, OWN).unwrap();
    for i in 0..OWN {
        // SAFETY: inside this rank's own memory, which no one else writes.
        unsafe {
            joined
                .own
                .as_ptr()
                .add(i)
                .write_volatile(value(rank, i, round))
        };
    }
    for i in rank * part..(rank + 1) * part {
        // SAFETY: inside the group's memory, in the part of this rank.
        unsafe {
            joined
                .group
                .as_ptr()
                .add(i)
                .write_volatile(value(rank, i, round))
        };
    }
    barrier.wait();
    let maps = maps();
    for (peer, mapping) in joined.peers.iter().enumerate() {
        assert_eq!(mapping.is_none(), peer == rank);
        let Some(mapping) = mapping else { continue };
        assert_eq!((mapping.len(), access_of(mapping, &maps)), (OWN, "r--s"));
        for i in 0..OWN {
            // SAFETY: inside the mapping; its owner writes it no more.
            let seen = unsafe { mapping.as_ptr().add(i).read_volatile() };
            assert_eq!(seen, value(peer, i, round), "byte {i} of rank {peer}");
        }
    }
    for i in 0..size * part {
        // SAFETY: inside the mapping; nobody writes it any more.
        let seen = unsafe { joined.group.as_ptr().add(i).read_volatile() };
        assert_eq!(seen, value(i / part, i, round), "byte {i} of the group");
    }
    assert_eq!(access_of(&joined.own, &maps), "rw-s");
    assert_eq!(access_of(&joined.group, &maps), "rw-s");
    barrier.wait();
}

fn share_rounds(size: u32, rounds: usize) {
    let place = Place::new();
    let barrier = Barrier::new(size as usize);
    thread::scope(|scope| {
        for r in 0..size {
            let (place, barrier) = (&place, &barrier);
            scope.spawn(move || {
                for round in 0..rounds {
                    // The same name again at once: no round may meet the one before.
                    let joined = place.join(&rank(r, size)).unwrap();
                    exchange(joined, r as usize, round, barrier);
                }
            });
        }
    });
    place.assert_empty();
}

pub fn wait_for(done: impl Fn() -> bool) {
    while !done() {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_one_writes_all_can_read() {
    for size in [2, 3, 4, 8] {
        share_rounds(size, 5);
    }
}

#[test]
fn one_rank_needs_no_directory() {
    let nowhere = environment(&[("RSBUCKET_RUN_DIR", Path::new("/proc/none"))]);
    let joined = join_in(&rank(0, 1), &nowhere).unwrap();
    exchange(joined, 0, 0, &Barrier::new(1));
}

#[test]
#[ignore = "run by the next test in a process where nobody else opens files"]
fn alone_descriptors_are_given_back() {
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    share_rounds(MOST_DESCRIPTORS as u32 + 6, 1);
    let place = Place::new();
    let mut odd = full(3);
    odd[2].settings = &[("chunk", 78)];
    all(&place, odd).into_iter().for_each(|r| drop(error(r)));
    all(&place, vec![within(50, rank(0, 3)), within(50, rank(2, 3))]);
    place.assert_empty();
    let mapped = maps().matches("memfd:").count();
    assert_eq!((count(), mapped), (before, 0));
}

#[test]
fn descriptors_are_given_back() {
    let (_, module) = module_path!().split_once("::").unwrap();
    let test = format!("{module}::alone_descriptors_are_given_back");
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&test, "--exact", "--ignored", "--test-threads=1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
fn a_different_setting_fails_everywhere() {
    let odd: &[(&[(&str, u64)], &str)] = &[
        (
            &[("staging_bytes", 9), ("chunk", 77)],
            "staging_bytes is 33554432 on rank 0 and 9 on rank 2",
        ),
        (
            &[("staging_bytes", 1 << 25)],
            "chunk is 77 on rank 0 and missing on rank 2",
        ),
        (
            &[("staging_bytes", 1 << 25), ("chunk", 77), ("more", 5)],
            "more is missing on rank 0 and 5 on rank 2",
        ),
    ];
    for (settings, text) in odd {
        let place = Place::new();
        let mut ranks = full(4);
        ranks[2].settings = settings;
        for result in all(&place, ranks) {
            let e = error(result);
            assert_eq!((e.status, e.peer), (Status::ConfigMismatch, 2));
            assert!(e.message.contains(text) && e.message.contains(NAME), "{e}");
        }
        place.assert_empty();
    }
}

#[test]
fn a_different_size_fails_everywhere_also_for_who_comes_late() {
    for (host, others) in [(4, 3), (3, 4)] {
        let place = Place::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| place.join(&rank(0, host)));
            let text = format!("size is {host} on rank 0 and {others} on rank 1");
            for r in [1, 2] {
                // Rank 2 comes when rank 1 has long been told.
                let e = error(place.join(&rank(r, others)));
                assert_eq!((e.status, e.peer), (Status::ConfigMismatch, 1));
                assert!(e.message.contains(&text), "{e}");
            }
            assert_eq!(error(first.join().unwrap()).status, Status::ConfigMismatch);
        });
        place.assert_empty();
    }
}

#[test]
fn one_rank_with_another_size_fails_everywhere() {
    // Each in turn is the odd one, and names one rank less or more than there are.
    for (odd, named) in [(0, 3), (0, 5), (1, 3), (1, 5), (2, 3), (3, 5)] {
        let place = Place::new();
        let (send, receive) = mpsc::channel();
        thread::scope(|scope| {
            for r in [0, 1, 2] {
                let (place, send) = (&place, send.clone());
                let size = if r == odd { named } else { 4 };
                scope.spawn(move || send.send(error(place.join(&rank(r, size)))).unwrap());
            }
            // The last one comes when a rank has long been told.
            let first = (odd < 3).then(|| receive.recv().unwrap());
            let last = place.join(&rank(3, if odd == 3 { named } else { 4 }));
            for e in first.into_iter().chain([error(last)]) {
                assert_eq!(e.status, Status::ConfigMismatch, "{e}");
                let sizes = format!("size is {}", if odd == 0 { named } else { 4 });
                assert!(e.message.contains(&sizes), "{e}");
            }
            for e in receive.iter().take(if odd < 3 { 2 } else { 3 }) {
                assert_eq!(e.status, Status::ConfigMismatch, "{e}");
            }
        });
        place.assert_empty();
    }
}

#[test]
fn another_version_is_told_so() {
    let place = Place::new();
    thread::scope(|scope| {
        let first = scope.spawn(|| place.join(&rank(0, 2)));
        let socket = place.connect();
        let mut bytes = Message::Hello(hello(1, 2)).encode();
        bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
        bytes.extend(b"what version 7 says more");
        socket.send(&bytes, &[]).unwrap();
        let e = error(first.join().unwrap());
        assert_eq!((e.status, e.peer), (Status::ConfigMismatch, 1));
        assert!(
            e.message
                .contains("wire version is 1 on rank 0 and 7 on rank 1"),
            "{e}"
        );
        assert_eq!(hear(&socket), Some(Message::Fail(e)));
    });
}

/// Starts `rivals`, of whom only one can have the place, and `rest` once a rival is refused.
fn rivalry(rivals: Vec<Join<'static>>, rest: Vec<Join<'static>>) {
    let place = Place::new();
    let (send, receive) = mpsc::channel();
    let count = rivals.len() + rest.len();
    thread::scope(|scope| {
        let run = |join: Join<'static>| {
            let (place, send) = (&place, send.clone());
            scope.spawn(move || send.send(place.join(&join)).unwrap());
        };
        let contested = rivals[1].rank;
        rivals.into_iter().for_each(&run);
        let e = error(receive.recv().unwrap());
        assert_eq!(e.status, Status::Permission);
        let text = format!("rank {contested} is already there");
        assert!(e.message.contains(&text), "{e}");
        rest.into_iter().for_each(&run);
        for result in receive.iter().take(count - 1) {
            result.unwrap();
        }
    });
    place.assert_empty();
}

#[test]
fn a_second_process_of_one_rank_is_refused() {
    rivalry(vec![rank(0, 3), rank(1, 3), rank(1, 3)], vec![rank(2, 3)]);
}

#[test]
fn a_second_rank_0_is_refused() {
    rivalry(vec![rank(0, 2), rank(0, 2)], vec![rank(1, 2)]);
}

#[test]
fn who_waits_in_vain_is_told_for_whom() {
    let place = Place::new();
    // The first deadline ends it for all.
    let mut ranks = vec![rank(0, 5), within(100, rank(2, 5)), rank(4, 5)];
    ranks[0].deadline = None;
    for result in all(&place, ranks) {
        let e = error(result);
        assert_eq!((e.status, e.peer), (Status::Timeout, 1));
        assert!(e.message.contains("have not come: ranks 1, 3"), "{e}");
    }
    place.assert_empty();
    let e = error(place.join(&within(20, rank(1, 2))));
    assert_eq!((e.status, e.peer), (Status::Timeout, 0));
    assert!(e.message.contains("rank 0 has not come"), "{e}");
}

#[test]
fn no_memory_in_one_rank_is_told_to_all() {
    let huge = usize::MAX / 2;
    for culprit in [0, 2] {
        let place = Place::new();
        let mut ranks = full(3);
        ranks[culprit].own_bytes = huge;
        let late = ranks.remove(1);
        thread::scope(|scope| {
            let early = scope.spawn(|| all(&place, ranks));
            let late = scope.spawn(|| {
                wait_for(|| place.socket().exists());
                place.join(&late)
            });
            let e = error(late.join().unwrap());
            assert_eq!((e.status, e.peer), (Status::NoMemory, culprit as i32));
            assert!(
                e.native != 0 && e.message.contains(&huge.to_string()),
                "{e}"
            );
            for result in early.join().unwrap() {
                let e = error(result);
                assert_eq!(e.status, Status::NoMemory);
                assert!(
                    e.native != 0 && e.message.contains(&huge.to_string()),
                    "{e}"
                );
            }
        });
        place.assert_empty();
    }
}

#[test]
fn names_are_checked() {
    let long = "n".repeat(65);
    for name in ["", "a/b", "a b", "..\0", "\u{e9}", &long] {
        let e = error(join_in(&Join { name, ..rank(0, 1) }, &|_| None));
        assert_eq!(e.status, Status::InvalidArgument);
        assert!(e.message.contains("`name`") && e.message.contains(&format!("{name:?}")));
    }
    let longest = "N".repeat(64);
    for name in [".", "..", "-", &longest] {
        let place = Place::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| place.join(&Join { name, ..rank(0, 2) }));
            place.join(&Join { name, ..rank(1, 2) }).unwrap();
            first.join().unwrap().unwrap();
        });
        place.assert_empty();
    }
}

/// How many signals of a storm have come.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// Runs `ranks` at once, each in its thread, under signals that come all the time; `meanwhile` is done
/// here when the storm has begun.
fn in_a_storm<T: Send, R: FnOnce() -> T + Send>(
    ranks: Vec<R>,
    meanwhile: impl FnOnce() + Send,
) -> Vec<T> {
    extern "C" fn count(_: i32) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler counts only; without SA_RESTART every call it meets is interrupted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        let done = libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut());
        assert_eq!(done, 0);
    }
    let running = AtomicU32::new(ranks.len() as u32);
    let over = AtomicBool::new(false);
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        let run = |rank: R| {
            let (running, over, send) = (&running, &over, send.clone());
            scope.spawn(move || {
                // SAFETY: takes nothing.
                send.send(unsafe { libc::pthread_self() }).unwrap();
                let result = rank();
                running.fetch_sub(1, Ordering::Relaxed);
                wait_for(|| over.load(Ordering::Relaxed));
                result
            })
        };
        let count = ranks.len();
        let threads: Vec<_> = ranks.into_iter().map(run).collect();
        let ids: Vec<_> = receive.iter().take(count).collect();
        let meanwhile = scope.spawn(meanwhile);
        while running.load(Ordering::Relaxed) > 0 {
            for &id in &ids {
                // SAFETY: the thread stays until it is told that this is over.
                unsafe { libc::pthread_kill(id, libc::SIGUSR2) };
            }
            // A storm, but one in which a sleep still gets somewhere.
            thread::sleep(Duration::from_micros(50));
        }
        over.store(true, Ordering::Relaxed);
        meanwhile.join().unwrap();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Until many more signals have come.
fn weather_the_storm() {
    let until = SIGNALS.load(Ordering::Relaxed) + 500;
    wait_for(|| SIGNALS.load(Ordering::Relaxed) >= until);
}

#[test]
fn signals_change_nothing() {
    let place = Place::new();
    let join = |r| {
        let place = &place;
        move || {
            let join = Join {
                group_bytes: 8 << 20,
                ..rank(r, 2)
            };
            (0..20).try_for_each(|_| place.join(&join).map(drop))
        }
    };
    for result in in_a_storm(vec![join(0), join(1)], || ()) {
        result.unwrap();
    }
}

#[test]
fn signals_neither_end_a_wait_nor_make_it_longer() {
    // Rank 0 waits for both others; rank 2 for rank 0 that is there, or is not there yet.
    for waiting in [vec![rank(0, 3), rank(2, 3)], vec![rank(2, 3), rank(1, 3)]] {
        let place = Place::new();
        let missing = (0..3).find(|&r| waiting.iter().all(|w| w.rank != r));
        let join = |join: Join<'static>| {
            let place = &place;
            move || place.join(&join).map(drop)
        };
        let last = || {
            weather_the_storm();
            place.join(&rank(missing.unwrap(), 3)).unwrap();
        };
        for result in in_a_storm(waiting.into_iter().map(join).collect(), last) {
            result.unwrap();
        }
        place.assert_empty();
    }
    let place = Place::new();
    let join = |join: Join<'static>| {
        let place = &place;
        move || place.join(&join)
    };
    let waiting = vec![within(100, rank(0, 3)), rank(2, 3)];
    for result in in_a_storm(waiting.into_iter().map(join).collect(), || ()) {
        let e = error(result);
        assert_eq!((e.status, e.peer), (Status::Timeout, 1));
    }
    place.assert_empty();
}
