//! Rank 0's side of the rendezvous: one loop over all connections, none of which can hold it up.
//!
//! Who has said no proper hello is a stranger; few of them are kept, and the oldest goes first.
//! Once something has gone wrong there is a verdict, which every member is told at once, and every
//! rank that comes later until all have come. Where ranks named different sizes, nobody knows who is
//! still to come: rank 0 then stays a moment for whoever is a rank by any of them. A rank that was
//! told, and comes again, is here for the next group of this name: it is sent away without a word,
//! and looks again.

use std::collections::VecDeque;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::super::mapping::Mapping;
use super::super::rundir::{self, RunDir};
use super::super::word::MAX_RANKS;
use super::door::Door;
use super::socket::{wait, Socket, MOST_DESCRIPTORS};
use super::wire::{Hello, Message, VERSION};
use super::{crowded, decide, ended, failed, map_peer, memfd, past, status_of, Join, Joined};
use crate::error::{Error, Result, Status};

/// How long rank 0 still tells ranks that come late of a rank that is gone.
const LATE: Duration = Duration::from_secs(10);
/// How long it stays for ranks that are some only by the larger of the sizes that were named.
const DOUBTFUL: Duration = Duration::from_secs(2);
/// How many connections without a hello are kept.
pub const MOST_STRANGERS: usize = 64;

/// Meets all other ranks as rank 0.
pub fn host(join: &Join, dir: &RunDir, token: &[u8]) -> Result<Joined> {
    let door = Door::open(join.name, dir, join.deadline)?;
    let mut host = Host::new(join, token);
    let memory = memfd::own(join.own_bytes, join.own_committed);
    let memory = memory.and_then(|own| Ok((own, memfd::group(join.group_bytes)?)));
    let ((own, own_file), (group, group_file)) = match memory {
        Ok(memory) => memory,
        Err(cause) => {
            host.fail(from_rank(0, cause.clone()));
            return host.meet(&door).and(Err(cause));
        }
    };
    host.files[0] = Some(own_file);
    host.files[join.size as usize] = Some(group_file);
    let peers = host.meet(&door)?;
    if !decide(&group, true) {
        // Somebody has given up in the meantime, and the group is not to be.
        let text = format!(
            "job {}: a rank gave up while the group was forming",
            join.name
        );
        host.fail(Error::new(Status::PeerLost, text));
        return host.meet(&door).and_then(|_| Err(host.timeout()));
    }
    // Before anybody can leave, and come back for the next job of this name.
    drop(door);
    for member in host.members.iter().flatten() {
        // Who cannot hear it has died since it was ready: the others will see that by themselves.
        let _ = member.socket.send(&Message::Go.encode(), &[]);
    }
    Ok(Joined { own, peers, group })
}

/// A rank that has said its hello.
struct Member {
    socket: Socket,
    /// How many descriptors it has been given.
    given: usize,
    /// It has mapped them all.
    ready: bool,
}

pub struct Host<'a> {
    join: &'a Join<'a>,
    token: &'a [u8],
    /// The earliest of all ranks' deadlines.
    deadline: Option<Instant>,
    strangers: VecDeque<Socket>,
    members: Vec<Option<Member>>,
    /// The memory of each rank, then the group's.
    files: Vec<Option<File>>,
    verdict: Option<Error>,
    /// Which ranks know the verdict, by the largest size that was named, how many there are by the
    /// smallest one, and until when the rest is awaited.
    told: Vec<bool>,
    expected: usize,
    doubt: Option<Instant>,
}

impl<'a> Host<'a> {
    /// A host that has met nobody yet.
    pub fn new(join: &'a Join<'a>, token: &'a [u8]) -> Host<'a> {
        let size = join.size as usize;
        let mut told = vec![false; size];
        told[0] = true;
        Host {
            join,
            token,
            deadline: join.deadline,
            strangers: VecDeque::new(),
            members: (0..size).map(|_| None).collect(),
            files: (0..=size).map(|_| None).collect(),
            verdict: None,
            told,
            expected: size,
            doubt: None,
        }
    }

    /// Until all members are ready, or all know why they will not be.
    fn meet(&mut self, door: &Door) -> Result<Vec<Option<Mapping>>> {
        let mut peers = None;
        loop {
            if let (None, Some(cause)) = (&self.verdict, self.join.lost()) {
                self.fail(cause);
            }
            if let Some(verdict) = self.verdict.as_ref().filter(|_| self.may_leave()) {
                return Err(verdict.clone());
            }
            if past(self.deadline) {
                self.fail(self.timeout());
                continue;
            }
            if peers.is_none() && self.verdict.is_none() && self.files.iter().all(Option::is_some) {
                match self.map() {
                    Ok(mapped) => peers = Some(mapped),
                    Err(cause) => self.fail(from_rank(0, cause)),
                }
                continue;
            }
            if self
                .members
                .iter()
                .skip(1)
                .all(|m| m.as_ref().is_some_and(|m| m.ready))
            {
                if let Some(peers) = peers {
                    return Ok(peers);
                }
            }
            if let Err(cause) = self.turn(door, peers.is_some()) {
                self.fail(from_rank(0, cause.clone()));
                return Err(self.verdict.clone().unwrap_or(cause));
            }
        }
    }

    /// Whether everybody who can be told knows the verdict: the ranks to come are told, too.
    fn may_leave(&self) -> bool {
        let (sure, doubtful) = self.told.split_at(self.expected);
        past(self.deadline)
            || self.join.lost().is_some()
            || sure.iter().all(|&told| told)
                && (past(self.doubt) || doubtful.iter().all(|&told| told))
    }

    /// Waits until something happens, and deals with all that has.
    fn turn(&mut self, door: &Door, sharing: bool) -> Result<()> {
        let mut polled = vec![door.listener.awaiting(libc::POLLIN)];
        let mut ranks = Vec::new();
        for (rank, member) in self.members.iter().enumerate() {
            if let Some(member) = member {
                let more = sharing && member.given < self.files.len();
                let events = if more {
                    libc::POLLIN | libc::POLLOUT
                } else {
                    libc::POLLIN
                };
                polled.push(member.socket.awaiting(events));
                ranks.push(rank);
            }
        }
        polled.extend(self.strangers.iter().map(|s| s.awaiting(libc::POLLIN)));
        let doubt = self.doubt.filter(|_| !past(self.doubt));
        let until = self.join.look(self.deadline.into_iter().chain(doubt).min());
        wait(&mut polled, until).map_err(|e| self.failed("waiting for ranks", &e))?;

        let (members, strangers) = polled[1..].split_at(ranks.len());
        for (rank, polled) in ranks.into_iter().zip(members) {
            if polled.revents & libc::POLLOUT != 0 {
                self.share(rank);
            }
            if polled.revents & !libc::POLLOUT != 0 {
                self.hear(rank);
            }
        }
        for (stranger, polled) in mem::take(&mut self.strangers).into_iter().zip(strangers) {
            if polled.revents != 0 {
                self.greet(stranger);
            } else {
                self.strangers.push_back(stranger);
            }
        }
        if polled[0].revents != 0 {
            self.open(door)?;
        }
        Ok(())
    }

    /// Lets in who is at the door, as far as it is the same user.
    pub fn open(&mut self, door: &Door) -> Result<()> {
        for _ in 0..MOST_STRANGERS {
            match door.listener.accept() {
                Ok(socket) => {
                    if socket
                        .peer_user()
                        .is_ok_and(|user| user == rundir::effective_user())
                    {
                        self.greet(socket);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    let error = self.failed("letting ranks in", &e);
                    if self.verdict.is_some() {
                        return Err(error);
                    }
                    // Which lets members go, and so makes room to tell the others.
                    self.fail(from_rank(0, error));
                    break;
                }
            }
        }
        Ok(())
    }

    /// Hears the first message of a connection, if it has come.
    fn greet(&mut self, socket: Socket) {
        match socket.receive(1) {
            Ok(packet) => {
                if let Some(Message::Hello(hello)) = Message::decode(&packet.bytes) {
                    let file = packet.descriptors.into_iter().next().map(File::from);
                    self.admit(socket, hello, file, packet.cut);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if self.strangers.len() == MOST_STRANGERS {
                    self.strangers.pop_front();
                }
                self.strangers.push_back(socket);
            }
            Err(_) => {}
        }
    }

    fn admit(&mut self, socket: Socket, hello: Hello, file: Option<File>, cut: bool) {
        let Join { name, size, .. } = *self.join;
        let rank = hello.rank;
        let place = rank as usize;
        let refuse = |text: String| tell(&socket, &Error::new(Status::Permission, text));
        if !same(self.token, &hello.token) {
            refuse(format!(
                "job {name}: rank {rank} has another RSBUCKET_TOKEN than rank 0"
            ));
            return;
        }
        // A rank that failed and comes again may be faster than the news of its end.
        while self.hear(place) {}
        if rank == 0 || self.members.get(place).is_some_and(Option::is_some) {
            refuse(format!("job {name}: rank {rank} is already there"));
            return;
        }
        if let Some(text) = difference(self.join, &hello) {
            self.count(hello.size);
            let text = format!("job {name}: {text}");
            self.fail(Error::new(Status::ConfigMismatch, text).blame(rank));
        } else if rank >= size {
            return;
        } else if cut {
            let e = io::Error::from_raw_os_error(libc::EMFILE);
            let error = self.failed(&format!("taking the memory of rank {rank}"), &e);
            self.fail(from_rank(0, error));
        }
        if let Some(verdict) = &self.verdict {
            match self.told.get_mut(place) {
                Some(true) => {}
                Some(told) => {
                    tell(&socket, verdict);
                    *told = true;
                }
                None => tell(&socket, verdict),
            }
            return;
        }
        let end = hello.patience.and_then(|p| Instant::now().checked_add(p));
        self.deadline = self.deadline.into_iter().chain(end).min();
        let welcome = socket.send(&Message::Welcome.encode(), &[]);
        self.files[place] = file;
        self.members[place] = Some(Member {
            socket,
            given: 0,
            ready: false,
        });
        // If it is gone already, that is seen where it is heard.
        if let Err(e) = welcome {
            if !ended(&e) {
                let error = self.failed(&format!("welcoming rank {rank}"), &e);
                self.fail(from_rank(0, error));
            }
        }
    }

    /// Somebody says how many ranks there are.
    fn count(&mut self, size: u32) {
        let named = size.min(MAX_RANKS) as usize;
        if named != self.told.len() && self.doubt.is_none() {
            self.doubt = Instant::now().checked_add(DOUBTFUL);
        }
        self.expected = self.expected.min(named);
        self.told.resize(self.told.len().max(named), false);
    }

    /// Hears a member: whether it said something that may be followed by more.
    fn hear(&mut self, rank: usize) -> bool {
        let Some(Some(member)) = self.members.get_mut(rank) else {
            return false;
        };
        let name = self.join.name;
        let error = match member.socket.receive(0) {
            Ok(packet) => match Message::decode(&packet.bytes) {
                Some(Message::Ready) if member.given == self.files.len() && !member.ready => {
                    member.ready = true;
                    return true;
                }
                Some(Message::Fail(cause)) => from_rank(rank as u32, cause),
                _ => {
                    let text = format!("job {name}: rank {rank} says what no rank says");
                    Error::new(Status::Transport, text).blame(rank as u32)
                }
            },
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
            Err(e) if ended(&e) => {
                let text = format!("job {name}: rank {rank} was lost before all had joined");
                let error = Error::new(Status::PeerLost, text).blame(rank as u32);
                // It may have left for a rank that is known to be gone, and was faster to see it.
                self.join.lost().unwrap_or(error)
            }
            Err(e) => self.failed(&format!("listening to rank {rank}"), &e),
        };
        self.fail(error);
        false
    }

    /// Hands a member as many descriptors as it can take now.
    fn share(&mut self, rank: usize) {
        let Some(member) = &mut self.members[rank] else {
            return;
        };
        let all: Vec<BorrowedFd> = self.files.iter().flatten().map(AsFd::as_fd).collect();
        while member.given < all.len() {
            let first = member.given as u32;
            let end = all.len().min(member.given + MOST_DESCRIPTORS);
            let bytes = Message::Memory { first }.encode();
            match member.socket.send(&bytes, &all[member.given..end]) {
                Ok(()) => member.given = end,
                // What a member that is gone has to say is heard first.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock || ended(&e) || crowded(&e) => {
                    return;
                }
                Err(e) => {
                    let error = self.failed(&format!("giving memory to rank {rank}"), &e);
                    self.fail(from_rank(0, error));
                    return;
                }
            }
        }
    }

    /// Maps what the other ranks have brought.
    fn map(&self) -> Result<Vec<Option<Mapping>>> {
        let files = self.files.iter().take(self.join.size as usize).enumerate();
        let map = |(rank, file): (usize, &Option<File>)| match file {
            Some(file) if rank > 0 => map_peer(self.join, rank as u32, file).map(Some),
            _ => Ok(None),
        };
        files.map(map).collect()
    }

    /// Tells all members why it will not be, and lets them go. The first reason is the one.
    fn fail(&mut self, error: Error) {
        if self.verdict.is_none() && error.status == Status::PeerLost {
            // Who else is gone never comes, and is not waited for as long as one who is only late.
            self.deadline = (self.deadline.into_iter())
                .chain(Instant::now().checked_add(LATE))
                .min();
        }
        let verdict = self.verdict.get_or_insert(error);
        for (rank, member) in self.members.iter_mut().enumerate() {
            if let Some(member) = member.take() {
                tell(&member.socket, verdict);
                self.told[rank] = true;
            }
        }
        self.files.fill_with(|| None);
    }

    fn failed(&self, what: &str, e: &io::Error) -> Error {
        let what = format!("job {}: {what}", self.join.name);
        let mut error = failed(status_of(e), what, e);
        if error.native == libc::EMFILE {
            let need = 2 * self.join.size + 8;
            error.message += &format!("; rank 0 opens up to {need} files here");
        }
        error
    }

    fn timeout(&self) -> Error {
        let absent: Vec<usize> = (1..self.members.len())
            .filter(|&rank| self.members[rank].is_none())
            .collect();
        let (late, what) = if absent.is_empty() {
            let unready = |m: &Option<Member>| m.as_ref().is_some_and(|m| !m.ready);
            let late = (1..self.members.len()).filter(|&r| unready(&self.members[r]));
            (late.collect(), "not mapped the others' memory")
        } else {
            (absent, "not come")
        };
        let named: Vec<String> = late.iter().take(16).map(usize::to_string).collect();
        let more = match late.len().saturating_sub(named.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let text = format!(
            "job {}: have {what}: ranks {}{more}",
            self.join.name,
            named.join(", ")
        );
        let error = Error::new(Status::Timeout, text);
        match late.first() {
            Some(&rank) => error.blame(rank as u32),
            None => error,
        }
    }
}

/// Says why not, to somebody who may not listen.
fn tell(socket: &Socket, error: &Error) {
    let _ = socket.send(&Message::Fail(error.clone()).encode(), &[]);
}

/// The error of `rank` as the others see it.
fn from_rank(rank: u32, mut error: Error) -> Error {
    error.message = format!("rank {rank}: {}", error.message);
    error.blame(rank)
}

/// Compares secrets in a time that does not tell where they differ.
fn same(ours: &[u8], theirs: &[u8]) -> bool {
    let pairs = ours.iter().zip(theirs);
    let differ = pairs.fold(0, |differ, (a, b)| black_box(differ | (a ^ b)));
    ours.len() == theirs.len() && differ == 0
}

/// The first thing in which a hello differs from what rank 0 was called with.
fn difference(join: &Join, hello: &Hello) -> Option<String> {
    let rank = hello.rank;
    let differ = |what: &str, ours: Option<u64>, theirs: Option<u64>| {
        let show = |v: Option<u64>| v.map_or("missing".to_owned(), |v| v.to_string());
        let (ours, theirs) = (show(ours), show(theirs));
        (ours != theirs).then(|| format!("{what} is {ours} on rank 0 and {theirs} on rank {rank}"))
    };
    let value = |name: &str| {
        hello
            .settings
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| *v)
    };
    let ours = |name: &str| {
        join.settings
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, v)| *v)
    };
    differ("size", Some(join.size.into()), Some(hello.size.into()))
        .or_else(|| {
            differ(
                "wire version",
                Some(VERSION.into()),
                Some(hello.version.into()),
            )
        })
        .or_else(|| {
            let names = join.settings.iter().map(|(name, _)| *name);
            let names = names.chain(hello.settings.iter().map(|(name, _)| name.as_str()));
            names
                .into_iter()
                .find_map(|name| differ(name, ours(name), value(name)))
        })
}
