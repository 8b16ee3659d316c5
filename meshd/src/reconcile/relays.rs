//! Which relays this node registers at: those it was told of, best first, then those the cluster publishes, by name.
//!
//! All nodes take the same ones in the same order: two nodes meet at a relay only where both are registered.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::cluster::Keyrelay;
use mesh_types::limits::RELAYS_MAX;

#[derive(Debug, Default)]
pub(super) struct Relays {
    told: Vec<Keyrelay>,
    published: BTreeMap<String, String>,
    /// Entries that were named as bad and still stand.
    named: BTreeSet<(String, String)>,
}

impl Relays {
    pub(super) fn new(told: Vec<Keyrelay>, published: BTreeMap<String, String>) -> Self {
        Self { told, published, named: BTreeSet::new() }
    }

    /// As the cluster publishes them.
    pub(super) fn published(&self) -> &BTreeMap<String, String> {
        &self.published
    }

    /// True where these are others than before.
    pub(super) fn hear(&mut self, published: BTreeMap<String, String>) -> bool {
        let changed = self.published != published;
        self.published = published;
        changed
    }

    /// Those to use. What is no relay is skipped and named once.
    pub(super) fn chosen(&mut self) -> Vec<Keyrelay> {
        let mut chosen = self.told.clone();
        let mut bad = BTreeSet::new();
        for (name, text) in &self.published {
            match Keyrelay::published(text) {
                Ok(relay) => {
                    let known = chosen.iter().any(|before| before.key == relay.key);
                    if !known && chosen.len() < RELAYS_MAX {
                        chosen.push(relay);
                    }
                }
                Err(error) => {
                    let place = (name.clone(), text.clone());
                    if !self.named.contains(&place) {
                        tracing::warn!(name, text, %error, "no relay: skipped");
                    }
                    bad.insert(place);
                }
            }
        }
        self.named = bad;
        chosen
    }
}

#[cfg(test)]
mod tests {
    use mesh_types::key::PublicKey;

    use super::*;
    use crate::config;

    fn text(byte: u8, place: &str) -> String {
        format!("{}@{place}", PublicKey::from_bytes([byte; 32]).expect("a point"))
    }

    fn shown(relays: &mut Relays) -> Vec<String> {
        relays.chosen().iter().map(|relay| relay.endpoints[0].to_string()).collect()
    }

    fn published(entries: &[(&str, String)]) -> BTreeMap<String, String> {
        entries.iter().map(|(name, text)| ((*name).to_owned(), text.clone())).collect()
    }

    #[test]
    fn told_ones_come_first_and_the_others_by_name_up_to_the_bound() {
        let told = config::keyrelays(&[text(1, "told:1")]).expect("a relay");
        let names = ["e", "d", "c", "b"];
        let entries: Vec<_> =
            (2..).zip(names).map(|(byte, name)| (name, text(byte, &format!("{name}:1")))).collect();
        let mut relays = Relays::new(told, published(&entries));
        assert_eq!(shown(&mut relays), ["told:1", "b:1", "c:1", "d:1"]);
    }

    #[test]
    fn a_relay_may_say_an_address_of_each_family() {
        let places = ["203.0.113.8:15192", "[2001:db8::8]:15192", "10.244.1.5:15192"];
        let entry = text(1, &format!("{}/tls=8443", places.join("+")));
        let relays = Relays::new(Vec::new(), published(&[("a", entry)])).chosen();
        let shown: Vec<_> = relays[0].endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(
            (shown.as_slice(), relays[0].tls_port),
            (&places.map(String::from)[..], Some(8443))
        );
        // Of places a later version may name, and of more than there may be, those that are known serve.
        let later = [&places[..], &["what:is:this", "a:1", "b:2"]].concat();
        let entry = text(1, &format!("{}/tls=8443", later.join("+")));
        let relays = Relays::new(Vec::new(), published(&[("a", entry)])).chosen();
        let shown: Vec<_> = relays[0].endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(shown, [&places[..], &["a:1"]].concat());
        assert_eq!(relays[0].tls_port, Some(8443));
    }

    #[test]
    fn a_relay_that_is_told_and_published_is_one() {
        let told = config::keyrelays(&[text(1, "told:1")]).expect("a relay");
        let mut relays = Relays::new(told, published(&[("a", text(1, "a:1"))]));
        assert_eq!(shown(&mut relays), ["told:1"]);
    }

    #[test]
    fn what_is_no_relay_costs_itself_alone() {
        let entries = [
            ("a", "nonsense".to_owned()),
            ("b", String::new()),
            ("c", text(2, "c:0")),
            ("d", text(3, "d:1")),
            ("e", text(4, "e:1/later=word")),
        ];
        let mut relays = Relays::new(Vec::new(), published(&entries));
        assert_eq!(shown(&mut relays), ["d:1", "e:1"]);
        assert!(!relays.hear(published(&entries)), "the same again");
        assert!(relays.hear(published(&entries[3..])));
        assert_eq!(relays.published().len(), 2);
    }
}
