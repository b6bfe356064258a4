//! Strangers at the rendezvous: what can bytes and descriptors from anybody do to those who meet?
//!
//! Three plays, over real sockets: bytes as a message; honest ranks 0 and 1 with strangers who say
//! anything to rank 0; an honest rank 1 whose rank 0 is the fuzzer. A stranger who does not know the
//! job's token keeps no job from forming; who does can end it, with an error on both. Nobody
//! panics, and no descriptor, file or thread stays behind.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rsbucket::comm::rendezvous::parts::{file_of, own, wait, Hello, Message, Socket, VERSION};
use rsbucket::comm::rendezvous::{join, Join, Joined};
use rsbucket::error::{Error, Status};

use crate::input::Input;
use crate::rules::{listen, run_dir, TOKEN};

const NAME: &str = "fuzz";
const SETTINGS: &[(&str, u64)] = &[("staging_bytes", 1 << 20), ("chunk", 77)];
const OWN: usize = 8192;
const GROUP: usize = 4096;

type Outcome = Result<Joined, Error>;

pub fn run(data: &[u8]) {
    listen();
    run_dir();
    attachments();
    let mut input = Input::new(data);
    match input.below(4) {
        0 => message(input.bytes(usize::MAX)),
        1 | 2 => strangers(&mut input),
        _ => false_host(&mut input),
    }
}

/// What was read is written and read the same.
fn message(bytes: &[u8]) {
    let Some(message) = Message::decode(bytes) else {
        return;
    };
    let first = message.encode();
    let again = Message::decode(&first).expect("a message of ours").encode();
    assert_eq!(first, again);
    if let Message::Fail(error) = message {
        assert!(error.status.code() < 0);
    }
}

fn rank(rank: u32, size: u32, patience: Duration) -> Join<'static> {
    Join {
        name: NAME,
        rank,
        size,
        deadline: Some(Instant::now() + patience),
        settings: SETTINGS,
        own_bytes: OWN,
        own_committed: 0,
        group_bytes: GROUP,
        lost: None,
    }
}

/// Descriptors of all kinds: memory as it should be, too short, unsealed; a device, a directory, a
/// pipe, the program.
fn attachments() -> &'static [OwnedFd] {
    static ALL: OnceLock<Vec<OwnedFd>> = OnceLock::new();
    ALL.get_or_init(|| {
        let open = |path| OwnedFd::from(File::open(path).unwrap());
        let sealed = |bytes| OwnedFd::from(own(bytes, 0).unwrap().1);
        let group = rsbucket::comm::rendezvous::parts::group(GROUP).unwrap().1;
        // SAFETY: the name is a C string, and the descriptor is fresh.
        let plain = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"plain".as_ptr(), 0)) };
        File::from(plain.try_clone().unwrap())
            .set_len(OWN as u64)
            .unwrap();
        let (pipe, _) = std::io::pipe().unwrap();
        vec![
            sealed(OWN),
            group.into(),
            sealed(OWN),
            sealed(4096),
            plain,
            open("/dev/null"),
            open("/"),
            open("/proc/self/exe"),
            pipe.into(),
        ]
    })
}

/// One thing that is said.
struct Packet {
    on: usize,
    bytes: Vec<u8>,
    files: Vec<BorrowedFd<'static>>,
    /// Whether the connection ends with it.
    last: bool,
    /// How long to listen before the next.
    listen: bool,
}

impl Packet {
    fn read(input: &mut Input) -> Packet {
        let message = match input.below(9) {
            0 | 1 => Some(Message::Hello(hello(input))),
            2 => Some(Message::Welcome),
            3 => Some(Message::Ready),
            4 => Some(Message::Go),
            5 | 6 => Some(Message::Memory {
                first: input.pick(&[0, 0, 1, 2, 3, u32::MAX]),
            }),
            7 => Some(Message::Fail(failure(input))),
            _ => None,
        };
        let mut bytes = message.map_or_else(|| input.bytes(40).to_vec(), |m| m.encode());
        match input.below(8) {
            0 => bytes.truncate(usize::from(input.byte())),
            1 if !bytes.is_empty() => {
                let at = usize::from(input.u16()) % bytes.len();
                bytes[at] ^= input.byte();
            }
            2 => bytes.extend(vec![input.byte(); usize::from(input.u16()) % 9000]),
            _ => {}
        }
        let all = attachments();
        let files = match input.below(4) {
            0 => Vec::new(),
            1 => vec![all[0].as_fd(), all[2].as_fd(), all[1].as_fd()],
            _ => (0..input.below(5))
                .map(|_| all[input.below(all.len())].as_fd())
                .collect(),
        };
        Packet {
            on: input.below(4),
            bytes,
            files,
            last: input.below(6) == 5,
            listen: input.yes(),
        }
    }

    /// Whether it comes from one who knows the token, and may claim a place or spoil the job.
    fn knows(&self) -> bool {
        match Message::decode(&self.bytes) {
            Some(Message::Hello(hello)) => hello.token == TOKEN.as_bytes() && hello.rank != 0,
            _ => false,
        }
    }
}

fn failure(input: &mut Input) -> Error {
    let status = input.pick(&Status::ALL[2..]);
    let (native, peer) = (i32::from(input.byte()), i32::from(input.byte()) - 2);
    let text = "stranger\0\u{fffd}".repeat(input.below(40));
    let mut error = Error::new(status, text).native(native);
    error.peer = peer;
    error
}

fn hello(input: &mut Input) -> Hello {
    let mut settings: Vec<_> = SETTINGS.iter().map(|&(n, v)| (n.to_owned(), v)).collect();
    if input.below(4) == 0 {
        settings.push(("\u{1F980}".repeat(input.below(9)), input.u64()));
    }
    Hello {
        version: if input.below(8) == 0 {
            input.u64() as u32
        } else {
            VERSION
        },
        rank: input.pick(&[1, 1, 0, 2, u32::MAX]),
        size: input.pick(&[2, 2, 3, 0, u32::MAX]),
        token: if input.below(4) == 0 {
            TOKEN.into()
        } else {
            input.bytes(20).to_vec()
        },
        patience: input
            .yes()
            .then(|| Duration::from_micros(input.u16().into())),
        settings,
    }
}

fn script(input: &mut Input) -> Vec<Packet> {
    let mut script = Vec::new();
    while !input.is_empty() && script.len() < 24 {
        script.push(Packet::read(input));
    }
    script
}

/// How many files this process has open.
fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Nothing is left of a meeting.
fn clean(before: usize) {
    assert_eq!(
        fs::read_dir(run_dir()).unwrap().count(),
        0,
        "files in the run directory"
    );
    assert_eq!(open_files(), before, "open files");
}

fn strangers(input: &mut Input) {
    let before = open_files();
    let script = script(input);
    let spoilt = script.iter().any(Packet::knows);
    let patience = Duration::from_millis(if spoilt { 20 } else { 9000 });
    let over = AtomicBool::new(false);
    let (host, guest) = std::thread::scope(|scope| {
        let host = scope.spawn(|| join(&rank(0, 2, patience)));
        let stranger = scope.spawn(|| intrude(&script, &over));
        let guest = scope.spawn(|| join(&rank(1, 2, patience)));
        let outcomes = (host.join().unwrap(), guest.join().unwrap());
        over.store(true, Ordering::Release);
        // Joined, so that nothing of the thread is left when the leak check looks.
        stranger.join().unwrap();
        outcomes
    });
    if !spoilt {
        for (rank, outcome) in [(0, &host), (1, &guest)] {
            assert!(
                outcome.is_ok(),
                "rank {rank}: {}",
                outcome.as_ref().unwrap_err().message
            );
        }
    }
    for outcome in [&host, &guest] {
        judge(outcome);
    }
    drop((host, guest));
    clean(before);
}

fn judge(outcome: &Outcome) {
    if let Err(e) = outcome {
        // Who expects another size may also have a rank beyond ours.
        let beyond = e.status == Status::ConfigMismatch && e.peer > 0;
        assert!(
            e.status.code() < 0 && (beyond || (-1..3).contains(&e.peer)),
            "{e:?}"
        );
    }
}

/// Says everything in the script to rank 0, as long as it is there.
fn intrude(script: &[Packet], over: &AtomicBool) {
    let path = run_dir().join(file_of(NAME).unwrap());
    let mut sockets: [Option<Socket>; 4] = Default::default();
    for packet in script {
        while sockets[packet.on].is_none() {
            if over.load(Ordering::Acquire) {
                return;
            }
            sockets[packet.on] = Socket::connect(&path).ok();
            std::thread::yield_now();
        }
        say(&mut sockets[packet.on], packet);
    }
}

fn say(socket: &mut Option<Socket>, packet: &Packet) {
    let Some(open) = socket else { return };
    // Who has hung up does not hear it.
    let _ = open.send(&packet.bytes, &packet.files);
    if packet.listen {
        let soon = Instant::now() + Duration::from_millis(1);
        let _ = wait(&mut [open.awaiting(libc::POLLIN)], Some(soon));
        let _ = open.receive(3);
    }
    if packet.last {
        *socket = None;
    }
}

fn false_host(input: &mut Input) {
    let before = open_files();
    let size = 2 + input.below(2) as u32;
    let script = script(input);
    let path = run_dir().join(file_of(NAME).unwrap());
    let listener = Socket::listen(&path).unwrap();
    let outcome = std::thread::scope(|scope| {
        let guest = scope.spawn(move || join(&rank(1, size, Duration::from_millis(5))));
        let soon = Instant::now() + Duration::from_millis(50);
        let mut socket = None;
        for packet in &script {
            while socket.is_none() && Instant::now() < soon && !guest.is_finished() {
                let until = Some(Instant::now() + Duration::from_millis(1));
                let _ = wait(&mut [listener.awaiting(libc::POLLIN)], until);
                socket = listener.accept().ok();
            }
            say(&mut socket, packet);
        }
        drop((socket, listener));
        guest.join().unwrap()
    });
    // A rank that was told of a death may have swept the file away.
    let _ = fs::remove_file(path);
    judge(&outcome);
    let heard = |wanted: &dyn Fn(&Message) -> bool| {
        let messages = script.iter().filter_map(|p| Message::decode(&p.bytes));
        messages.filter(|m| wanted(m)).count()
    };
    if outcome.is_ok() {
        assert!(heard(&|m| matches!(m, Message::Memory { first: 0 })) > 0);
        assert!(script.iter().map(|p| p.files.len()).sum::<usize>() > size as usize);
    }
    drop(outcome);
    clean(before);
}
