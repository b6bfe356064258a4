//! How the processes of one host meet: once, at a socket of rank 0, to give each other their
//! memory. After that they talk through it, and the socket is gone.
//!
//! Rank 0 listens (`host`); the others come with a hello and a descriptor of their own memory.
//! When all are there rank 0 hands everybody's memory to everybody; each maps it and says so; and
//! only when all have said so does rank 0 let them go. Whatever prevents that is told to all.

mod door;
mod host;
#[cfg(test)]
mod hostile_tests;
mod memfd;
mod socket;
#[cfg(test)]
#[path = "rendezvous_tests.rs"]
mod tests;
mod wire;

/// What the fuzz targets need to be a stranger here.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod parts {
    pub use super::door::file_of;
    pub use super::memfd::{group, own};
    pub use super::socket::{wait, Socket, MOST_DESCRIPTORS};
    pub use super::wire::{Hello, Message, VERSION};
}

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::mapping::Mapping;
use super::rundir::{self, RunDir};
use crate::error::{invalid, Error, Result, Status};
use socket::{wait, Socket, MOST_DESCRIPTORS};
use wire::{Hello, Message, LONGEST_TOKEN, VERSION};

/// The variable whose value all ranks of a job must share, if it is set.
const TOKEN: &str = "RSBUCKET_TOKEN";
/// How much longer than its own deadline a rank waits for rank 0 to say who is missing.
const GRACE: Duration = Duration::from_secs(1);
/// Between two looks whether a rank is gone.
const LOOK: Duration = Duration::from_millis(2);
/// Between two looks for rank 0: from the first pause to the longest.
const PAUSES: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(8));

/// What a rank brings to the rendezvous.
pub struct Join<'a> {
    /// The job's name.
    pub name: &'a str,
    /// Who this is; less than `size`.
    pub rank: u32,
    /// How many ranks there are.
    pub size: u32,
    /// When to give up; none: never.
    pub deadline: Option<Instant>,
    /// What must be equal on all ranks.
    pub settings: &'a [(&'static str, u64)],
    /// The size of each rank's own memory: a function of the settings.
    pub own_bytes: usize,
    /// How much of it, from its beginning, is committed before anybody sees it. If any is, the first
    /// word is this process's liveness word.
    pub own_committed: usize,
    /// The size of the one region that all ranks may write: a function of the settings. Its last 64
    /// bytes are the rendezvous's own.
    pub group_bytes: usize,
    /// Which rank is known to be gone for ever, by another way than this; looked at while waiting.
    pub lost: Option<Watch<'a>>,
}

/// Says which rank is gone, once one is.
pub type Watch<'a> = &'a (dyn Fn() -> Option<Error> + Sync);

impl Join<'_> {
    /// The rank that is known to be gone.
    fn lost(&self) -> Option<Error> {
        self.lost.and_then(|lost| lost())
    }

    /// Until when to wait before looking again whether a rank is gone.
    fn look(&self, until: Option<Instant>) -> Option<Instant> {
        let soon = self.lost.map(|_| Instant::now() + LOOK);
        soon.into_iter().chain(until).min()
    }
}

/// What a rank takes away from it.
#[derive(Debug)]
pub struct Joined {
    /// This rank's memory; what is not committed yet it commits as it is used.
    pub own: Mapping,
    /// The memory of the others, to read; none at this rank's place.
    pub peers: Vec<Option<Mapping>>,
    /// What all may write, committed.
    pub group: Mapping,
}

/// Meets the other ranks of the job. `OK` only if all ranks get their memory.
pub fn join(join: &Join) -> Result<Joined> {
    join_in(join, &|name| std::env::var_os(name))
}

/// As [`join`], in another environment.
fn join_in(join: &Join, environment: rundir::Environment) -> Result<Joined> {
    check_name(join.name)?;
    let token = environment(TOKEN).map_or(Vec::new(), OsString::into_vec);
    if token.len() > LONGEST_TOKEN {
        let length = token.len();
        return Err(invalid!(
            "{TOKEN} has {length} bytes, expected at most {LONGEST_TOKEN}"
        ));
    }
    if join.size == 1 {
        let (own, _) = memfd::own(join.own_bytes, join.own_committed)?;
        let (group, _) = memfd::group(join.group_bytes)?;
        let peers = vec![None];
        return Ok(Joined { own, peers, group });
    }
    let dir = RunDir::find(environment)?;
    if join.rank == 0 {
        return host::host(join, &dir, &token);
    }
    let own = memfd::own(join.own_bytes, join.own_committed);
    let met = meet(join, &dir, &token, own.as_ref().map(|(_, shared)| shared));
    // What failed here is the cause, whatever the others make of it.
    let (own, _) = own?;
    let (peers, group) = met?;
    Ok(Joined { own, peers, group })
}

fn check_name(name: &str) -> Result<()> {
    let legal = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    if !(1..=64).contains(&name.len()) || !name.bytes().all(legal) {
        return Err(invalid!(
            "`name` must be 1 to 64 letters, digits, '.', '_' or '-', not {name:?}"
        ));
    }
    Ok(())
}

/// The memory of the others and the group's.
type Met = (Vec<Option<Mapping>>, Mapping);

/// Meets the others as a rank other than 0.
fn meet(
    join: &Join,
    dir: &RunDir,
    token: &[u8],
    own: std::result::Result<&File, &Error>,
) -> Result<Met> {
    let met = look(join, dir, token, own);
    if matches!(&met, Err(e) if matches!(e.status, Status::PeerLost | Status::Timeout)) {
        door::tidy(dir);
    }
    met
}

/// Looks for rank 0 until it lets this rank go, refuses it, or the time is up.
fn look(
    join: &Join,
    dir: &RunDir,
    token: &[u8],
    own: std::result::Result<&File, &Error>,
) -> Result<Met> {
    let path = dir.path_to(&door::file_of(join.name)?);
    let blame = |e: io::Error| {
        let what = format_args!("job {}: meeting rank 0 in {dir}", join.name);
        failed(status_of(&e), what, &e)
    };
    let mut pause = PAUSES.0;
    loop {
        match Socket::connect(&path) {
            Ok(socket) => {
                let user = socket.peer_user().map_err(blame)?;
                if user != rundir::effective_user() {
                    let text = format!("job {}: rank 0 in {dir} is user {user}'s", join.name);
                    return Err(Error::new(Status::Permission, text).blame(0));
                }
                if let Some(met) = Guest::new(join, socket).talk(token, own)? {
                    return Ok(met);
                }
            }
            // Not there yet, just gone, or too busy for the moment.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::WouldBlock
                ) => {}
            Err(e) => return Err(blame(e)),
        }
        if past(join.deadline) {
            let text = format!("job {}: rank 0 has not come to {dir}", join.name);
            return Err(Error::new(Status::Timeout, text).blame(0));
        }
        if let Some(cause) = join.lost() {
            return Err(cause);
        }
        let left = remaining(join.deadline).unwrap_or(pause);
        std::thread::sleep(pause.min(left));
        pause = PAUSES.1.min(pause * 2);
    }
}

/// A rank other than 0, connected to rank 0.
struct Guest<'a> {
    join: &'a Join<'a>,
    socket: Socket,
    welcome: bool,
    /// The memory of the first ranks, as far as it has come; then the group's.
    mapped: Vec<Option<Mapping>>,
}

impl<'a> Guest<'a> {
    fn new(join: &'a Join<'a>, socket: Socket) -> Guest<'a> {
        Guest {
            join,
            socket,
            welcome: false,
            mapped: Vec::new(),
        }
    }

    /// One conversation with rank 0; none: it did not let this rank in, and said nothing.
    ///
    /// Rank 0 may die between two words of farewell. What it has decided is in the group's memory, so
    /// that nobody starts with a group that others have given up.
    fn talk(
        mut self,
        token: &[u8],
        own: std::result::Result<&File, &Error>,
    ) -> Result<Option<Met>> {
        let heard = self.converse(token, own);
        let whole = self.join.size as usize + 1;
        match (heard, self.mapped.len() == whole) {
            (Err(cause), true) => match self.mapped.pop() {
                Some(Some(group)) if !decide(&group, false) => Ok(Some((self.mapped, group))),
                _ => Err(cause),
            },
            (heard, _) => heard,
        }
    }

    fn converse(
        &mut self,
        token: &[u8],
        own: std::result::Result<&File, &Error>,
    ) -> Result<Option<Met>> {
        let failure = self.greet(token, own)?;
        match (self.listen(), failure) {
            (Ok(None), _) => Ok(None),
            (_, Some(cause)) => Err(cause),
            (heard, None) => heard,
        }
    }

    /// Says who this is, with its memory; or without, and why it has none to give. The reason is given
    /// back, too; an error if rank 0 could not even be told.
    fn greet(
        &self,
        token: &[u8],
        own: std::result::Result<&File, &Error>,
    ) -> Result<Option<Error>> {
        let hello = Message::Hello(Hello {
            version: VERSION,
            rank: self.join.rank,
            size: self.join.size,
            token: token.to_vec(),
            patience: remaining(self.join.deadline),
            settings: (self.join.settings.iter())
                .map(|&(name, value)| (name.to_owned(), value))
                .collect(),
        });
        let cause = match own.map(|memory| self.say(&hello, &[memory.as_fd()])) {
            Ok(Ok(())) => return Ok(None),
            Ok(Err(cause)) => cause,
            Err(cause) => cause.clone(),
        };
        let told = self.say(&hello, &[]);
        let told = told.and_then(|()| self.say(&Message::Fail(cause.clone()), &[]));
        match told {
            Ok(()) => Ok(Some(cause)),
            Err(_) => Err(cause),
        }
    }

    fn listen(&mut self) -> Result<Option<Met>> {
        let whole = self.join.size as usize + 1;
        loop {
            match self.hear()? {
                None if self.welcome => {
                    let text = format!("job {}: rank 0 is gone", self.join.name);
                    return Err(Error::new(Status::PeerLost, text).blame(0));
                }
                None => return Ok(None),
                Some((Message::Welcome, _)) => self.welcome = true,
                Some((Message::Fail(mut error), _)) => {
                    // Callers index with it: a rank that does not exist is nobody.
                    if !(0..self.join.size as i32).contains(&error.peer) {
                        error.peer = -1;
                    }
                    return Err(error);
                }
                Some((Message::Memory { first }, files))
                    if first as usize == self.mapped.len()
                        && self.mapped.len() + files.len() <= whole =>
                {
                    self.map(files).map_err(|cause| self.give_up(cause))?;
                    if self.mapped.len() == whole {
                        let said = self.say(&Message::Ready, &[]);
                        said.map_err(|cause| self.give_up(cause))?;
                    }
                }
                Some((Message::Go, _)) if self.mapped.len() == whole => {
                    if let Some(Some(group)) = self.mapped.pop() {
                        return Ok(Some((mem::take(&mut self.mapped), group)));
                    }
                }
                Some(_) => return Err(self.nonsense()),
            }
        }
    }

    fn map(&mut self, files: Vec<File>) -> Result<()> {
        for file in files {
            let rank = self.mapped.len() as u32;
            self.mapped.push(match rank {
                _ if rank == self.join.rank => None,
                _ if rank == self.join.size => Some(map_group(self.join, &file)?),
                _ => Some(map_peer(self.join, rank, &file)?),
            });
        }
        Ok(())
    }

    /// Says something to rank 0. That it hears no more is no error: why is in what there is to hear.
    fn say(&self, message: &Message, descriptors: &[BorrowedFd]) -> Result<()> {
        let bytes = message.encode();
        loop {
            let e = match self.socket.send(&bytes, descriptors) {
                Err(e) if !ended(&e) => e,
                _ => return Ok(()),
            };
            let full = e.kind() == io::ErrorKind::WouldBlock;
            if past(self.join.deadline) || !(full || crowded(&e)) {
                let what = format_args!("job {}: talking to rank 0", self.join.name);
                return Err(failed(status_of(&e), what, &e));
            }
            if full {
                let until = self.join.deadline;
                // What fails here fails again at once, in the next send.
                let _ = wait(&mut [self.socket.awaiting(libc::POLLOUT)], until);
            }
        }
    }

    /// Tells rank 0 why this rank gives up, if it can be told.
    fn give_up(&self, cause: Error) -> Error {
        let _ = self.say(&Message::Fail(cause.clone()), &[]);
        cause
    }

    /// What rank 0 says next; none: nothing any more.
    fn hear(&self) -> Result<Option<(Message, Vec<File>)>> {
        let until = self.join.deadline.and_then(|d| d.checked_add(GRACE));
        let blame = |e: io::Error| {
            let what = format_args!("job {}: listening to rank 0", self.join.name);
            failed(status_of(&e), what, &e)
        };
        let mut reset = false;
        loop {
            // Before anything is heard: a rank 0 that never stops talking ends, too.
            if past(until) {
                let text = format!("job {}: rank 0 has not answered in time", self.join.name);
                return Err(Error::new(Status::Timeout, text).blame(0));
            }
            match self.socket.receive(MOST_DESCRIPTORS) {
                // Rank 0 has closed without reading all: what it said before is still to be heard.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset && !reset => reset = true,
                Ok(packet) if packet.cut => {
                    let cause = blame(io::Error::from_raw_os_error(libc::EMFILE));
                    return Err(self.give_up(cause));
                }
                Ok(packet) => {
                    let message = Message::decode(&packet.bytes).ok_or_else(|| self.nonsense())?;
                    let files = packet.descriptors.into_iter().map(File::from).collect();
                    return Ok(Some((message, files)));
                }
                Err(e) if ended(&e) => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(blame(e)),
            }
            if let Some(cause) = self.join.lost() {
                return Err(cause);
            }
            let socket = self.socket.awaiting(libc::POLLIN);
            wait(&mut [socket], self.join.look(until)).map_err(blame)?;
        }
    }

    fn nonsense(&self) -> Error {
        let text = format!("job {}: rank 0 says what no rank says", self.join.name);
        Error::new(Status::Transport, text).blame(0)
    }
}

/// Decides whether the group is formed, for all ranks and once: at the end of the group's memory.
/// Whether it is as this rank would have it.
fn decide(group: &Mapping, formed: bool) -> bool {
    const UNDECIDED: u32 = 0;
    let wanted = if formed { 1 } else { 2 };
    let at = group.len() - 64;
    // SAFETY: the last line of the group's pages, which is used for this alone and by atomics only.
    let word = unsafe { &*group.as_ptr().add(at).cast::<AtomicU32>() };
    let swap = word.compare_exchange(UNDECIDED, wanted, Ordering::AcqRel, Ordering::Acquire);
    swap.map_or_else(|seen| seen == wanted, |_| true)
}

fn map_peer(join: &Join, rank: u32, file: &File) -> Result<Mapping> {
    let whose = format!("job {}: the memory of rank {rank}", join.name);
    memfd::receive(file, join.own_bytes, false, &whose)
}

fn map_group(join: &Join, file: &File) -> Result<Mapping> {
    let whose = format!("job {}: the memory of the group", join.name);
    memfd::receive(file, join.group_bytes, true, &whose)
}

fn past(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|d| d <= Instant::now())
}

fn remaining(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|d| d.saturating_duration_since(Instant::now()))
}

/// Whether the other end will say nothing more.
fn ended(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Whether too many descriptors of this user are on their way at the moment; if so, waits a little.
fn crowded(e: &io::Error) -> bool {
    let crowded = e.raw_os_error() == Some(libc::ETOOMANYREFS);
    if crowded {
        std::thread::sleep(Duration::from_millis(1));
    }
    crowded
}

/// The status of a system call that failed.
fn status_of(e: &io::Error) -> Status {
    match e.raw_os_error() {
        Some(
            libc::EMFILE
            | libc::ENFILE
            | libc::ENOMEM
            | libc::ENOBUFS
            | libc::ENOSPC
            | libc::EDQUOT
            | libc::ETOOMANYREFS,
        ) => Status::NoMemory,
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::EISDIR) => Status::Permission,
        _ => Status::Transport,
    }
}

fn failed(status: Status, what: impl fmt::Display, e: &io::Error) -> Error {
    Error::new(status, format!("{what}: {e}")).native(e.raw_os_error().unwrap_or(0))
}
