//! What comes to a rendezvous and should not, who leaves it too early, and what lies there already.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::super::rundir::{effective_user, RunDir};
use super::door::Door;
use super::host::{Host, MOST_STRANGERS};
use super::socket::{wait, Socket};
use super::tests::{all, environment, error, full, hear, hello, memory, rank, wait_for, within};
use super::tests::{Place, NAME, OWN};
use super::wire::{Hello, Message, LONGEST, LONGEST_TOKEN};
use super::{join_in, memfd, Guest, Join, Mapping, Watch, TOKEN};
use crate::error::{Error, Status};

#[test]
fn a_wrong_token_is_refused_and_takes_no_place() {
    let place = Place::new();
    thread::scope(|scope| {
        let first = scope.spawn(|| place.join_as(&rank(0, 2), "s3cret-of-job"));
        for wrong in ["", "s3cret-of-joc", "s3cret", "s3cret-of-job1"] {
            let e = error(place.join_as(&rank(1, 2), wrong));
            assert_eq!(e.status, Status::Permission);
            assert!(
                e.message.contains(TOKEN) && !e.message.contains("s3cret"),
                "{e}"
            );
        }
        place.join_as(&rank(1, 2), "s3cret-of-job").unwrap();
        first.join().unwrap().unwrap();
    });
    place.assert_empty();
    let long = "t".repeat(LONGEST_TOKEN + 1);
    let e = error(place.join_as(&rank(1, 2), &long));
    assert_eq!(e.status, Status::InvalidArgument);
    assert!(
        e.message.contains(TOKEN) && e.message.contains("1025"),
        "{e}"
    );
}

#[test]
fn strangers_do_not_hold_up_a_job() {
    let place = Place::new();
    thread::scope(|scope| {
        let first = scope.spawn(|| place.join(&rank(0, 3)));
        let second = scope.spawn(|| place.join(&rank(2, 3)));
        let whole = Message::Hello(hello(1, 3)).encode();
        let foreign_rank = Message::Hello(hello(3, 3)).encode();
        let mut packets = vec![vec![0], vec![0xff; 100], vec![7; LONGEST + 1], foreign_rank];
        packets.push(Message::Go.encode());
        packets.push(Message::Ready.encode());
        packets.extend(
            (1..whole.len() - 60)
                .step_by(5)
                .map(|cut| whole[..cut].to_vec()),
        );
        let file = File::open("/proc/self/maps").unwrap();
        for bytes in packets {
            let socket = place.connect();
            let files: Vec<BorrowedFd> = (0..bytes.len() % 5).map(|_| file.as_fd()).collect();
            // Too long for the receiver, or already closed by it: both are fine here.
            let _ = socket.send(&bytes, &files);
            assert_eq!(hear(&socket), None);
        }
        // More silent ones than are kept, and they stay.
        let silent: Vec<Socket> = (0..150).map(|_| place.connect()).collect();
        for socket in &silent[..150 - MOST_STRANGERS] {
            assert_eq!(hear(socket), None);
        }
        let kept = silent[149].receive(0).map(|_| ()).unwrap_err();
        assert_eq!(kept.kind(), ErrorKind::WouldBlock);
        place.join(&rank(1, 3)).unwrap();
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
        drop(silent);
    });
    place.assert_empty();
}

#[test]
fn another_user_is_ignored() {
    if effective_user() != 0 {
        return; // only root can be somebody else
    }
    let place = Place::new();
    thread::scope(|scope| {
        let first = scope.spawn(|| place.join(&rank(0, 2)));
        wait_for(|| place.socket().exists());
        let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o777));
        open(&place.0).unwrap();
        open(&place.socket()).unwrap();
        let stranger = scope.spawn(|| {
            // SAFETY: takes numbers. The system call itself, unlike the C library's function,
            // changes this thread alone, which ends soon.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
            assert_eq!(changed, 0);
            let socket = place.connect();
            let _ = socket.send(&Message::Hello(hello(1, 2)).encode(), &[]);
            hear(&socket)
        });
        assert_eq!(stranger.join().unwrap(), None);
        open_for_us_alone(&place.0);
        place.join(&rank(1, 2)).unwrap();
        first.join().unwrap().unwrap();
    });
}

fn open_for_us_alone(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_rank_that_dies_before_all_are_there_is_named() {
    let place = Place::new();
    thread::scope(|scope| {
        let first = scope.spawn(|| place.join(&rank(0, 4)));
        let other = place.member(2, 4, memory(OWN));
        drop(place.member(1, 4, memory(OWN)));
        // A rank that comes late is told, too; one that was told, and comes again, finds nobody yet.
        let Some(Message::Fail(told)) = hear(&other) else {
            panic!("rank 2 was not told");
        };
        for again in [1, 2] {
            let socket = place.connect();
            let hello = Message::Hello(hello(again, 4)).encode();
            socket.send(&hello, &[memory(OWN).as_fd()]).unwrap();
            assert_eq!(hear(&socket), None);
        }
        for result in [place.join(&rank(3, 4)), first.join().unwrap()] {
            let e = error(result);
            assert_eq!((e.status, e.peer), (Status::PeerLost, 1));
            assert!(e.message.contains("rank 1 was lost"), "{e}");
            assert_eq!(e, told);
        }
    });
    place.assert_empty();
}

#[test]
fn a_rank_that_comes_again_before_its_end_was_heard_is_not_refused() {
    let place = Place::new();
    let dir = RunDir::find(&environment(&[("RSBUCKET_RUN_DIR", &place.0)])).unwrap();
    let door = Door::open(NAME, &dir, None).unwrap();
    let join = rank(0, 3);
    for ended in [true, false] {
        // Rank 0 as in its loop, but nothing is heard between two looks at the door.
        let mut host = Host::new(&join, &[]);
        let mut come = || {
            let socket = place.connect();
            let hello = Message::Hello(hello(1, 3)).encode();
            socket.send(&hello, &[memory(OWN).as_fd()]).unwrap();
            host.open(&door).unwrap();
            socket
        };
        let first = come();
        assert_eq!(hear(&first), Some(Message::Welcome));
        if ended {
            drop(first);
            assert_eq!(hear(&come()), None, "it looks for the next group");
        } else {
            let Some(Message::Fail(e)) = hear(&come()) else {
                panic!("a rank that another process has was let in");
            };
            assert_eq!(e.status, Status::Permission);
            assert!(e.message.contains("rank 1 is already there"), "{e}");
        }
    }
}

/// From here on every sendmsg of this thread fails with `code`. False where the system forbids that.
fn fail_sends(code: i32) -> bool {
    let step = |code: u32, no, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: no,
        k,
    };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_sendmsg as u32,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | code as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: both change this thread alone; the program is whole, and read during the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    if !done {
        eprintln!("skipped: no seccomp filters here");
    }
    done
}

#[test]
fn a_rank_that_can_say_nothing_ends_with_the_reason() {
    for (code, status) in [
        (libc::ENOBUFS, Status::NoMemory),
        (libc::ENOMEM, Status::NoMemory),
        (libc::EIO, Status::Transport),
    ] {
        let place = Place::new();
        thread::scope(|scope| {
            let ranks = [rank(0, 3), within(300, rank(2, 3))];
            let others = ranks
                .map(|r| (&place, r))
                .map(|(p, r)| scope.spawn(move || p.join(&r)));
            let mute =
                scope.spawn(|| fail_sends(code).then(|| place.join(&within(300, rank(1, 3)))));
            if let Some(result) = mute.join().unwrap() {
                let e = error(result);
                assert_eq!((e.status, e.native), (status, code));
                assert!(e.message.contains("talking to rank 0"), "{e}");
            }
            // It has never said who it is.
            for other in others {
                let e = error(other.join().unwrap());
                assert_eq!((e.status, e.peer), (Status::Timeout, 1));
            }
        });
        place.assert_empty();
    }
}

#[test]
fn a_rank_that_can_say_nothing_any_more_is_lost_to_the_others() {
    let place = Place::new();
    thread::scope(|scope| {
        let others = [0, 2].map(|r| {
            let place = &place;
            scope.spawn(move || place.join(&rank(r, 3)))
        });
        let mute = scope.spawn(|| {
            let join = rank(1, 3);
            let mut guest = Guest::new(&join, place.connect());
            let memory = File::from(memory(OWN));
            assert_eq!(guest.greet(&[], Ok(&memory)).unwrap(), None);
            let e = fail_sends(libc::ENOBUFS).then(|| guest.listen().map(|_| ()).unwrap_err());
            if let Some(e) = e {
                assert_eq!((e.status, e.native), (Status::NoMemory, libc::ENOBUFS));
            }
        });
        mute.join().unwrap();
        for other in others {
            let e = error(other.join().unwrap());
            assert_eq!((e.status, e.peer), (Status::PeerLost, 1));
        }
    });
    place.assert_empty();
}

#[test]
fn a_rank_that_cannot_give_its_memory_tells_the_others() {
    let place = Place::new();
    thread::scope(|scope| {
        let others = [0, 2].map(|r| {
            let place = &place;
            scope.spawn(move || place.join(&rank(r, 3)))
        });
        // SAFETY: no process has so many; the number is used for nothing else, and never closed.
        let none = ManuallyDrop::new(unsafe { File::from_raw_fd(i32::MAX) });
        let join = rank(1, 3);
        let mut guest = Guest::new(&join, place.connect());
        let e = guest.converse(&[], Ok(&none)).map(|_| ()).unwrap_err();
        assert_eq!((e.status, e.native), (Status::Transport, libc::EBADF));
        for other in others {
            let e = error(other.join().unwrap());
            assert_eq!(
                (e.status, e.native, e.peer),
                (Status::Transport, libc::EBADF, 1)
            );
            assert!(e.message.contains("rank 1: job"), "{e}");
        }
    });
    place.assert_empty();
}

#[test]
fn who_is_known_to_be_gone_is_not_waited_for() {
    static GONE: AtomicBool = AtomicBool::new(false);
    fn lost() -> Option<Error> {
        let error = || Error::new(Status::PeerLost, "rank 2 is gone").blame(2);
        GONE.load(Ordering::Relaxed).then(error)
    }
    // Rank 0 is there, or is the one that is gone.
    for there in [vec![0, 1], vec![1]] {
        GONE.store(false, Ordering::Relaxed);
        let place = Place::new();
        thread::scope(|scope| {
            let join = |r: u32| {
                let place = &place;
                let lost: Option<Watch> = Some(&lost);
                scope.spawn(move || place.join(&Join { lost, ..rank(r, 3) }))
            };
            let ranks: Vec<_> = there.into_iter().map(join).collect();
            if ranks.len() == 2 {
                wait_for(|| place.socket().exists());
            }
            GONE.store(true, Ordering::Relaxed);
            for rank in ranks {
                let e = error(rank.join().unwrap());
                assert_eq!((e.status, e.peer), (Status::PeerLost, 2));
            }
        });
        place.assert_empty();
    }
}

#[test]
fn a_rank_that_dies_while_memory_is_shared_is_named() {
    let place = Place::new();
    thread::scope(|scope| {
        let threads = [0, 1].map(|r| {
            let place = &place;
            scope.spawn(move || place.join(&rank(r, 3)))
        });
        let mortal = place.member(2, 3, memory(OWN));
        assert_eq!(hear(&mortal), Some(Message::Memory { first: 0 }));
        drop(mortal);
        for thread in threads {
            let e = error(thread.join().unwrap());
            assert_eq!((e.status, e.peer), (Status::PeerLost, 2));
        }
    });
    place.assert_empty();
}

#[test]
fn nobody_leaves_before_all_are_ready() {
    let place = Place::new();
    thread::scope(|scope| {
        let patient = scope.spawn(|| place.join(&within(300, rank(0, 3))));
        let ready = place.member(1, 3, memory(OWN));
        let slow = place.member(2, 3, memory(OWN));
        assert_eq!(hear(&ready), Some(Message::Memory { first: 0 }));
        assert_eq!(hear(&slow), Some(Message::Memory { first: 0 }));
        ready.send(&Message::Ready.encode(), &[]).unwrap();
        let e = error(patient.join().unwrap());
        assert_eq!((e.status, e.peer), (Status::Timeout, 2));
        assert!(
            e.message.contains("not mapped the others' memory: ranks 2"),
            "{e}"
        );
        assert_eq!(hear(&ready), Some(Message::Fail(e)));
    });
    place.assert_empty();
}

#[test]
fn a_rank_0_that_dies_is_named_and_one_that_says_nothing_is_tried_again() {
    let place = Place::new();
    let false_host = Socket::listen(&place.socket()).unwrap();
    let accept = |host: &Socket| {
        wait(&mut [host.awaiting(libc::POLLIN)], None).unwrap();
        host.accept().unwrap()
    };
    thread::scope(|scope| {
        let guest = scope.spawn(|| place.join(&rank(1, 2)));
        drop(accept(&false_host));
        let member = accept(&false_host);
        assert!(matches!(
            hear(&member),
            Some(Message::Hello(Hello {
                rank: 1,
                size: 2,
                ..
            }))
        ));
        member.send(&Message::Welcome.encode(), &[]).unwrap();
        drop(member);
        let e = error(guest.join().unwrap());
        assert_eq!((e.status, e.peer), (Status::PeerLost, 0));
    });
}

#[test]
fn peers_can_neither_write_nor_resize_what_they_get() {
    let (own, shared) = memfd::own(OWN, 0).unwrap();
    own.commit(0, OWN).unwrap();
    let e = Mapping::of_file(shared.as_fd(), OWN, true).unwrap_err();
    assert_eq!((e.status, e.native), (Status::NoMemory, libc::EACCES));
    let seen = Mapping::of_file(shared.as_fd(), OWN, false).unwrap();
    assert_eq!(seen.commit(0, 1).unwrap_err().native, libc::EACCES);
    let (_group, shared) = memfd::group(4096).unwrap();
    for bytes in [0, 4095, 8192] {
        let e = shared.set_len(bytes).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EPERM));
    }
}

#[test]
fn memory_that_could_shrink_is_refused_by_all() {
    let plain = || {
        // SAFETY: the name is a C string. The descriptor is fresh.
        let file =
            unsafe { File::from_raw_fd(libc::memfd_create(c"plain".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(OWN as u64).unwrap();
        file
    };
    let unsealed = "expected at least 0x7";
    let length = format!("has 4096 bytes, expected {OWN}");
    for (bad, text) in [
        (plain().into(), unsealed),
        (File::open("/proc/self/exe").unwrap().into(), unsealed),
        (memory(4096), &length),
    ] {
        let place = Place::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| place.join(&rank(0, 3)));
            let other = scope.spawn(|| place.join(&rank(2, 3)));
            let socket = place.member(1, 3, bad);
            for thread in [first, other] {
                let e = error(thread.join().unwrap());
                assert_eq!(e.status, Status::Permission);
                assert!(e.message.contains("memory of rank 1"), "{e}");
                assert!(e.message.contains(text), "{e}");
            }
            drop(socket);
        });
        place.assert_empty();
    }
}

#[test]
fn what_a_killed_job_left_makes_place() {
    let place = Place::new();
    for leave in [
        |path: &Path| drop(Socket::listen(path).unwrap()),
        |path: &Path| drop(UnixListener::bind(path).unwrap()),
        |path: &Path| fs::write(path, "not a socket").unwrap(),
    ] {
        leave(&place.socket());
        let before = fs::symlink_metadata(place.socket()).unwrap().ino();
        assert!(before != 0 && Socket::connect(&place.socket()).is_err());
        for result in all(&place, full(3)) {
            result.unwrap();
        }
        place.assert_empty();
    }
}

#[test]
fn who_waits_in_vain_tidies_up_after_a_killed_rank_0() {
    let place = Place::new();
    drop(Socket::listen(&place.socket()).unwrap());
    let e = error(place.join(&within(20, rank(1, 2))));
    assert_eq!((e.status, e.peer), (Status::Timeout, 0));
    place.assert_empty();
}

#[test]
fn a_run_directory_that_others_can_reach_is_refused() {
    let place = Place::new();
    let environment = environment(&[("RSBUCKET_RUN_DIR", &place.0)]);
    fs::set_permissions(&place.0, fs::Permissions::from_mode(0o755)).unwrap();
    for r in [0, 1] {
        let e = error(join_in(&rank(r, 2), &environment));
        assert_eq!(e.status, Status::Permission);
        assert!(
            e.message.contains("RSBUCKET_RUN_DIR") && e.message.contains("0755"),
            "{e}"
        );
    }
    place.assert_empty();
}
