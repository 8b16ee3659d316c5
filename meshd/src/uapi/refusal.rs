//! Why a request was refused, and the number that says so.

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
    pub const ALL: [Self; 6] = [
        Self::NotPermitted,
        Self::TooLong,
        Self::Invalid,
        Self::Protocol,
        Self::InUse,
        Self::Unknown,
    ];

    /// As metrics and counters call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotPermitted => "not_permitted",
            Self::TooLong => "too_long",
            Self::Invalid => "invalid",
            Self::Protocol => "no_line",
            Self::InUse => "in_use",
            Self::Unknown => "no_answer",
        }
    }

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
