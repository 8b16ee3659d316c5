//! nftables without starting its program: questions, listings and elements of sets, which come with every pod
//! (include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h). Whatever makes rules is text for `nft`. Connection tracking speaks
//! the same language.
//!
//! ```text
//! nlmsghdr  length u32 | type u16 = subsystem << 8 | message | flags u16 | sequence u32 | port u32   native byte order
//! nfgenmsg  family u8 (nftables: 1, inet) | version u8 = 0 | resource u16 (big endian)
//! nlattr    length u16 | type u16 (top bit: holds attributes) | value, padding to 4           again and again
//! change    BATCH_BEGIN (resource 10), messages, BATCH_END: all of it or nothing
//! ```

use std::io;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink;

/// Messages (`enum nf_tables_msg_types`).
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const GET_CHAIN: u16 = 4;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const GET_SET: u16 = 10;
pub(crate) const NEW_ELEMENT: u16 = 12;
pub(crate) const GET_ELEMENT: u16 = 13;
pub(crate) const DELETE_ELEMENT: u16 = 14;

/// Name of the table, in requests of every kind (`NFTA_*_TABLE`, `NFTA_TABLE_NAME`).
pub(crate) const TABLE: u16 = 1;

/// What is spoken with (`NFNL_SUBSYS_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Subsystem {
    Conntrack = 1,
    Nftables = 10,
}

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NFPROTO_INET: u8 = 1;
const HEADER_BYTES: usize = 16;
/// nfgenmsg, in front of the attributes.
const FAMILY_BYTES: usize = 4;
/// The bits of an attribute's type that are its type (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// Buffer for answers; the kernel never makes a part of a listing larger than 32 KiB.
const BUFFER_BYTES: usize = 64 * 1024;

/// A listing that was interrupted by changes is repeated this often before the caller hears of it.
const DUMP_ATTEMPTS_MAX: usize = 8;

/// Attributes to be sent, or to be put into another one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes(Vec<u8>);

/// A conversation in the calling thread's network namespace.
pub(crate) struct Nfnetlink {
    socket: Socket,
    subsystem: Subsystem,
    family: u8,
    sequence: u32,
    buffer: Vec<u8>,
}

/// One message of the kernel's.
#[derive(Debug)]
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// Whether the calling thread's network namespace has the nftables table `inet name`.
pub(crate) fn table_exists(name: &str) -> io::Result<bool> {
    let request = Attributes::default().text(TABLE, name)?;
    Ok(Nfnetlink::open()?.get(GET_TABLE, &request)?.is_some())
}

impl Attributes {
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn text(self, kind: u16, text: &str) -> io::Result<Self> {
        if text.contains('\0') {
            return Err(refused("no nftables object has such a name"));
        }
        self.put(kind, &[text.as_bytes(), &[0]].concat())
    }

    pub(crate) fn nested(self, kind: u16, inner: &Self) -> io::Result<Self> {
        self.put(kind | NESTED, &inner.0)
    }

    pub(crate) fn put(mut self, kind: u16, value: &[u8]) -> io::Result<Self> {
        let length = u16::try_from(4 + value.len()).map_err(|_| refused("too long"))?;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        Ok(self)
    }
}

impl Nfnetlink {
    /// With nftables, of family `inet`.
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_with(Subsystem::Nftables, NFPROTO_INET)
    }

    /// With connection tracking, of all families or of one (`AF_INET`, `AF_INET6`).
    pub(crate) fn open_conntrack() -> io::Result<Self> {
        Self::open_with(Subsystem::Conntrack, 0)
    }

    fn open_with(subsystem: Subsystem, family: u8) -> io::Result<Self> {
        let socket = netlink::open_socket(NETLINK_NETFILTER, netlink::ANSWER_WITHIN)?;
        let buffer = Vec::with_capacity(BUFFER_BYTES);
        Ok(Self { socket, subsystem, family, sequence: 0, buffer })
    }

    /// Requests are about this family from now on.
    pub(crate) fn set_family(&mut self, family: u8) {
        self.family = family;
    }

    /// Carries out one request that has no answer but its acknowledgement.
    pub(crate) fn acknowledge(&mut self, kind: u16, request: &Attributes) -> io::Result<()> {
        self.ask(kind, NLM_F_ACK, request, &|_| false).map(drop)
    }

    /// Makes an object; `false` where there is one already.
    pub(crate) fn create(&mut self, kind: u16, request: &Attributes) -> io::Result<bool> {
        match self.ask(kind, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, request, &|_| false) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Attributes of one object of family `inet`; `None` where there is no such object.
    pub(crate) fn get(&mut self, kind: u16, request: &Attributes) -> io::Result<Option<Vec<u8>>> {
        // With an acknowledgement behind the answer both kinds of request end the same way.
        match self.ask(kind, NLM_F_ACK, request, &|_| true) {
            Ok((mut answers, _)) if !answers.is_empty() => Ok(Some(answers.swap_remove(0))),
            Ok(_) => Err(invalid("nftables answered nothing")),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Attributes of all objects of a kind, filtered by the request.
    pub(crate) fn dump(&mut self, kind: u16, request: &Attributes) -> io::Result<Vec<Vec<u8>>> {
        self.dump_where(kind, request, &|_| true)
    }

    /// As [`Self::dump`]; what is not wanted takes no memory.
    pub(crate) fn dump_where(
        &mut self,
        kind: u16,
        request: &Attributes,
        wanted: &dyn Fn(&[u8]) -> bool,
    ) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..DUMP_ATTEMPTS_MAX {
            if let (answers, true) = self.ask(kind, NLM_F_DUMP, request, wanted)? {
                return Ok(answers);
            }
        }
        Err(io::Error::other("nftables changed during every attempt to read it"))
    }

    /// Carries out changes of elements, all of them or none.
    pub(crate) fn change(&mut self, changes: &[(u16, Attributes)]) -> io::Result<()> {
        let resource = (self.subsystem as u16).to_be_bytes();
        let mut bytes = Vec::new();
        self.append(&mut bytes, BATCH_BEGIN, 0, [0, 0, resource[0], resource[1]], &[])?;
        let before = self.sequence;
        for (kind, attributes) in changes {
            let create = if *kind == NEW_ELEMENT { NLM_F_CREATE } else { 0 };
            let (kind, family) = (self.kind(*kind), [self.family, 0, 0, 0]);
            self.append(&mut bytes, kind, NLM_F_ACK | create, family, &attributes.0)?;
        }
        let last = self.sequence;
        self.append(&mut bytes, BATCH_END, 0, [0, 0, resource[0], resource[1]], &[])?;
        self.socket.send(&bytes, 0)?;
        // One acknowledgement each; a batch that is refused as a whole has one alone, an error.
        let mut missing = last.wrapping_sub(before);
        while missing > 0 {
            self.receive()?;
            let mut rest = self.buffer.as_slice();
            while !rest.is_empty() {
                let message = split(&mut rest)?;
                if message.kind == NLMSG_ERROR {
                    acknowledged(&message)?;
                    missing = missing.saturating_sub(1);
                }
            }
        }
        Ok(())
    }

    fn kind(&self, message: u16) -> u16 {
        ((self.subsystem as u16) << 8) | message
    }

    /// Sends a request and reads its answers up to the acknowledgement or the end of the listing; those that are wanted.
    /// `false` when the listing was interrupted.
    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        request: &Attributes,
        wanted: &dyn Fn(&[u8]) -> bool,
    ) -> io::Result<(Vec<Vec<u8>>, bool)> {
        let mut bytes = Vec::new();
        let (kind, family) = (self.kind(kind), [self.family, 0, 0, 0]);
        self.append(&mut bytes, kind, flags, family, &request.0)?;
        self.socket.send(&bytes, 0)?;
        let (mut answers, mut whole) = (Vec::new(), true);
        loop {
            self.receive()?;
            let mut rest = self.buffer.as_slice();
            while !rest.is_empty() {
                let message = split(&mut rest)?;
                // Left over from an interrupted listing.
                if message.sequence != self.sequence {
                    continue;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return Ok((answers, whole)),
                    NLMSG_ERROR => return acknowledged(&message).map(|()| (answers, whole)),
                    kind if kind >> 8 == self.subsystem as u16 => {
                        let object = message.body.get(FAMILY_BYTES..).unwrap_or(&[]);
                        if wanted(object) {
                            answers.push(object.to_vec());
                        }
                    }
                    other => {
                        return Err(invalid(&format!(
                            "nftables answered with message type {other}"
                        )));
                    }
                }
            }
        }
    }

    fn append(
        &mut self,
        bytes: &mut Vec<u8>,
        kind: u16,
        flags: u16,
        family: [u8; FAMILY_BYTES],
        attributes: &[u8],
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER_BYTES + FAMILY_BYTES + attributes.len();
        let length = u32::try_from(length).map_err(|_| refused("too long"))?;
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(family);
        // Attributes are padded already.
        bytes.extend(attributes);
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        netlink::receive(&self.socket, &mut self.buffer)
    }
}

/// The attributes of a message or of another attribute, type and value each; ends where they make no sense.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind & TYPE_MASK, value))
    })
}

/// The values of those of one type.
pub(crate) fn of_kind(bytes: &[u8], wanted: u16) -> impl Iterator<Item = &[u8]> {
    attributes(bytes).filter(move |(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Cuts the first message off.
fn split<'a>(bytes: &mut &'a [u8]) -> io::Result<Message<'a>> {
    let whole = *bytes;
    let word = |at: usize| Some(u32::from_ne_bytes(whole.get(at..at + 4)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_ne_bytes(whole.get(at..at + 2)?.try_into().ok()?));
    let mut parsed = || {
        let length = word(0)? as usize;
        let body = whole.get(HEADER_BYTES..length)?;
        *bytes = whole.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message { kind: half(4)?, flags: half(6)?, sequence: word(8)?, body })
    };
    parsed().ok_or_else(|| invalid("nftables answered too little"))
}

/// The error in an acknowledgement.
fn acknowledged(message: &Message<'_>) -> io::Result<()> {
    let code = message.body.get(..4).and_then(|bytes| bytes.try_into().ok());
    let code =
        code.map(i32::from_ne_bytes).ok_or_else(|| invalid("nftables answered too little"))?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.wrapping_neg())) }
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_have_the_kernels_layout_and_are_read_back() {
        let inner = Attributes::default().put(1, &[1, 2, 3, 4, 5]).unwrap();
        let all = Attributes::default().text(TABLE, "meshd").unwrap().nested(3, &inner).unwrap();
        assert_eq!(all.0[..4], [[10, 0], [1, 0]].concat(), "length and type");
        assert_eq!(&all.0[4..12], b"meshd\0\0\0");
        let read: Vec<_> = attributes(&all.0).collect();
        assert_eq!(read[0], (TABLE, b"meshd\0".as_slice()));
        assert_eq!(read[1].0, 3);
        assert_eq!(attributes(read[1].1).collect::<Vec<_>>(), [(1, [1, 2, 3, 4, 5].as_slice())]);
        assert!(Attributes::default().text(TABLE, "a\0b").is_err());
        assert!(Attributes::default().put(1, &[0; 1 << 16]).is_err());
    }

    #[test]
    fn whatever_bytes_come_reading_ends() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = 20u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        let whole = answer(NLMSG_ERROR, -libc::EPERM);
        let error = acknowledged(&split(&mut whole.as_slice()).unwrap()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        assert!(acknowledged(&split(&mut answer(NLMSG_ERROR, 0).as_slice()).unwrap()).is_ok());
        for short in 0..whole.len() {
            assert!(split(&mut &whole[..short]).is_err());
        }
        // Lengths that lie.
        for length in [0u16, 3, 5, u16::MAX] {
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend([1, 0]);
            assert_eq!(attributes(&bytes).count(), 0);
        }
        for length in [0u32, 15, 21, u32::MAX] {
            let mut bytes = whole.clone();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(split(&mut bytes.as_slice()).is_err());
        }
    }
}
