//! The pods' table over netlink: who is in its sets, and a fingerprint of everything else.

use std::io;
use std::net::IpAddr;

use super::rules::SETS;
use crate::nfnetlink::{
    Attributes, DELETE_ELEMENT, GET_CHAIN, GET_ELEMENT, GET_RULE, GET_SET, GET_TABLE, NEW_ELEMENT,
    Nfnetlink, TABLE, attributes,
};
use crate::nft;

/// Attributes, by the kind of object (`NFTA_*` in nf_tables.h).
const TABLE_USE: u16 = 3;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_BYTES: u16 = 5;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_COMMENT: u16 = 7;
const EXPRESSION_NAME: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const LIST_ITEM: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;

/// Chains with a hook, whose hook and policy count.
const HOOKED: [&str; 2] = ["from_pods", "to_world"];

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
    let mut pairs = Vec::new();
    for set in SETS {
        let request = Attributes::default().text(TABLE, table)?.text(ELEMENTS_SET, set)?;
        let parts = missing_is_empty(socket.dump(GET_ELEMENT, &request))?;
        for (_, list) in parts.iter().flat_map(|part| of_kind(part, ELEMENTS)) {
            for (_, element) in of_kind(list, LIST_ITEM) {
                let keys = of_kind(element, ELEMENT_KEY);
                let mut values = keys.flat_map(|(_, key)| of_kind(key, DATA_VALUE));
                pairs.extend(values.next().and_then(|(_, value)| pair(value)));
            }
        }
    }
    Ok(pairs)
}

/// Names of the table's chains; none where there is no such table.
pub(super) fn chains(socket: &mut Nfnetlink, table: &str) -> io::Result<Vec<String>> {
    // The kernel lists those of every table.
    let all = missing_is_empty(socket.dump(GET_CHAIN, &Attributes::default()))?;
    let text = |object: &[u8], kind: u16| {
        let (_, value) = of_kind(object, kind).next()?;
        value.strip_suffix(b"\0").map(|text| String::from_utf8_lossy(text).into_owned())
    };
    let of_table = all.iter().filter(|chain| text(chain, TABLE).as_deref() == Some(table));
    Ok(of_table.filter_map(|chain| text(chain, CHAIN_NAME)).collect())
}

pub(super) fn chain_exists(socket: &mut Nfnetlink, table: &str, chain: &str) -> io::Result<bool> {
    Ok(socket.get(GET_CHAIN, &chain_request(table, chain)?)?.is_some())
}

/// A hash of the table without its pods' addresses, handles, counters and `seals` empty chains; `None` when there is no
/// such table. It holds for one kernel: what a newer one says, it may say otherwise.
pub(super) fn fingerprint(
    socket: &mut Nfnetlink,
    table: &str,
    seals: usize,
) -> io::Result<Option<u64>> {
    let of_table = Attributes::default().text(TABLE, table)?;
    let Some(found) = socket.get(GET_TABLE, &of_table)? else { return Ok(None) };
    let mut shown = Vec::new();
    // Chains and sets in the table, also those that hold nothing.
    let held = attributes(&found).find(|(kind, _)| *kind == TABLE_USE);
    let held = held.and_then(|(_, value)| value.try_into().ok()).map_or(0, u32::from_be_bytes);
    let others = i64::from(held).saturating_sub(i64::try_from(seals).unwrap_or(i64::MAX));
    shown.extend(others.to_be_bytes());
    for chain in HOOKED {
        let found = socket.get(GET_CHAIN, &chain_request(table, chain)?)?.unwrap_or_default();
        keep(&mut shown, &found, &[CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE]);
    }
    for set in socket.dump(GET_SET, &of_table)? {
        keep(&mut shown, &set, &[SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_BYTES]);
        let name = attributes(&set).find(|(kind, _)| *kind == SET_NAME).map_or(&[][..], |it| it.1);
        if SETS.iter().any(|ours| name.strip_suffix(b"\0") == Some(ours.as_bytes())) {
            continue;
        }
        // Also of those without a name of their own: a rule replaced twice may get the old one's number.
        let request = of_table.clone().put(ELEMENTS_SET, name)?;
        match socket.dump(GET_ELEMENT, &request) {
            Ok(parts) => parts.iter().for_each(|part| keep(&mut shown, part, &[ELEMENTS])),
            // Gone since: whoever took it away altered the table.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    for rule in socket.dump(GET_RULE, &of_table)? {
        keep(&mut shown, &rule, &[RULE_CHAIN, RULE_COMMENT]);
        for (_, expressions) in attributes(&rule).filter(|(kind, _)| *kind == RULE_EXPRESSIONS) {
            for (_, expression) in attributes(expressions) {
                let name = attributes(expression).find(|(kind, _)| *kind == EXPRESSION_NAME);
                let counts = name.is_some_and(|(_, name)| name == b"counter\0");
                append(&mut shown, if counts { b"counter" } else { expression });
            }
        }
    }
    Ok(Some(nft::hash_bytes(&shown)))
}

fn of_kind(bytes: &[u8], wanted: u16) -> impl Iterator<Item = (u16, &[u8])> {
    attributes(bytes).filter(move |(kind, _)| *kind == wanted)
}

/// What is not there, or went away between two questions, holds nothing.
fn missing_is_empty(listed: io::Result<Vec<Vec<u8>>>) -> io::Result<Vec<Vec<u8>>> {
    match listed {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

fn chain_request(table: &str, chain: &str) -> io::Result<Attributes> {
    Attributes::default().text(TABLE, table)?.text(CHAIN_NAME, chain)
}

/// Appends these attributes of an object, by length, so that no two objects look alike.
fn keep(shown: &mut Vec<u8>, object: &[u8], kinds: &[u16]) {
    for (kind, value) in attributes(object).filter(|(kind, _)| kinds.contains(kind)) {
        shown.extend(kind.to_be_bytes());
        append(shown, value);
    }
    append(shown, &[]);
}

fn append(shown: &mut Vec<u8>, value: &[u8]) {
    shown.extend(value.len().to_be_bytes());
    shown.extend(value);
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

    #[test]
    fn what_stands_in_one_attribute_cannot_pass_for_two() {
        let object = |first: &[u8], second: &[u8]| {
            let request = Attributes::default().put(1, first).unwrap().put(2, second).unwrap();
            let mut shown = Vec::new();
            keep(&mut shown, request.bytes(), &[1, 2]);
            shown
        };
        assert_ne!(object(b"ab", b"c"), object(b"a", b"bc"));
        assert_eq!(object(b"ab", b"c"), object(b"ab", b"c"));
    }
}
