//! One question to nftables without starting its program: is a table there? (`NFT_MSG_GETTABLE`,
//! include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h)
//!
//! ```text
//! nlmsghdr  length u32 | type u16 = 10 << 8 | 1 | flags u16 | sequence u32 | port u32      native byte order
//! nfgenmsg  family u8 = 1 (inet) | version u8 = 0 | resource u16 = 0
//! nlattr    length u16 | type u16 = 1 (name) | name, zero byte, padding to 4
//! ```

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

const GET_TABLE: u16 = (10 << 8) | 1;
const NEW_TABLE: u16 = 10 << 8;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NFPROTO_INET: u8 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const HEADER_BYTES: usize = 16;

/// Whether the calling thread's network namespace has the nftables table `inet name`.
pub(crate) fn table_exists(name: &str) -> io::Result<bool> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(name)?, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    understand(&answer)
}

fn request(name: &str) -> io::Result<Vec<u8>> {
    let refused =
        || io::Error::new(io::ErrorKind::InvalidInput, "no nftables table has such a name");
    if name.contains('\0') {
        return Err(refused());
    }
    let attribute_bytes = u16::try_from(4 + name.len() + 1).map_err(|_| refused())?;
    let mut bytes = vec![0u8; 4];
    for part in [GET_TABLE, NLM_F_REQUEST] {
        bytes.extend(part.to_ne_bytes());
    }
    // Sequence and port: one question, one answer, on a socket of its own.
    bytes.extend([0; 8]);
    bytes.extend([NFPROTO_INET, 0, 0, 0]);
    for part in [attribute_bytes, NFTA_TABLE_NAME] {
        bytes.extend(part.to_ne_bytes());
    }
    bytes.extend(name.bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let total = u32::try_from(bytes.len()).map_err(|_| refused())?;
    bytes.splice(..4, total.to_ne_bytes());
    Ok(bytes)
}

fn understand(answer: &[u8]) -> io::Result<bool> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "nftables answered too little");
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    match kind.ok_or_else(short)? {
        NEW_TABLE => Ok(true),
        NLMSG_ERROR => {
            let code = answer.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|b| b.try_into().ok());
            let code = i32::from_ne_bytes(code.ok_or_else(short)?);
            match code.wrapping_neg() {
                libc::ENOENT => Ok(false),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("nftables answered with message type {other}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_kernels_layout() {
        let bytes = request("meshd").unwrap();
        assert_eq!(bytes.len(), 16 + 4 + 4 + 8);
        assert_eq!(bytes[..4], 32u32.to_ne_bytes());
        assert_eq!(bytes[20..22], 10u16.to_ne_bytes());
        assert_eq!(&bytes[24..], b"meshd\0\0\0");
        assert!(request("a\0b").is_err());
    }

    #[test]
    fn answers_are_understood_whatever_they_hold() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; 4];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert!(understand(&answer(NEW_TABLE, 0)).unwrap());
        assert!(!understand(&answer(NLMSG_ERROR, -libc::ENOENT)).unwrap());
        assert!(understand(&answer(NLMSG_ERROR, -libc::EPERM)).is_err());
        assert!(understand(&answer(77, 0)).is_err());
        for short in 0..HEADER_BYTES {
            assert!(understand(&answer(NLMSG_ERROR, 0)[..short]).is_err());
        }
    }
}
