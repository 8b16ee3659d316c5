//! The cross-platform configuration protocol of WireGuard (<https://www.wireguard.com/xplatform/>), as `wg` speaks it.
//!
//! ```text
//!  /var/run/wireguard/IFNAME.sock                                pure
//!  get=1 ─────────> [server] ─────────────────────────────> [device] print ──> lines, errno=0
//!  set=1, lines ──> [server] ──> [line] parse ──> all of them ──> apply ─────> errno=0 or why not
//! ```
//! A request is applied whole or not at all: one line that makes no sense, and nothing has changed. Error numbers are those
//! of the reference (`device/uapi.go` and `ipc/uapi_unix.go` of wireguard-go), negative as the kernel's.

pub mod device;
pub mod line;
pub mod server;

#[cfg(test)]
mod tests;

/// Why a request was not fulfilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("this socket only answers questions")]
    NotPermitted,
    #[error("a line is too long, or there are too many")]
    TooLong,
    #[error("unknown key, or a value that does not fit it")]
    Invalid,
    #[error("not a line of this protocol")]
    Protocol,
    #[error("the port is taken, or the mark may not be set")]
    InUse,
    #[error("the data plane does not answer")]
    Unknown,
}

impl Refusal {
    /// What stands behind `errno=`.
    pub fn errno(self) -> i32 {
        use rustix::io::Errno;
        let errno = match self {
            Self::NotPermitted => Errno::PERM,
            Self::TooLong => Errno::IO,
            Self::Invalid => Errno::INVAL,
            Self::Protocol => Errno::PROTO,
            Self::InUse => Errno::ADDRINUSE,
            Self::Unknown => Errno::NOANO,
        };
        -errno.raw_os_error()
    }
}
