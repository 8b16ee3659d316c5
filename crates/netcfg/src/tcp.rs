//! What a TCP connection that carries datagrams wants of the kernel.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

use crate::sys;

/// Keepalives of a connection that is silent: the first after, then every.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Unanswered ones that end it.
const KEEPALIVES_LOST: u32 = 2;

/// Datagrams leave at once and wait in the kernel no more than `unsent_bytes`; the connection ends when nothing is acknowledged
/// for `silence`.
pub fn for_datagrams(socket: impl AsFd, unsent_bytes: usize, silence: Duration) -> io::Result<()> {
    let socket = socket.as_fd();
    let unsent = i32::try_from(unsent_bytes).unwrap_or(i32::MAX);
    sys::set_option(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, unsent)?;
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_tcp_user_timeout(socket, u32::try_from(silence.as_millis()).unwrap_or(u32::MAX))?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVES_LOST)?;
    Ok(())
}
