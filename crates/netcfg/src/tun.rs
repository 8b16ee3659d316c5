//! The TUN device: persistent, multi-queue, super-packets in both directions
//! (Documentation/networking/tuntap.rst, drivers/net/tun.c).
//!
//! ```text
//! open    /dev/net/tun -> TUNSETIFF  IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | IFF_VNET_HDR
//! ladder  TUNSETOFFLOAD  CSUM TSO4 TSO6 USO4 USO6 -> without USO -> CSUM -> none
//! read    | vnet header 10 | packet, up to 64 KiB, unsegmented |
//! write   | vnet header 10 | first piece | next piece | ...        one writev
//! ```
//!
//! The device stays when its owner dies: packets for the mesh then end in its queue and never take another route. A
//! single-queue device cannot be reopened as a multi-queue one, so it is multi-queue from the first day.

use std::ffi::{c_int, c_uint};
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use mesh_types::limits::{TUN_QUEUE_BYTES, TUN_QUEUE_READS, TUN_QUEUES_PER_SHARD};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::link::Link;
use crate::release::Release;
use crate::{addr, link, netns, sys};

/// Bytes of the virtio network header in front of each packet.
pub const VNET_HEADER_BYTES: usize = 10;

/// Smallest MTU of an interface with IPv6 (RFC 8200 section 5).
const IPV6_MTU_MIN: u32 = 1280;

/// How long a device that is held is waited for.
const LOOKS_AT_OWNER: u32 = 25;
const LOOK_AT_OWNER_EVERY: Duration = Duration::from_millis(10);

/// How to open the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunOptions {
    pub name: String,
    /// Sets the MTU when given; otherwise one too small for IPv6 is raised.
    pub mtu: Option<u32>,
    /// Whether to try the vnet header; without it no offload works.
    pub vnet_hdr: bool,
    /// Checksums are left to the reader (and trusted from the writer).
    pub csum: bool,
    /// TCP super-packets; needs `csum`.
    pub tso: bool,
    /// UDP super-packets, Linux 6.2; needs `csum`.
    pub uso: bool,
    /// The device ends with its owner, as those of other WireGuard programs; one that others made so is taken.
    pub transient: bool,
    /// More queues can be opened. A transient one that others made keeps what it has.
    pub multi_queue: bool,
}

impl TunOptions {
    /// Everything the kernel has.
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            name,
            mtu: None,
            vnet_hdr: true,
            csum: true,
            tso: true,
            uso: true,
            transient: false,
            multi_queue: true,
        }
    }

    /// The same of a device with a single queue that ends with its owner.
    pub fn transient(name: impl Into<String>) -> Self {
        Self { transient: true, multi_queue: false, ..Self::new(name) }
    }
}

/// What holds on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TunFeatures {
    /// Packets carry a [`VNET_HEADER_BYTES`] header in both directions.
    pub vnet_hdr: bool,
    pub csum: bool,
    pub tso: bool,
    pub uso: bool,
    /// UDP super-packets can be written to it (Linux 6.2).
    pub takes_udp: bool,
}

/// One or more queues of a TUN device, read in turn.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    /// Further queues: see [`Tun::spread`].
    more: Vec<OwnedFd>,
    turn: Turn,
    /// What is written goes here, where several queues are read: see [`Tun::spread`].
    writer: Option<OwnedFd>,
    multi_queue: bool,
    name: String,
    index: u32,
    features: TunFeatures,
}

/// Which queue is read, and what it may still give before it is the next one's turn.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// Those that may have something, a bit each.
    ready: u32,
    queue: usize,
    reads_left: usize,
    bytes_left: usize,
}

const _: () = assert!(TUN_QUEUES_PER_SHARD <= u32::BITS as usize);

impl Default for Turn {
    fn default() -> Self {
        Self { ready: u32::MAX, queue: 0, reads_left: TUN_QUEUE_READS, bytes_left: TUN_QUEUE_BYTES }
    }
}

impl Turn {
    /// The queue of `count` to read from; `None` when none has anything, and then all may have again.
    fn next(&mut self, count: usize) -> Option<usize> {
        for _ in 0..=count {
            let is_ready = self.ready >> self.queue & 1 != 0;
            if is_ready && self.reads_left > 0 && self.bytes_left > 0 {
                return Some(self.queue);
            }
            self.queue = (self.queue + 1) % count;
            (self.reads_left, self.bytes_left) = (TUN_QUEUE_READS, TUN_QUEUE_BYTES);
        }
        self.ready = u32::MAX;
        None
    }

    fn took(&mut self, bytes: usize) {
        self.reads_left = self.reads_left.saturating_sub(1);
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
    }

    fn nothing(&mut self) {
        self.ready &= !(1 << self.queue);
    }
}

impl Tun {
    /// Opens the device, making it if there is none. One program owns a device: if another holds a
    /// queue, this fails.
    pub fn open(options: &TunOptions) -> anyhow::Result<Self> {
        link::check_name(&options.name)?;
        if options.transient && !(options.multi_queue && may_have_queues(&options.name)?) {
            // The kernel lets nobody else attach to a single queue.
            let options = TunOptions { multi_queue: false, ..options.clone() };
            let (fd, vnet_hdr) = attach(&options)?;
            return Self::set_up(fd, vnet_hdr, &options);
        }
        wait_until_free(&options.name)?;
        let (fd, vnet_hdr) = attach(options)?;
        // Another program may have attached since the check; now both see two and neither goes on.
        refuse_owned(&options.name, 1)?;
        if !options.transient {
            sys::tun_set_persistent(fd.as_fd(), true)
                .with_context(|| format!("make TUN device {} persistent", options.name))?;
        }
        Self::set_up(fd, vnet_hdr, options)
    }

    /// Takes the device over that whoever started us left open as descriptor `number`; name and vnet header are what they
    /// are.
    pub fn inherit(number: i32, options: &TunOptions) -> anyhow::Result<Self> {
        let (fd, name, flags) = inherited(number)
            .with_context(|| format!("descriptor {number} is no TUN device we may use"))?;
        let multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
        let options = TunOptions { name, multi_queue, ..options.clone() };
        Self::set_up(fd, flags & libc::IFF_VNET_HDR != 0, &options)
    }

    /// Whether the device still exists, in whatever network namespace.
    pub fn is_there(&self) -> bool {
        sys::tun_attached(self.fd.as_fd()).is_ok()
    }

    /// Its interface as it is now, under whatever name and in whatever network namespace. `None`: in one that nobody lets us look
    /// into.
    ///
    /// Neither name nor index say that an interface is this one: after it was moved another may have come to have them.
    pub fn link(&self) -> anyhow::Result<Option<Link>> {
        let found = match self.netns()? {
            // Not to be asked here.
            None => return Ok(self.link_here()?.filter(|link| link.index == self.index)),
            Some(Place::Here) => self.link_here()?,
            Some(Place::Elsewhere(netns)) => match netns::run_in(&netns, || Ok(self.link_here())) {
                Ok(found) => found?,
                Err(error) if is_refusal(&error) => {
                    let error = format!("{error:#}");
                    tracing::debug!(device = self.name, error, "not to be seen where it is");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            },
        };
        found.map(Some).with_context(|| {
            format!("TUN device {} was moved or renamed while it was looked at", self.name)
        })
    }

    /// The network namespace its interface is in. `None`: the kernel is not to be asked, or does not tell us.
    fn netns(&self) -> anyhow::Result<Option<Place>> {
        let asked = Release::running().is_some_and(Release::tells_namespaces_of_devices);
        let Some(own) = netns::current_inode().ok().filter(|_| asked) else { return Ok(None) };
        match sys::tun_netns(self.fd.as_fd()) {
            Ok(netns) if rustix::fs::fstat(&netns)?.st_ino == own => Ok(Some(Place::Here)),
            Ok(netns) => Ok(Some(Place::Elsewhere(netns))),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
            // As while the namespace ends.
            Err(error) => Err(error).context("ask in which network namespace a TUN device is"),
        }
    }

    /// The TUN interface that is called like this one, in the namespace of the calling thread.
    fn link_here(&self) -> io::Result<Option<Link>> {
        let called = || sys::tun_attached(self.fd.as_fd()).map(|(name, _)| name);
        let name = called()?;
        let link = link::get(&name)?.filter(|link| link.kind == "tun");
        Ok(link.filter(|_| called().is_ok_and(|now| now == name)))
    }

    /// The same queue once more: it stays open until both are dropped.
    pub fn try_clone(&self) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        let writer = self.writer.as_ref().map(OwnedFd::try_clone).transpose()?;
        let more: io::Result<Vec<_>> = self.more.iter().map(OwnedFd::try_clone).collect();
        let (more, turn) = (more?, Turn::default());
        Ok(Self { fd, more, turn, writer, name: self.name.clone(), ..*self })
    }

    fn set_up(fd: OwnedFd, vnet_hdr: bool, options: &TunOptions) -> anyhow::Result<Self> {
        let features = negotiate(fd.as_fd(), options, vnet_hdr)?;
        let link = link::require(&options.name)?;
        // Below 1280 bytes the kernel takes IPv6 off the device, and with it the setting that follows.
        let mtu = options.mtu.unwrap_or(link.mtu.max(IPV6_MTU_MIN));
        if mtu != link.mtu {
            set_mtu(link.index, mtu)
                .with_context(|| format!("set MTU {mtu} on TUN device {}", options.name))?;
        }
        make_no_addresses(link.index);
        Ok(Self {
            fd,
            more: Vec::new(),
            turn: Turn::default(),
            writer: None,
            multi_queue: options.multi_queue,
            name: options.name.clone(),
            index: link.index,
            features,
        })
    }

    /// Whether [`Self::open_queue`] can work.
    pub fn is_multi_queue(&self) -> bool {
        self.multi_queue
    }

    /// This queue and as many more as give each of `readers` so many `queues`, over which the kernel spreads flows so that
    /// a flow never moves. A device with a single queue stays as it is for a single reader.
    ///
    /// A reader's queues are read in turn, [`TUN_QUEUE_BYTES`] or [`TUN_QUEUE_READS`] each: a sparse flow does not wait
    /// behind what a bulk flow has queued, unless both have the same queue (one in `readers * queues`).
    ///
    /// ```text
    ///  a packet leaves ──> hash of its flow ──> queue 0, 1, ...        read
    ///                        ^ unless a packet of the flow was written to a queue lately: then that one
    ///  what is written ──> a queue that is switched off: delivers, and is no reason to move (tun_get_user)
    /// ```
    /// Otherwise a flow would change its queue in the middle, and its reader (`tun_automq_select_queue` in
    /// drivers/net/tun.c).
    pub fn spread(self, readers: usize, queues: usize) -> anyhow::Result<Vec<Self>> {
        let queues = if self.multi_queue { queues.max(1) } else { 1 };
        let count = readers * queues;
        if count <= 1 {
            return Ok(vec![self]);
        }
        let name = self.name.clone();
        // First, so that the index each had is that of a queue that is there afterwards, too.
        let mut writers = Vec::with_capacity(readers);
        for _ in 0..readers {
            let writer = self.open_queue()?.fd;
            sys::tun_disable_queue(writer.as_fd())
                .with_context(|| format!("switch off a queue of TUN device {name}"))?;
            writers.push(writer);
        }
        let mut all = vec![self];
        while let Some(first) = all.first().filter(|_| all.len() < readers) {
            all.push(first.open_queue()?);
        }
        for reader in &mut all {
            for _ in 1..queues {
                reader.more.push(reader.open_queue()?.fd);
            }
        }
        for (queue, writer) in all.iter_mut().zip(writers) {
            queue.writer = Some(writer);
        }
        Ok(all)
    }

    /// Opens one more queue of the same device, whatever it is called now; the kernel spreads flows over them.
    pub fn open_queue(&self) -> anyhow::Result<Self> {
        let fd = open_clone_device()?;
        let vnet_hdr = if self.features.vnet_hdr { libc::IFF_VNET_HDR } else { 0 };
        let gone =
            || format!("TUN device {} is gone: it was deleted, or moved elsewhere", self.name);
        let name = link::get_by_index(self.index)?.with_context(gone)?.name;
        sys::tun_attach(fd.as_fd(), &name, BASE_FLAGS | vnet_hdr)
            .with_context(|| format!("open another queue of TUN device {name}"))?;
        // By name is the only way, and names change: nothing is done with a device of somebody else's.
        let attached = link::get(&sys::tun_attached(fd.as_fd())?.0)?;
        ensure!(
            attached.is_some_and(|link| link.index == self.index),
            "TUN device {name} was renamed while another queue was opened: try again"
        );
        if self.features.vnet_hdr {
            sys::tun_set_vnet_header_bytes(fd.as_fd(), VNET_HEADER_BYTES as c_int)
                .context("set the vnet header size")?;
        }
        let (more, turn) = (Vec::new(), Turn::default());
        Ok(Self { fd, more, turn, writer: None, name, ..*self })
    }

    /// Lets the device end with its last queue, this one perhaps: another has taken its place. One that is gone is fine.
    pub fn retire(self) {
        if let Err(error) = sys::tun_set_persistent(self.fd.as_fd(), false) {
            tracing::debug!(device = self.name, %error, "the TUN device was gone");
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Interface index.
    pub fn index(&self) -> u32 {
        self.index
    }

    pub fn features(&self) -> TunFeatures {
        self.features
    }

    /// All queues, to wait for.
    pub fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.fd).chain(&self.more).map(AsFd::as_fd)
    }

    /// Says which of [`Self::queues`] have something; without it all are looked at. Bit 0 is the first.
    pub fn set_ready(&mut self, ready: u32) {
        self.turn.ready = ready;
    }

    /// Reads one packet or super-packet, vnet header first when there is one, from the queue whose turn it is or the next
    /// that has one. Never blocks: `EAGAIN` when nothing waits in any of them.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let number = self.turn.next(1 + self.more.len());
            let Some(fd) = number.and_then(|number| self.queue(number)) else {
                return Err(Errno::AGAIN.into());
            };
            match read_one(fd, buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.turn.nothing(),
                outcome => {
                    self.turn.took(outcome.as_ref().map_or(0, |bytes| *bytes));
                    return outcome;
                }
            }
        }
    }

    fn queue(&self, number: usize) -> Option<&OwnedFd> {
        number.checked_sub(1).map_or(Some(&self.fd), |at| self.more.get(at))
    }

    /// Writes one packet or super-packet given in pieces, vnet header first when there is one.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            match rustix::io::writev(self.writer.as_ref().unwrap_or(&self.fd), pieces) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where an interface is, as the calling thread sees it.
enum Place {
    Here,
    Elsewhere(OwnedFd),
}

/// Whether we may not go there: nothing that another try would change.
fn is_refusal(error: &anyhow::Error) -> bool {
    let kind = error.root_cause().downcast_ref().map(io::Error::kind);
    kind == Some(io::ErrorKind::PermissionDenied)
}

fn read_one(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(fd, &mut *buffer) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Fails when the interface called like ours can be none of ours: no TUN device, or one that others make (TAP,
/// a single queue). Says what to do about it.
pub fn check_kind(link: &Link) -> anyhow::Result<()> {
    let name = &link.name;
    let what = match &link.tun {
        Some(tun) if tun.tap => "a TAP device",
        Some(tun) if !tun.multi_queue => "a TUN device with a single queue",
        Some(_) => return Ok(()),
        // Kernels before 4.16 tell no more than this.
        None if link.kind == "tun" => return Ok(()),
        None if link.kind.is_empty() => "no TUN device",
        None => link.kind.as_str(),
    };
    bail!(
        "interface {name} exists and is {what}, none of ours: choose another --tun-name, or rename the interface where it \
         is made"
    )
}

/// Deletes the device, whoever holds it; `false` when there was none. Refuses what is none of ours.
pub fn remove(name: &str) -> anyhow::Result<bool> {
    let Some(link) = link::get(name).with_context(|| format!("look for TUN device {name}"))? else {
        return Ok(false);
    };
    check_kind(&link).context("leaving it alone")?;
    link::delete(link.index).with_context(|| format!("delete TUN device {name}"))?;
    Ok(true)
}

/// Sets the MTU of a TUN device. Where that brings IPv6 back to one that is up, the kernel has made itself an address before it
/// can be told not to.
pub(crate) fn set_mtu(index: u32, mtu: u32) -> io::Result<()> {
    let before = link::get_by_index(index)?.map_or(mtu, |link| link.mtu);
    link::set_mtu(index, mtu)?;
    if before >= IPV6_MTU_MIN || mtu < IPV6_MTU_MIN {
        return Ok(());
    }
    make_no_addresses(index);
    for address in addr::of_interface(index)? {
        if matches!(address.net.addr(), IpAddr::V6(it) if it.is_unicast_link_local()) {
            addr::delete(index, address.net)?;
        }
    }
    Ok(())
}

/// A link-local address of the kernel's own would send router solicitations to every peer.
fn make_no_addresses(index: u32) {
    if let Err(error) = link::set_no_address_generation(index) {
        tracing::debug!(%error, "no IPv6 on the TUN device");
    }
}

fn inherited(number: i32) -> io::Result<(OwnedFd, String, c_int)> {
    let fd = sys::inherited(number)?;
    let (name, flags) = sys::tun_attached(fd.as_fd())?;
    rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok((fd, name, flags))
}

const BASE_FLAGS: c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE;

fn open_clone_device() -> anyhow::Result<OwnedFd> {
    use rustix::io::Errno;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => anyhow!(
            "there is no /dev/net/tun: load the tun module (modprobe tun), or pass the device into the container"
        ),
        Errno::ACCESS | Errno::PERM => anyhow!(
            "/dev/net/tun may not be opened: run as root, or allow the device in the container's device cgroup"
        ),
        errno => anyhow::Error::new(errno).context("open /dev/net/tun"),
    })
}

/// Attaches to the device; tells whether with a vnet header.
fn attach(options: &TunOptions) -> anyhow::Result<(OwnedFd, bool)> {
    let fd = open_clone_device()?;
    let known = sys::tun_features(fd.as_fd()).context("ask the TUN driver what it can do")?;
    let knows = |flag: c_int| known & flag.cast_unsigned() != 0;
    if options.multi_queue && !knows(libc::IFF_MULTI_QUEUE) {
        bail!("this kernel's TUN driver has no multi-queue support (Linux 3.8 or newer is needed)");
    }
    let vnet_hdr = options.vnet_hdr && knows(libc::IFF_VNET_HDR);
    let queues = if options.multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let base = libc::IFF_TUN | libc::IFF_NO_PI | queues;
    let flags = base | if vnet_hdr { libc::IFF_VNET_HDR } else { 0 };
    sys::tun_attach(fd.as_fd(), &options.name, flags)
        .map_err(|error| explain_attach(&options.name, error))?;
    Ok((fd, vnet_hdr))
}

fn explain_attach(name: &str, error: io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::EPERM) => anyhow!(
            "TUN device {name} may not be made or opened: run as root or with CAP_NET_ADMIN"
        ),
        Some(libc::EBUSY) => busy(name),
        Some(libc::EINVAL) => anyhow::Error::new(error).context(format!(
            "interface {name} exists and is no TUN device that can be taken: delete it (ip link delete {name}), or choose another name"
        )),
        _ => anyhow::Error::new(error).context(format!("open TUN device {name}")),
    }
}

fn busy(name: &str) -> anyhow::Error {
    anyhow!(
        "TUN device {name} is held by another program: another meshd runs here; stop it, or choose another name (--tun-name)"
    )
}

/// Whether a device of this name can be taken with several queues: there is none, or it has them.
fn may_have_queues(name: &str) -> anyhow::Result<bool> {
    let link = link::get(name).with_context(|| format!("look for TUN device {name}"))?;
    Ok(link.is_none_or(|link| check_kind(&link).is_ok()))
}

/// [`refuse_owned`], once whoever is about to let go has: a program that was ended a moment ago, or a child of its owner that
/// has not begun its own program yet.
fn wait_until_free(name: &str) -> anyhow::Result<()> {
    for _ in 0..LOOKS_AT_OWNER {
        if refuse_owned(name, 0).is_ok() {
            return Ok(());
        }
        std::thread::sleep(LOOK_AT_OWNER_EVERY);
    }
    refuse_owned(name, 0)
}

/// Fails when the interface is none of ours, or when more than `own` queues of it are open.
fn refuse_owned(name: &str, own: u32) -> anyhow::Result<()> {
    let link = link::get(name).with_context(|| format!("look for TUN device {name}"))?;
    let Some(link) = link else { return Ok(()) };
    check_kind(&link)?;
    match link.tun.and_then(|tun| tun.queues) {
        Some(queues) if queues > own => Err(busy(name)),
        _ => Ok(()),
    }
}

const TSO: c_uint = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
const USO: c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// What is wanted of TSO and USO, then less of it. USO is the younger: it goes first, and neither takes the other along.
fn ladder(options: &TunOptions) -> [(bool, bool); 3] {
    [(options.tso, options.uso), (options.tso, false), (false, false)]
}

fn mask(tso: bool, uso: bool) -> c_uint {
    libc::TUN_F_CSUM | if tso { TSO } else { 0 } | if uso { USO } else { 0 }
}

/// Takes the first rung that works. The mask belongs to the device and outlives its owner, so it is always set, even to
/// nothing.
fn negotiate(
    fd: BorrowedFd<'_>,
    options: &TunOptions,
    vnet_hdr: bool,
) -> anyhow::Result<TunFeatures> {
    let mut features = TunFeatures { vnet_hdr, ..TunFeatures::default() };
    if vnet_hdr {
        sys::tun_set_vnet_header_bytes(fd, VNET_HEADER_BYTES as c_int)
            .context("set the vnet header size of the TUN device")?;
        // Whoever knows USO knows its super-packets when written, wanted in the other direction or not.
        features.takes_udp = sys::tun_set_offload(fd, mask(false, true)).is_ok();
        for (tso, uso) in ladder(options).into_iter().filter(|_| options.csum) {
            match sys::tun_set_offload(fd, mask(tso, uso)) {
                Ok(()) => return Ok(TunFeatures { csum: true, tso, uso, ..features }),
                Err(error) => {
                    tracing::debug!(%error, tso, uso, "TUN offloads refused, trying fewer");
                }
            }
        }
    }
    sys::tun_set_offload(fd, 0).context("switch the TUN device's offloads off")?;
    Ok(features)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offload_that_is_off_takes_no_other_along() {
        let all = TunOptions::new("t");
        let of = |tso, uso| ladder(&TunOptions { tso, uso, ..all.clone() });
        assert_eq!(of(true, true), [(true, true), (true, false), (false, false)]);
        assert_eq!(of(false, true)[0], (false, true));
        assert_eq!(of(true, false)[0], (true, false));
        assert_eq!(mask(false, true) & TSO, 0);
        assert_eq!(mask(true, false) & USO, 0);
    }

    /// Reads `count` times from queues that hold so many packets of so many bytes each; the queues read from.
    fn read(turn: &mut Turn, held: &mut [usize], bytes: &[usize], count: usize) -> Vec<usize> {
        let mut from = Vec::new();
        while from.len() < count {
            let Some(queue) = turn.next(held.len()) else { break };
            match held[queue].checked_sub(1) {
                None => turn.nothing(),
                Some(left) => {
                    held[queue] = left;
                    turn.took(bytes[queue]);
                    from.push(queue);
                }
            }
        }
        from
    }

    #[test]
    fn queues_take_turns_by_packets_and_by_bytes() {
        let mut turn = Turn::default();
        let order = read(&mut turn, &mut [1_000, 3, 1_000], &[100, 100, TUN_QUEUE_BYTES], 69);
        let mut expected = vec![0; TUN_QUEUE_READS];
        expected.extend([1, 1, 1, 2]);
        expected.extend([0; TUN_QUEUE_READS]);
        expected.push(2);
        assert_eq!(order, expected);
    }

    #[test]
    fn everything_is_read_whatever_was_said_to_be_ready() {
        let mut turn = Turn::default();
        let mut held = [5, 0, 7, 40];
        turn.ready = 0b0101;
        assert_eq!(read(&mut turn, &mut held, &[9; 4], 100).len(), 12);
        assert_eq!(read(&mut turn, &mut held, &[9; 4], 100), [3; 40]);
        assert!(read(&mut turn, &mut held, &[9; 4], 1).is_empty());
    }
}
