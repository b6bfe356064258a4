//! Unix sockets that keep the borders of messages and carry descriptors: the standard library's
//! do neither. Nothing here blocks, raises SIGPIPE or hands a descriptor to a child's `exec`.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::time::Instant;

use super::wire::LONGEST;

/// How many descriptors one message carries. The system allows 253; but what is on its way counts
/// against the limits of the user, and what has come against those of the receiver.
pub const MOST_DESCRIPTORS: usize = 16;
const BACKLOG: i32 = 4096;

/// A message as it came.
pub struct Received {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// It had more descriptors than were asked for, or than this process may open.
    pub cut: bool,
}

/// One end of a connection, or a listener.
pub struct Socket(OwnedFd);

impl Socket {
    /// A listener at `path`, which must not exist.
    pub fn listen(path: &Path) -> io::Result<Socket> {
        let socket = Socket::new()?;
        let (address, length) = address(path)?;
        // SAFETY: the address is `length` bytes of a sockaddr_un and is only read.
        check(unsafe { libc::bind(socket.raw(), ptr::from_ref(&address).cast(), length) })?;
        // SAFETY: takes numbers only.
        let listening = check(unsafe { libc::listen(socket.raw(), BACKLOG) });
        if let Err(e) = listening {
            fs::remove_file(path)?;
            return Err(e);
        }
        Ok(socket)
    }

    /// A connection to the listener at `path`; `WouldBlock` while its queue is full.
    pub fn connect(path: &Path) -> io::Result<Socket> {
        let socket = Socket::new()?;
        let (address, length) = address(path)?;
        retry(|| {
            // SAFETY: the address is `length` bytes of a sockaddr_un and is only read.
            unsafe { libc::connect(socket.raw(), ptr::from_ref(&address).cast(), length) as isize }
        })?;
        Ok(socket)
    }

    fn new() -> io::Result<Socket> {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: takes numbers only.
        let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
        // SAFETY: a fresh descriptor that nothing else owns.
        Ok(Socket(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn raw(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// The next connection of a listener; `WouldBlock` when there is none.
    pub fn accept(&self) -> io::Result<Socket> {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = retry(|| {
            // SAFETY: null pointers say that the address is not wanted.
            unsafe { libc::accept4(self.raw(), ptr::null_mut(), ptr::null_mut(), flags) as isize }
        })?;
        // SAFETY: a fresh descriptor that nothing else owns.
        Ok(Socket(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// The user of the process at the other end.
    pub fn peer_user(&self) -> io::Result<u32> {
        // SAFETY: a struct of numbers, for which zero is a value.
        let mut peer: libc::ucred = unsafe { mem::zeroed() };
        let mut length = mem::size_of::<libc::ucred>() as libc::socklen_t;
        let out = ptr::from_mut(&mut peer).cast();
        // SAFETY: `out` and `length` describe `peer`, which outlives the call.
        check(unsafe {
            libc::getsockopt(
                self.raw(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                out,
                &mut length,
            )
        })?;
        Ok(peer.uid)
    }

    /// Sends one message with at most [`MOST_DESCRIPTORS`] descriptors, whole or not at all;
    /// `WouldBlock` while the other end has not read enough of the earlier ones.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd]) -> io::Result<()> {
        if descriptors.len() > MOST_DESCRIPTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut part = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut control = Control::new();
        let mut header = header(&mut part);
        if !descriptors.is_empty() {
            let raw: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
            let payload = mem::size_of_val(&raw[..]) as u32;
            header.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: arithmetic on a number.
            header.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as _;
            // SAFETY: the buffer has room for MOST_DESCRIPTORS descriptors and their header, is
            // aligned for it, and `raw` holds `payload` bytes.
            unsafe {
                let first = libc::CMSG_FIRSTHDR(&header);
                (*first).cmsg_level = libc::SOL_SOCKET;
                (*first).cmsg_type = libc::SCM_RIGHTS;
                (*first).cmsg_len = libc::CMSG_LEN(payload) as _;
                let data = libc::CMSG_DATA(first);
                ptr::copy_nonoverlapping(raw.as_ptr().cast(), data, payload as usize);
            }
        }
        retry(|| {
            // SAFETY: the header points to `part`, `control` and `bytes`, which outlive the call.
            unsafe { libc::sendmsg(self.raw(), &header, libc::MSG_NOSIGNAL) }
        })?;
        Ok(())
    }

    /// The next message with at most `most` descriptors. `WouldBlock` when there is none,
    /// `UnexpectedEof` when there will be none, `InvalidData` for one that is too long.
    pub fn receive(&self, most: usize) -> io::Result<Received> {
        // On the stack: memory that cannot be had must not end the process.
        let mut bytes = [0u8; LONGEST];
        let mut part = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut control = Control::new();
        let mut header = header(&mut part);
        // Not CMSG_SPACE: its padding would let one descriptor more in.
        // SAFETY: arithmetic on a number.
        let room = unsafe { libc::CMSG_LEN((most.min(MOST_DESCRIPTORS) * 4) as u32) };
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = room as _;
        let count = retry(|| {
            // SAFETY: the header points to `part`, `control` and `bytes`, which outlive the call.
            unsafe { libc::recvmsg(self.raw(), &mut header, libc::MSG_CMSG_CLOEXEC) }
        })?;
        let descriptors = taken(&header);
        if header.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut message = Vec::new();
        message
            .try_reserve_exact(count as usize)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        message.extend_from_slice(&bytes[..count as usize]);
        Ok(Received {
            bytes: message,
            descriptors,
            cut: header.msg_flags & libc::MSG_CTRUNC != 0,
        })
    }

    /// What [`wait`] is to look for here, besides the end.
    pub fn awaiting(&self, events: i16) -> libc::pollfd {
        libc::pollfd {
            fd: self.raw(),
            events,
            revents: 0,
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until something happens at one of `sockets` or the time has come. May return early.
pub fn wait(sockets: &mut [libc::pollfd], until: Option<Instant>) -> io::Result<()> {
    let millis = until.map_or(-1, |until| {
        // Rounded up, so that a wait does not end with many that are too short.
        let nanos = until.saturating_duration_since(Instant::now()).as_nanos();
        i32::try_from(nanos.div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    let count = sockets.len() as libc::nfds_t;
    // SAFETY: the pointer and the count are those of the slice.
    match check(unsafe { libc::poll(sockets.as_mut_ptr(), count, millis) }) {
        Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(()),
    }
}

/// Room for the descriptors of a message and their header, aligned for both.
struct Control([u64; 2 + MOST_DESCRIPTORS / 2]);

impl Control {
    fn new() -> Control {
        Control([0; 2 + MOST_DESCRIPTORS / 2])
    }
}

fn header(part: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: a struct of numbers and pointers, for which zero is a value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = part;
    header.msg_iovlen = 1;
    header
}

/// The descriptors in a header that `recvmsg` has filled in.
fn taken(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the kernel wrote whole control messages into the buffer of the header, and each
    // descriptor in them is new in this process and owned by nothing else.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = next.as_ref() {
            if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
                #[allow(clippy::unnecessary_cast)] // not the same type in every C library
                let length = message.cmsg_len as usize;
                let bytes = length - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(message).cast::<i32>();
                for i in 0..bytes / mem::size_of::<i32>() {
                    found.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(header, message);
        }
    }
    found
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: a struct of numbers, for which zero is a value.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let path = path.as_os_str().as_bytes();
    if path.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    Ok((address, mem::size_of_val(&address) as libc::socklen_t))
}

fn check(rc: i32) -> io::Result<i32> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rc)
}

/// Repeats a system call that signals interrupt.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<isize> {
    loop {
        let rc = call();
        if rc >= 0 {
            return Ok(rc);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
