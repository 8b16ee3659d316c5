//! Several sockets on one port, one for each shard.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Context as _;

use super::{UdpOptions, UdpSocket};
use crate::sys;

/// One instruction of classic BPF: code, jumps when true and when false, operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterInstruction(pub u16, pub u8, pub u8, pub u32);

impl FilterInstruction {
    fn raw(&self) -> libc::sock_filter {
        let Self(code, jt, jf, k) = *self;
        libc::sock_filter { code, jt, jf, k }
    }
}

impl UdpSocket {
    /// Opens `count` sockets on one port, among which the kernel chooses by `filter`, which returns the number of a socket
    /// (`SO_ATTACH_REUSEPORT_CBPF`, socket(7)); without a filter, or where it takes none, by addresses and ports.
    pub fn open_group(
        options: &UdpOptions,
        count: usize,
        filter: &[FilterInstruction],
    ) -> anyhow::Result<Vec<Self>> {
        // Alone at first: a port that somebody has, though he would share it, is not ours.
        let first = Self::open(options)?;
        let options = UdpOptions { port: first.local_port, ..options.clone() };
        let gso = first.features.gso;
        let mut group = vec![first];
        if count <= 1 {
            return Ok(group);
        }
        share_port(&group[0].fd)?;
        while group.len() < count {
            let mut socket = Self::bound(&options, true)?;
            socket.features.gso = gso;
            group.push(socket);
        }
        if filter.is_empty() {
            return Ok(group);
        }
        if let Err(error) = group[0].set_filter(filter) {
            tracing::info!(
                %error,
                "this kernel takes no filter for sockets that share a port: datagrams take a detour between shards"
            );
        }
        Ok(group)
    }

    /// Another filter for the whole group, from the next datagram on.
    pub fn set_filter(&self, filter: &[FilterInstruction]) -> io::Result<()> {
        let program: Vec<_> = filter.iter().map(FilterInstruction::raw).collect();
        sys::attach_reuseport_filter(self.fd.as_fd(), &program)
    }
}

pub(super) fn share_port(fd: &OwnedFd) -> anyhow::Result<()> {
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)
        .context("let the sockets of the shards share a port")
}
