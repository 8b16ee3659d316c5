//! Connection tracking (include/uapi/linux/netfilter/nfnetlink_conntrack.h), of which one thing is asked: to forget.
//!
//! ```text
//! nlmsghdr  20 u32 | type u16 = 1 << 8 | 2 (delete) | flags u16 | sequence u32 | port u32 = 0   native byte order
//! nfgenmsg  family u8 = 0 (all) | version u8 = 0 | resource u16 = 0                               no attributes: every entry
//! ```

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink::{self, ANSWER_WITHIN};

const SUBSYSTEM: u16 = 1;
const DELETE: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const REQUEST_BYTES: u32 = 20;
/// An acknowledgement quotes the request.
const ANSWER_BYTES: usize = 128;

/// Forgets every connection of the calling thread's network namespace, and with it every mapping of its NAT, as a router
/// does that starts anew.
pub fn forget_all() -> io::Result<()> {
    let socket = netlink::open_socket(NETLINK_NETFILTER, ANSWER_WITHIN)?;
    let mut request = Vec::new();
    request.extend(REQUEST_BYTES.to_ne_bytes());
    request.extend(((SUBSYSTEM << 8) | DELETE).to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    request.resize(REQUEST_BYTES as usize, 0);
    socket.send(&request, 0)?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES);
    netlink::receive(&socket, &mut answer)?;
    acknowledged(&answer)
}

/// nlmsghdr with type `NLMSG_ERROR`, then 0 or -errno.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|bytes| Some(u16::from_ne_bytes(bytes.try_into().ok()?)));
    let code =
        answer.get(16..20).and_then(|bytes| Some(i32::from_ne_bytes(bytes.try_into().ok()?)));
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "connection tracking answered with something else than an acknowledgement",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_for_what_it_says() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; 16];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert!(acknowledged(&answer(NLMSG_ERROR, 0)).is_ok());
        let refused = acknowledged(&answer(NLMSG_ERROR, -1)).expect_err("refused");
        assert_eq!(refused.raw_os_error(), Some(1));
        assert!(acknowledged(&answer(NLMSG_ERROR, i32::MIN)).is_err());
        for bad in [answer(3, 0), vec![], vec![0; 17]] {
            assert_eq!(
                acknowledged(&bad).expect_err("no answer").kind(),
                io::ErrorKind::InvalidData
            );
        }
    }
}
