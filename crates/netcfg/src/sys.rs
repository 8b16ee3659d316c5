//! System calls that rustix does not cover: TUN ioctls, socket options by number, recvmmsg, sendmsg with
//! control messages, moving a thread between network namespaces. The only file with `unsafe`.
//!
//! Everything here is a thin, safe wrapper: arguments are borrowed slices and descriptors, results are
//! `io::Result`. What the bytes mean is decided elsewhere (`cmsg`, `tun`, `udp`, `capture`).

#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Turns a `-1` into the error in `errno`.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`check`] for calls that return a length.
fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Length of a slice as the kernel wants it; no buffer of ours comes near the bound.
fn len_u32(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

// --- socket options ---------------------------------------------------------------------------------

/// `setsockopt(2)` with an `int`.
pub(crate) fn set_option(
    fd: impl AsFd,
    level: c_int,
    option: c_int,
    value: c_int,
) -> io::Result<()> {
    let size = len_u32(mem::size_of::<c_int>())?;
    // SAFETY: the pointer and size describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast::<c_void>(),
            size,
        )
    };
    check(result).map(|_| ())
}

/// `getsockopt(2)` of an `int`.
pub(crate) fn get_option(fd: impl AsFd, level: c_int, option: c_int) -> io::Result<c_int> {
    let mut value = [0u32; 1];
    get_option_words(fd, level, option, &mut value)?;
    Ok(value[0].cast_signed())
}

/// `getsockopt(2)` of a structure made of 32-bit words; returns how many bytes the kernel wrote.
pub(crate) fn get_option_words(
    fd: impl AsFd,
    level: c_int,
    option: c_int,
    words: &mut [u32],
) -> io::Result<usize> {
    let mut size = len_u32(mem::size_of_val(words))?;
    // SAFETY: the kernel writes at most `size` bytes to `words`; any bit pattern is a valid u32.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            option,
            words.as_mut_ptr().cast::<c_void>(),
            &raw mut size,
        )
    };
    check(result).map(|_| size as usize)
}

/// `SO_ATTACH_REUSEPORT_CBPF` (socket(7)): chooses among the sockets of a group by what `program` returns, in the order
/// they were bound.
pub(crate) fn attach_reuseport_filter(
    fd: BorrowedFd<'_>,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let len = libc::c_ushort::try_from(program.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let whole = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `whole` describes the borrowed slice, which the kernel only reads and copies during the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const whole).cast::<c_void>(),
            len_u32(mem::size_of_val(&whole))?,
        )
    };
    check(result).map(|_| ())
}

// --- TUN --------------------------------------------------------------------------------------------

/// `TUNSETIFF`: attaches `fd` (an open `/dev/net/tun`) to the interface `name`, making it if needed.
pub(crate) fn tun_attach(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    // SAFETY: `ifreq` is plain old data; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays zero: the kernel reads a C string.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(invalid());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed() as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| invalid())?;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
        .map(|_| ())
}

/// `TUNSETQUEUE` with `IFF_DETACH_QUEUE`: nothing is read from this queue any more; what is written to it still arrives.
pub(crate) fn tun_disable_queue(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `ifreq` is plain old data; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_ifru.ifru_flags = libc::IFF_DETACH_QUEUE as libc::c_short;
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE as _, &raw mut request) })
        .map(|_| ())
}

/// `TUNSETPERSIST`: whether the interface outlives its last descriptor.
pub(crate) fn tun_set_persistent(fd: BorrowedFd<'_>, persistent: bool) -> io::Result<()> {
    let value = libc::c_ulong::from(persistent);
    // SAFETY: TUNSETPERSIST takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST as _, value) }).map(|_| ())
}

/// `TUNSETOFFLOAD`: which offloads the reader of the interface understands.
pub(crate) fn tun_set_offload(fd: BorrowedFd<'_>, offload: c_uint) -> io::Result<()> {
    let value = libc::c_ulong::from(offload);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, value) }).map(|_| ())
}

/// `TUNSETVNETHDRSZ`: bytes of the vnet header in front of each packet.
pub(crate) fn tun_set_vnet_header_bytes(fd: BorrowedFd<'_>, bytes: c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const bytes) })
        .map(|_| ())
}

/// `TUNGETFEATURES`: the `IFF_*` flags this kernel's TUN driver knows.
pub(crate) fn tun_features(fd: BorrowedFd<'_>) -> io::Result<c_uint> {
    let mut features: c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one `unsigned int`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETFEATURES as _, &raw mut features) })?;
    Ok(features)
}

/// `TUNGETIFF`: name and `IFF_*` flags of the interface `fd` is attached to.
pub(crate) fn tun_attached(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    // SAFETY: `ifreq` is plain old data; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: TUNGETIFF writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    // `c_char` has a sign on some processors.
    let name: Vec<u8> = name.flat_map(|byte| byte.to_ne_bytes()).collect();
    // SAFETY: TUNGETIFF fills in the flags of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let name = String::from_utf8(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((name, c_int::from(flags)))
}

/// `TUNGETDEVNETNS` (Linux 5.2): the network namespace the interface is in, wherever `fd` was opened.
pub(crate) fn tun_netns(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: TUNGETDEVNETNS takes no argument.
    let netns = check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETDEVNETNS as _) })?;
    // SAFETY: the kernel gave us this descriptor just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(netns) })
}

// --- descriptors ------------------------------------------------------------------------------------

/// A descriptor of our own for what whoever started us left open as `number`; theirs stays.
pub(crate) fn inherited(number: c_int) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes its argument by value and fails where `number` is not open.
    let fd = check(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel gave us this descriptor just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `SIOCUNIXFILE` (Linux 4.11, include/uapi/linux/un.h).
const SIOCUNIXFILE: c_uint = 0x89e0;

/// The file a socket of the Unix domain is bound to, to be looked at only (`O_PATH`).
pub(crate) fn bound_file(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: SIOCUNIXFILE takes no argument.
    let file = check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE as _) })?;
    // SAFETY: the kernel gave us this descriptor just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

// --- datagrams --------------------------------------------------------------------------------------

/// Room for a `sockaddr_in6`, the larger of the two we use.
pub(crate) const NAME_BYTES: usize = 28;
/// Room for control messages: pktinfo (36), traffic class, hop limit, segment size and overflow counter (24 each), and
/// as much again.
pub(crate) const CONTROL_BYTES: usize = 256;

/// Control message buffer; the kernel's headers in it hold a `size_t`.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Control(pub(crate) [u8; CONTROL_BYTES]);

/// Buffers and headers for `recvmmsg(2)`, allocated once.
pub(crate) struct ReceiveRing {
    // The pointers in `headers` and `vectors` are written anew before each call and used by that call alone.
    headers: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    names: Box<[[u8; NAME_BYTES]]>,
    controls: Box<[Control]>,
    storage: Box<[u8]>,
    slot_bytes: usize,
}

// SAFETY: the raw pointers are meaningful only within `receive`; nothing is tied to a thread.
unsafe impl Send for ReceiveRing {}

/// One received message as the kernel left it.
pub(crate) struct RawMessage<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) control: &'a [u8],
    pub(crate) bytes: &'a [u8],
    pub(crate) truncated: bool,
}

impl ReceiveRing {
    /// `slots` buffers of `slot_bytes` each.
    pub(crate) fn new(slots: usize, slot_bytes: usize) -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: `mmsghdr` is plain old data; all zero is a valid value.
        let header: libc::mmsghdr = unsafe { mem::zeroed() };
        Self {
            headers: vec![header; slots].into_boxed_slice(),
            vectors: vec![empty; slots].into_boxed_slice(),
            names: vec![[0u8; NAME_BYTES]; slots].into_boxed_slice(),
            controls: vec![Control([0; CONTROL_BYTES]); slots].into_boxed_slice(),
            storage: vec![0u8; slots.saturating_mul(slot_bytes)].into_boxed_slice(),
            slot_bytes,
        }
    }

    pub(crate) fn messages(&self) -> usize {
        self.headers.len()
    }

    /// Points every header at its buffers, with their whole lengths.
    fn aim(&mut self) {
        let buffers = self.storage.chunks_exact_mut(self.slot_bytes.max(1));
        for (vector, buffer) in self.vectors.iter_mut().zip(buffers) {
            *vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        }
        let ends = self.names.iter_mut().zip(&mut self.controls);
        for ((header, vector), (name, control)) in
            self.headers.iter_mut().zip(&mut self.vectors).zip(ends)
        {
            header.msg_len = 0;
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = name.as_mut_ptr().cast();
            header.msg_hdr.msg_namelen = NAME_BYTES as u32;
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL_BYTES as _;
            header.msg_hdr.msg_flags = 0;
        }
    }

    /// `recvmmsg(2)`; returns how many slots were filled. It waits for the first message where it may and the descriptor
    /// blocks, and never for another.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, may_wait: bool) -> io::Result<usize> {
        let flags = if may_wait { libc::MSG_WAITFORONE } else { libc::MSG_DONTWAIT };
        self.aim();
        // SAFETY: each header points at one vector, name and control buffer, and each vector at one part of the storage,
        // all owned by `self`, with their true lengths; the exclusive borrow keeps everybody else away from them
        // during the call.
        let result = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                len_u32(self.headers.len())?,
                flags as _,
                std::ptr::null_mut(),
            )
        };
        check(result).map(|count| usize::try_from(count).unwrap_or(0))
    }

    /// The message in `slot`, as of the last [`Self::receive`].
    pub(crate) fn message(&self, slot: usize) -> Option<RawMessage<'_>> {
        let header = self.headers.get(slot)?;
        let start = slot.checked_mul(self.slot_bytes)?;
        let end = start.checked_add(self.slot_bytes.min(header.msg_len as usize))?;
        let name_len = (header.msg_hdr.msg_namelen as usize).min(NAME_BYTES);
        #[allow(clippy::unnecessary_cast)] // size_t or socklen_t, depending on the C library
        let control_len = (header.msg_hdr.msg_controllen as usize).min(CONTROL_BYTES);
        Some(RawMessage {
            name: self.names.get(slot)?.get(..name_len)?,
            control: self.controls.get(slot)?.0.get(..control_len)?,
            bytes: self.storage.get(start..end)?,
            truncated: header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
        })
    }

    /// The bytes of [`Self::message`], to be written to.
    pub(crate) fn bytes_mut(&mut self, slot: usize) -> Option<&mut [u8]> {
        let length = self.message(slot)?.bytes.len();
        self.storage.get_mut(slot * self.slot_bytes..)?.get_mut(..length)
    }
}

/// `sendmsg(2)` of one buffer with a destination and control messages, without waiting.
pub(crate) fn send_message(
    fd: BorrowedFd<'_>,
    name: &[u8],
    control: &[u8],
    bytes: &[u8],
) -> io::Result<usize> {
    let mut vector =
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast::<c_void>(), iov_len: bytes.len() };
    // SAFETY: `msghdr` is plain old data; all zero is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_name = name.as_ptr().cast_mut().cast::<c_void>();
    header.msg_namelen = len_u32(name.len())?;
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    if !control.is_empty() {
        header.msg_control = control.as_ptr().cast_mut().cast::<c_void>();
        header.msg_controllen = control.len() as _;
    }
    // SAFETY: the header describes borrowed slices that outlive the call; sendmsg only reads them.
    check_len(unsafe {
        libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    })
}

// --- packet sockets ---------------------------------------------------------------------------------

/// An `AF_PACKET` socket that hears every protocol on interface `index` (packet(7)). It is bound only
/// after it exists, so nothing of other interfaces gets in: protocol 0 hears nothing.
pub(crate) fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers; the result is checked before it is owned.
    let raw = check(unsafe { libc::socket(libc::AF_PACKET, flags, 0) })?;
    // SAFETY: `raw` was just returned by the kernel and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: `sockaddr_ll` is plain old data; all zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    let size = len_u32(mem::size_of_val(&address))?;
    // SAFETY: pointer and size describe `address`, which outlives the call.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(fd)
}

/// Receives one frame into `buffer`; returns its whole length (it may be longer than the buffer) and its packet type
/// (`PACKET_OUTGOING` and friends).
pub(crate) fn receive_packet(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, u8)> {
    // SAFETY: `sockaddr_ll` is plain old data; all zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    let mut size = len_u32(mem::size_of_val(&address))?;
    // SAFETY: the kernel writes at most `buffer.len()` bytes to the buffer and `size` to the address.
    let length = check_len(unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast::<c_void>(),
            buffer.len(),
            libc::MSG_DONTWAIT | libc::MSG_TRUNC,
            (&raw mut address).cast(),
            &raw mut size,
        )
    })?;
    Ok((length, address.sll_pkttype))
}

// --- namespaces -------------------------------------------------------------------------------------

/// Moves the calling thread into a new network namespace (unshare(2)).
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET changes only the calling thread's namespace; no memory is involved.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(|_| ())
}

/// Moves the calling thread into the network namespace `fd` (setns(2)).
pub(crate) fn enter_network(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: CLONE_NEWNET changes only the calling thread's namespace; no memory is involved.
    check(unsafe { libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) }).map(|_| ())
}
