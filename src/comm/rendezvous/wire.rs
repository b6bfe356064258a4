//! What ranks say to each other while they meet, as bytes.
//!
//! Little-endian, one message per packet. Whatever arrives is data from a stranger: every length is
//! checked, and what is not a whole message is none. The beginning, and a hello up to its token,
//! never change, so that ranks with different versions of this library can tell each other so.

use std::time::Duration;

use crate::error::{Error, Status};

/// Changes with every change of a message.
pub const VERSION: u32 = 1;
/// No message is longer.
pub const LONGEST: usize = 8192;
/// No token is longer.
pub const LONGEST_TOKEN: usize = 1024;
/// What an error says is cut to this.
const LONGEST_TEXT: usize = 1024;
const MAGIC: u32 = u32::from_le_bytes(*b"rsbk");

/// One packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// To rank 0: who wants to join, with its memory unless it could get none.
    Hello(Hello),
    /// To a rank: it is a member now.
    Welcome,
    /// To a rank: the memory of ranks `first`.. as descriptors; the one after the last rank's is
    /// the group's.
    Memory {
        /// Whose memory comes first.
        first: u32,
    },
    /// To rank 0: everything is mapped.
    Ready,
    /// The group will not form, and why.
    Fail(Error),
    /// To a rank: all are ready.
    Go,
}

/// The first message of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The sender's [`VERSION`]; what follows the token is only known for our own.
    pub version: u32,
    /// Who it is.
    pub rank: u32,
    /// How many ranks it expects.
    pub size: u32,
    /// What proves that it belongs to the job.
    pub token: Vec<u8>,
    /// How long it will wait from now; none: for ever.
    pub patience: Option<Duration>,
    /// What must be equal on all ranks.
    pub settings: Vec<(String, u64)>,
}

impl Message {
    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::new());
        out.u32(MAGIC);
        match self {
            Message::Hello(hello) => {
                out.u32(0);
                out.u32(hello.version);
                out.u32(hello.rank);
                out.u32(hello.size);
                out.bytes(&hello.token);
                let nanos = |p: Duration| u64::try_from(p.as_nanos()).unwrap_or(u64::MAX);
                out.u64(hello.patience.map_or(u64::MAX, nanos));
                for (name, value) in &hello.settings {
                    out.bytes(name.as_bytes());
                    out.u64(*value);
                }
            }
            Message::Welcome => out.u32(1),
            Message::Memory { first } => {
                out.u32(2);
                out.u32(*first);
            }
            Message::Ready => out.u32(3),
            Message::Fail(error) => {
                out.u32(4);
                out.u32(error.status.code() as u32);
                out.u32(error.native as u32);
                out.u32(error.peer as u32);
                let mut end = error.message.len().min(LONGEST_TEXT);
                while !error.message.is_char_boundary(end) {
                    end -= 1;
                }
                out.bytes(&error.message.as_bytes()[..end]);
            }
            Message::Go => out.u32(5),
        }
        out.0
    }

    /// The message that `bytes` are, if they are one.
    pub fn decode(bytes: &[u8]) -> Option<Message> {
        let mut input = Reader(bytes);
        if input.u32()? != MAGIC {
            return None;
        }
        let message = match input.u32()? {
            0 => Message::Hello(input.hello()?),
            1 => Message::Welcome,
            2 => Message::Memory {
                first: input.u32()?,
            },
            3 => Message::Ready,
            4 => {
                let status = Status::from_code(input.u32()? as i32)?;
                if status.code() >= 0 {
                    return None;
                }
                let mut error = Error::new(status, "");
                error.native = input.u32()? as i32;
                error.peer = input.u32()? as i32;
                error.message = input.text()?;
                Message::Fail(error)
            }
            5 => Message::Go,
            _ => return None,
        };
        input.0.is_empty().then_some(message)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// At most [`LONGEST`] bytes, as everything here.
    fn bytes(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.0.extend(bytes);
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Option<&[u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn bytes(&mut self) -> Option<&[u8]> {
        let count = self.u32()?;
        self.take(count as usize)
    }

    fn text(&mut self) -> Option<String> {
        Some(std::str::from_utf8(self.bytes()?).ok()?.to_owned())
    }

    fn hello(&mut self) -> Option<Hello> {
        let mut hello = Hello {
            version: self.u32()?,
            rank: self.u32()?,
            size: self.u32()?,
            token: self.bytes()?.to_vec(),
            patience: None,
            settings: Vec::new(),
        };
        if hello.version != VERSION {
            self.0 = &[];
            return Some(hello);
        }
        hello.patience = Some(self.u64()?)
            .filter(|&nanos| nanos != u64::MAX)
            .map(Duration::from_nanos);
        while !self.0.is_empty() {
            hello.settings.push((self.text()?, self.u64()?));
        }
        Some(hello)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_whole_or_none() {
        let hello = Hello {
            version: VERSION,
            rank: 3,
            size: 4,
            token: b"secret".to_vec(),
            patience: Some(Duration::from_nanos(12345)),
            settings: vec![("one".to_owned(), 1 << 40), ("other".to_owned(), 9)],
        };
        let other = Hello {
            patience: None,
            settings: Vec::new(),
            ..hello.clone()
        };
        let error = Error::new(Status::NoMemory, "\u{e9}".repeat(10))
            .native(12)
            .blame(2);
        for message in [
            Message::Hello(hello),
            Message::Hello(other),
            Message::Welcome,
            Message::Memory { first: 7 },
            Message::Ready,
            Message::Fail(error),
            Message::Go,
        ] {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Some(message.clone()));
            for cut in 0..bytes.len() {
                // A hello may end after any setting.
                let part = Message::decode(&bytes[..cut]);
                assert!(
                    part.is_none() || matches!(message, Message::Hello(_)),
                    "{message:?} {cut}"
                );
            }
            for i in 0..bytes.len() {
                let mut bad = bytes.clone();
                bad[i] ^= 0xff;
                assert_ne!(Message::decode(&bad), Some(message.clone()), "byte {i}");
            }
        }
        let long = Message::Fail(Error::new(Status::Panic, "x\u{e9}".repeat(9999)));
        assert!(long.encode().len() < LONGEST);
        assert!(Message::decode(&long.encode()).is_some());
    }
}
