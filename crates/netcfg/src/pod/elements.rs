//! Who is in the sets of the pods' table, over netlink.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use super::rules::SETS;
use crate::nfnetlink::{
    Attributes, DELETE_ELEMENT, GET_ELEMENT, NEW_ELEMENT, Nfnetlink, TABLE, of_kind,
};
use crate::ruleset::{ELEMENTS, ELEMENTS_SET, missing_is_empty};

/// Attributes (`NFTA_*` in nf_tables.h).
const LIST_ITEM: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;

/// Elements in one message: an attribute holds 64 KiB, an element is below 50 bytes.
const ELEMENTS_PER_MESSAGE_MAX: usize = 512;

/// Room for an interface name in a key (`IFNAMSIZ`).
const NAME_BYTES: usize = 16;

/// Puts pairs into the sets of a table that is there; a pair that stands is fine.
pub(super) fn add(socket: &mut Nfnetlink, table: &str, pairs: &[(&str, IpAddr)]) -> io::Result<()> {
    change(socket, table, pairs, &[NEW_ELEMENT])
}

/// Takes pairs out. Adding first makes it work whether or not they stand.
pub(super) fn remove(
    socket: &mut Nfnetlink,
    table: &str,
    pairs: &[(&str, IpAddr)],
) -> io::Result<()> {
    change(socket, table, pairs, &[NEW_ELEMENT, DELETE_ELEMENT])
}

/// Every pair in the sets; none where there is no such table.
pub(super) fn list(socket: &mut Nfnetlink, table: &str) -> io::Result<Vec<(String, IpAddr)>> {
    let mut pairs = BTreeSet::new();
    for set in SETS {
        let request = Attributes::default().text(TABLE, table)?.text(ELEMENTS_SET, set)?;
        read(&missing_is_empty(socket.dump(GET_ELEMENT, &request))?, &mut pairs);
    }
    Ok(pairs.into_iter().collect())
}

/// Once each: while the kernel makes a hash table larger, a listing begins anew and brings what it had brought before
/// (`rhashtable_walk_next` in lib/rhashtable.c), and to take out the same twice would fail.
fn read(parts: &[Vec<u8>], pairs: &mut BTreeSet<(String, IpAddr)>) {
    for list in parts.iter().flat_map(|part| of_kind(part, ELEMENTS)) {
        for element in of_kind(list, LIST_ITEM) {
            let keys = of_kind(element, ELEMENT_KEY);
            let mut values = keys.flat_map(|key| of_kind(key, DATA_VALUE));
            pairs.extend(values.next().and_then(pair));
        }
    }
}

fn change(
    socket: &mut Nfnetlink,
    table: &str,
    pairs: &[(&str, IpAddr)],
    kinds: &[u16],
) -> io::Result<()> {
    for pairs in pairs.chunks(ELEMENTS_PER_MESSAGE_MAX) {
        let mut changes = Vec::new();
        for (set, v4) in SETS.into_iter().zip([true, false]) {
            let mut list = Attributes::default();
            let mut of_family = pairs.iter().filter(|(_, ip)| ip.is_ipv4() == v4).peekable();
            if of_family.peek().is_none() {
                continue;
            }
            for (name, address) in of_family {
                let key = Attributes::default().put(DATA_VALUE, &key(name, *address)?)?;
                let element = Attributes::default().nested(ELEMENT_KEY, &key)?;
                list = list.nested(LIST_ITEM, &element)?;
            }
            let message = Attributes::default().text(TABLE, table)?.text(ELEMENTS_SET, set)?;
            let message = message.nested(ELEMENTS, &list)?;
            changes.extend(kinds.iter().map(|kind| (*kind, message.clone())));
        }
        if !changes.is_empty() {
            socket.change(&changes)?;
        }
    }
    Ok(())
}

/// `ifname . address`, each padded to whole registers.
fn key(name: &str, address: IpAddr) -> io::Result<Vec<u8>> {
    if name.len() >= NAME_BYTES {
        let text = format!("{name:?} is too long for an interface");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(NAME_BYTES, 0);
    match address {
        IpAddr::V4(address) => bytes.extend(address.octets()),
        IpAddr::V6(address) => bytes.extend(address.octets()),
    }
    Ok(bytes)
}

/// Takes a key apart; `None` for bytes that are none.
fn pair(key: &[u8]) -> Option<(String, IpAddr)> {
    let (name, address) = key.split_at_checked(NAME_BYTES)?;
    let end = name.iter().position(|byte| *byte == 0)?;
    let name = std::str::from_utf8(name.get(..end)?).ok()?;
    let address = match address.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(address).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(address).ok()?),
        _ => return None,
    };
    Some((name.to_owned(), address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_listing_brings_twice_is_there_once() {
        let part = |names: &[&str]| -> Vec<u8> {
            let mut list = Attributes::default();
            for name in names {
                let value = key(name, IpAddr::from([10, 244, 1, 2])).unwrap();
                let value = Attributes::default().put(DATA_VALUE, &value).unwrap();
                let element = Attributes::default().nested(ELEMENT_KEY, &value).unwrap();
                list = list.nested(LIST_ITEM, &element).unwrap();
            }
            Attributes::default().nested(ELEMENTS, &list).unwrap().bytes().to_vec()
        };
        let mut pairs = BTreeSet::new();
        read(&[part(&["meshp1", "meshp2"]), part(&["meshp2", "meshp3", "meshp1"])], &mut pairs);
        let names: Vec<&str> = pairs.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["meshp1", "meshp2", "meshp3"]);
    }

    #[test]
    fn keys_have_the_layout_of_the_sets_type() {
        let v4 = key("meshp0", "10.244.1.5".parse().unwrap()).unwrap();
        assert_eq!(v4, b"meshp0\0\0\0\0\0\0\0\0\0\0\x0a\xf4\x01\x05");
        assert_eq!(key("meshp0", "::1".parse().unwrap()).unwrap().len(), 32);
        for (name, address) in [("meshp0", "10.244.1.5"), ("meshp0123456789", "fd00::5")] {
            let address = address.parse().unwrap();
            let key = key(name, address).unwrap();
            assert_eq!(pair(&key), Some((name.to_owned(), address)));
            for length in 0..key.len() {
                let cut = pair(&key[..length]);
                assert!(cut.is_none() || length == NAME_BYTES + 4, "{length}: {cut:?}");
            }
        }
        assert_eq!(pair(&[b'x'; 20]), None, "no end of the name");
        assert!(key("sixteen-bytes-xx", "::1".parse().unwrap()).is_err());
    }
}
