//! How a socket is made.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use anyhow::Context as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::filtered::Filtered;
use super::{PMTU_V4, PMTU_V6, UdpCounters, UdpFeatures, UdpOptions, UdpSocket, group, segments};
use crate::sys;

impl UdpSocket {
    /// Opens and binds the socket: `[::]` for both families, `0.0.0.0` on a kernel without IPv6.
    pub fn open(options: &UdpOptions) -> anyhow::Result<Self> {
        let mut socket = Self::bound(options, false)?;
        socket.features.gso = options.gso && segments::arrive(&socket.fd);
        Ok(socket)
    }

    pub(super) fn bound(options: &UdpOptions, shared: bool) -> anyhow::Result<Self> {
        let (fd, dual_stack) = if options.v4_only || options.address.is_some_and(|ip| ip.is_ipv4())
        {
            (new_socket(AddressFamily::INET)?, false)
        } else {
            match new_socket(AddressFamily::INET6) {
                Ok(fd) => (fd, true),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::info!(error, "no IPv6 in this kernel, using IPv4 only");
                    (new_socket(AddressFamily::INET)?, false)
                }
            }
        };
        set_options(&fd, dual_stack, options)?;
        if shared {
            group::share_port(&fd)?;
        }
        bind(&fd, dual_stack, options)?;
        let local_port = local_port(&fd)?;
        let gro = options.gro && merges(&fd);
        Ok(Self {
            fd,
            features: UdpFeatures { dual_stack, gso: false, gro },
            local_port,
            counters: UdpCounters::default(),
            gso_refused: BTreeMap::new(),
            filtered: Filtered::default(),
            overflow_seen: 0,
        })
    }
}

/// Has the kernel merge what is received. Linux before 5.12 merges wrongly in places, and cannot tell of the option, which
/// gives it away.
fn merges(fd: &OwnedFd) -> bool {
    let set = |value| sys::set_option(fd, libc::SOL_UDP, libc::UDP_GRO, value).is_ok();
    let told = set(1) && sys::get_option(fd, libc::SOL_UDP, libc::UDP_GRO).is_ok_and(|it| it == 1);
    if !told {
        set(0);
    }
    told
}

fn new_socket(family: AddressFamily) -> anyhow::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::DGRAM, flags, None).context("open a UDP socket")
}

fn set_options(fd: &OwnedFd, dual_stack: bool, options: &UdpOptions) -> anyhow::Result<()> {
    let set = |level, option, value: i32| sys::set_option(fd, level, option, value);
    if dual_stack {
        set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0).context("make the UDP socket dual-stack")?;
        set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, PMTU_V6)
            .context("let the kernel fragment by the path MTU (IPv6)")?;
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1).context("ask for local addresses")?;
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1).context("ask for traffic classes")?;
    } else {
        set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1).context("ask for local addresses")?;
    }
    set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTU_V4)
        .context("switch path MTU discovery off (IPv4)")?;
    set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1).context("ask for type of service")?;
    set(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1).context("ask for the overflow counter")?;
    if options.mark != 0 {
        set(libc::SOL_SOCKET, libc::SO_MARK, options.mark.cast_signed()).context(
            "set the firewall mark of the UDP socket: run as root or with CAP_NET_ADMIN",
        )?;
    }
    set_buffers(fd, options.buffer_bytes);
    Ok(())
}

/// Beyond the system's limit where we may, up to it where not: small buffers cost packets, not
/// correctness.
fn set_buffers(fd: &OwnedFd, bytes: usize) {
    use rustix::net::sockopt;
    let receive = sockopt::set_socket_recv_buffer_size_force(fd, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(fd, bytes));
    let send = sockopt::set_socket_send_buffer_size_force(fd, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(fd, bytes));
    if let Err(error) = receive.and(send) {
        tracing::warn!(%error, bytes, "cannot enlarge the UDP socket's buffers");
    }
}

fn bind(fd: &OwnedFd, dual_stack: bool, options: &UdpOptions) -> anyhow::Result<()> {
    let any: IpAddr =
        if dual_stack { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let (ip, port) = (options.address.unwrap_or(any), options.port);
    rustix::net::bind(fd, &SocketAddr::new(ip, port)).map_err(|errno| match errno {
        rustix::io::Errno::ADDRINUSE => anyhow::Error::new(errno).context(format!(
            "UDP port {port} is taken by another program: stop it, or choose another (--listen-port; keyrelay: --port)"
        )),
        rustix::io::Errno::ACCESS => anyhow::Error::new(errno).context(format!(
            "UDP port {port} needs privileges: run as root, or choose one above 1023 (--listen-port; keyrelay: --port)"
        )),
        errno => anyhow::Error::new(errno).context(format!("bind UDP {ip}, port {port}")),
    })
}

fn local_port(fd: &OwnedFd) -> anyhow::Result<u16> {
    let name = rustix::net::getsockname(fd).context("read the UDP socket's address")?;
    let address = SocketAddr::try_from(name).context("read the UDP socket's address")?;
    Ok(address.port())
}
