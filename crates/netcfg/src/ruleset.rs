//! A table of ours as the kernel shows it over netlink: a fingerprint of its rules, and what they counted.
//!
//! A fingerprint holds for one kernel: what a newer one says, it may say otherwise.

use std::collections::BTreeMap;
use std::io;

use crate::nfnetlink::{
    Attributes, GET_CHAIN, GET_ELEMENT, GET_RULE, GET_SET, GET_TABLE, Nfnetlink, TABLE, attributes,
    of_kind,
};
use crate::nft;

/// Attributes, by the kind of object (`NFTA_*` in nf_tables.h).
const TABLE_FLAGS: u16 = 2;
const TABLE_USE: u16 = 3;
const TABLE_COMMENT: u16 = 6;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const CHAIN_FLAGS: u16 = 10;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_BYTES: u16 = 5;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_COMMENT: u16 = 7;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;
pub(crate) const ELEMENTS_SET: u16 = 2;
pub(crate) const ELEMENTS: u16 = 3;

/// What of an object's attributes does not move by itself, as handles and counters do.
const TABLE_SHOWN: [u16; 2] = [TABLE_FLAGS, TABLE_COMMENT];
const CHAIN_SHOWN: [u16; 5] = [CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE, CHAIN_FLAGS];
const SET_SHOWN: [u16; 4] = [SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_BYTES];
const RULE_SHOWN: [u16; 2] = [RULE_CHAIN, RULE_COMMENT];

const COUNTER: &[u8] = b"counter\0";

/// Type of a rule's comment among its user data: type u8, length u8, text with its NUL (libnftnl, `udata.h`).
const COMMENT: u8 = 0;

/// A table of family `inet` and what of it comes and goes without an edit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    pub name: &'a str,
    /// Chains with a hook, whose hook and policy count.
    pub hooked: &'a [&'a str],
    /// Sets whose elements do not count.
    pub living: &'a [&'a str],
}

impl Table<'_> {
    /// A hash of the table without handles, counters, elements of living sets and `seals` empty chains; `None` when there
    /// is no such table.
    pub(crate) fn fingerprint(
        &self,
        socket: &mut Nfnetlink,
        seals: usize,
    ) -> io::Result<Option<u64>> {
        let of_table = Attributes::default().text(TABLE, self.name)?;
        let Some(found) = socket.get(GET_TABLE, &of_table)? else { return Ok(None) };
        let mut shown = Vec::new();
        keep(&mut shown, &found, &TABLE_SHOWN);
        // Chains and sets in the table, also those that hold nothing.
        let held = of_kind(&found, TABLE_USE).next();
        let held = held.and_then(|value| value.try_into().ok()).map_or(0, u32::from_be_bytes);
        let others = i64::from(held).saturating_sub(i64::try_from(seals).unwrap_or(i64::MAX));
        shown.extend(others.to_be_bytes());
        for chain in self.hooked {
            let found =
                socket.get(GET_CHAIN, &chain_request(self.name, chain)?)?.unwrap_or_default();
            keep(&mut shown, &found, &CHAIN_SHOWN);
        }
        self.show_sets(socket, &of_table, &mut shown)?;
        for rule in socket.dump(GET_RULE, &of_table)? {
            show_rule(&rule, &mut shown);
        }
        Ok(Some(nft::hash_bytes(&shown)))
    }

    fn show_sets(
        &self,
        socket: &mut Nfnetlink,
        of_table: &Attributes,
        shown: &mut Vec<u8>,
    ) -> io::Result<()> {
        for set in socket.dump(GET_SET, of_table)? {
            keep(shown, &set, &SET_SHOWN);
            let name = of_kind(&set, SET_NAME).next().unwrap_or_default();
            if self.living.iter().any(|it| name.strip_suffix(b"\0") == Some(it.as_bytes())) {
                continue;
            }
            // Also of those without a name of their own: a rule replaced twice may get the old one's number.
            let request = of_table.clone().put(ELEMENTS_SET, name)?;
            // Gone since: whoever took it away altered the table.
            let parts = missing_is_empty(socket.dump(GET_ELEMENT, &request))?;
            show_elements(&parts, shown);
        }
        Ok(())
    }
}

/// Names of the table's chains; none where there is no such table.
pub(crate) fn chains(socket: &mut Nfnetlink, table: &str) -> io::Result<Vec<String>> {
    // The kernel lists those of every table.
    let all = missing_is_empty(socket.dump(GET_CHAIN, &Attributes::default()))?;
    let text = |object: &[u8], kind: u16| {
        let value = of_kind(object, kind).next()?;
        value.strip_suffix(b"\0").map(|text| String::from_utf8_lossy(text).into_owned())
    };
    let of_table = all.iter().filter(|chain| text(chain, TABLE).as_deref() == Some(table));
    Ok(of_table.filter_map(|chain| text(chain, CHAIN_NAME)).collect())
}

pub(crate) fn chain_exists(socket: &mut Nfnetlink, table: &str, chain: &str) -> io::Result<bool> {
    Ok(socket.get(GET_CHAIN, &chain_request(table, chain)?)?.is_some())
}

/// Packets counted by the table's rules, by the rules' comments; nothing where there is no such table.
pub(crate) fn packets(table: &str) -> io::Result<BTreeMap<String, u64>> {
    let of_table = Attributes::default().text(TABLE, table)?;
    let rules = missing_is_empty(Nfnetlink::open()?.dump(GET_RULE, &of_table))?;
    Ok(sum(rules.iter().filter_map(|rule| counted(rule))))
}

/// What is not there, or went away between two questions, holds nothing.
pub(crate) fn missing_is_empty(listed: io::Result<Vec<Vec<u8>>>) -> io::Result<Vec<Vec<u8>>> {
    match listed {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

fn chain_request(table: &str, chain: &str) -> io::Result<Attributes> {
    Attributes::default().text(TABLE, table)?.text(CHAIN_NAME, chain)
}

/// In an order of our own: the kernel's is another in every copy of a hashed set.
fn show_elements(parts: &[Vec<u8>], shown: &mut Vec<u8>) {
    let lists = parts.iter().flat_map(|part| of_kind(part, ELEMENTS));
    let mut elements: Vec<&[u8]> = lists.flat_map(attributes).map(|(_, element)| element).collect();
    elements.sort_unstable();
    elements.into_iter().for_each(|element| append(shown, element));
    append(shown, &[]);
}

fn show_rule(rule: &[u8], shown: &mut Vec<u8>) {
    keep(shown, rule, &RULE_SHOWN);
    for expression in expressions(rule) {
        append(shown, if is_counter(expression) { b"counter" } else { expression });
    }
}

fn expressions(rule: &[u8]) -> impl Iterator<Item = &[u8]> {
    of_kind(rule, RULE_EXPRESSIONS).flat_map(attributes).map(|(_, expression)| expression)
}

fn is_counter(expression: &[u8]) -> bool {
    of_kind(expression, EXPRESSION_NAME).next() == Some(COUNTER)
}

/// A rule's comment and the packets its first counter saw.
fn counted(rule: &[u8]) -> Option<(String, u64)> {
    let counter = expressions(rule).find(|expression| is_counter(expression))?;
    let packets = of_kind(counter, EXPRESSION_DATA)
        .flat_map(|data| of_kind(data, COUNTER_PACKETS))
        .next()
        .and_then(|value| value.try_into().ok())?;
    let comment = comment(of_kind(rule, RULE_COMMENT).next()?)?;
    Some((comment.to_owned(), u64::from_be_bytes(packets)))
}

fn comment(mut user_data: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = user_data {
        let (value, behind) = rest.split_at_checked(usize::from(*length))?;
        if *kind == COMMENT {
            return std::str::from_utf8(value.strip_suffix(b"\0")?).ok();
        }
        user_data = behind;
    }
    None
}

fn sum(counts: impl Iterator<Item = (String, u64)>) -> BTreeMap<String, u64> {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for (comment, packets) in counts {
        let count = sums.entry(comment).or_default();
        *count = count.saturating_add(packets);
    }
    sums
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

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Attributes {
        Attributes::default()
    }

    #[test]
    fn what_stands_in_one_attribute_cannot_pass_for_two() {
        let object = |first: &[u8], second: &[u8]| {
            let request = plain().put(1, first).unwrap().put(2, second).unwrap();
            let mut shown = Vec::new();
            keep(&mut shown, request.bytes(), &[1, 2]);
            shown
        };
        assert_ne!(object(b"ab", b"c"), object(b"a", b"bc"));
        assert_eq!(object(b"ab", b"c"), object(b"ab", b"c"));
    }

    /// A rule as the kernel shows it: a counter behind something else, and user data.
    fn rule(packets: u64, user_data: &[u8]) -> Attributes {
        let expression = |name: &[u8], data: &Attributes| {
            let named = plain().put(EXPRESSION_NAME, name).unwrap();
            named.nested(EXPRESSION_DATA, data).unwrap()
        };
        let data = plain().put(1, &9u64.to_be_bytes()).unwrap();
        let data = data.put(COUNTER_PACKETS, &packets.to_be_bytes()).unwrap();
        let list = plain().nested(1, &expression(b"cmp\0", &plain())).unwrap();
        let list = list.nested(1, &expression(COUNTER, &data)).unwrap();
        let rule = plain().text(RULE_CHAIN, "leaving").unwrap();
        rule.nested(RULE_EXPRESSIONS, &list).unwrap().put(RULE_COMMENT, user_data).unwrap()
    }

    #[test]
    fn counters_do_not_count_and_comments_do() {
        let shown = |rule: &Attributes| {
            let mut shown = Vec::new();
            show_rule(rule.bytes(), &mut shown);
            shown
        };
        assert_eq!(shown(&rule(1, b"\0\x02a\0")), shown(&rule(2, b"\0\x02a\0")));
        assert_ne!(shown(&rule(1, b"\0\x02a\0")), shown(&rule(1, b"\0\x02b\0")));
    }

    #[test]
    fn elements_count_and_their_order_does_not() {
        let part = |elements: &[&[u8]]| {
            let list = elements.iter().fold(plain(), |list, one| list.put(1, one).unwrap());
            plain().nested(ELEMENTS, &list).unwrap().bytes().to_vec()
        };
        let shown = |parts: &[Vec<u8>]| {
            let mut shown = Vec::new();
            show_elements(parts, &mut shown);
            shown
        };
        let all = shown(&[part(&[b"a", b"b", b"c"])]);
        assert_eq!(shown(&[part(&[b"c"]), part(&[b"b", b"a"])]), all);
        assert_ne!(shown(&[part(&[b"a", b"b"])]), all);
        assert_ne!(shown(&[part(&[b"a", b"b", b"cc"])]), all);
    }

    #[test]
    fn packets_are_found_by_comment_and_summed_over_families() {
        let of = |packets: u64, user_data: &[u8]| counted(rule(packets, user_data).bytes());
        let counts = [of(2, b"\0\x02a\0"), of(3, b"\x01\x01x\0\x02a\0"), of(7, b"\0\x02b\0")];
        let sums = sum(counts.into_iter().flatten());
        assert_eq!(sums, BTreeMap::from([("a".to_owned(), 5), ("b".to_owned(), 7)]));
        for odd in [&b""[..], b"\0", b"\0\x02a", b"\0\x01a", b"\0\xffa\0", b"\x01\x01x"] {
            assert_eq!(of(1, odd), None, "{odd:?}");
        }
        let whole = rule(1, b"\0\x02a\0");
        for length in 0..whole.bytes().len() {
            // Whatever is cut off, it ends.
            let _ = counted(&whole.bytes()[..length]);
        }
    }
}
