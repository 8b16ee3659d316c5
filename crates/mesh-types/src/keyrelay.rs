//! A relay as text: what nodes are told by flag, and what relays publish of themselves.
//!
//! ```text
//!  KEY@HOST:PORT+HOST:PORT/tls=PORT
//!   │   └─ places: addresses and a name, up to four ─┘ └─ TCP port for TLS, 443 unless said, or off
//!   └─ public key; its base64 may hold slashes and plus signs, too
//! ```

use std::fmt;
use std::str::FromStr;

use crate::defaults::KEYRELAY_TLS_PORT;
use crate::key::{KeyError, PublicKey};
use crate::limits::RELAY_PLACES_MAX;
use crate::net::{EndpointHint, EndpointHintError};

/// A relay of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyrelay {
    pub key: PublicKey,
    /// Where it is: an address of each family, a name. One inside the cluster counts on the node alone that has that pod.
    pub endpoints: Vec<EndpointHint>,
    /// TCP port of the same host for TLS where UDP is blocked.
    pub tls_port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyrelayError {
    #[error("it is not KEY@HOST:PORT")]
    NotAnEntry,
    #[error("no public key in front of the @ ({0}): the relay's log shows its key")]
    Key(KeyError),
    #[error("behind the @ stands HOST:PORT, or several with + between: {0}")]
    Place(EndpointHintError),
    #[error("a relay has {RELAY_PLACES_MAX} addresses at most")]
    TooManyPlaces,
    #[error("behind HOST:PORT may stand /tls=PORT or /tls=off")]
    Tls,
}

impl Keyrelay {
    /// As [`str::parse`], of an entry that a later version may have written: what stands behind the slash may be a word we do
    /// not know, and so may a place; what is known of it serves.
    pub fn published(text: &str) -> Result<Self, KeyrelayError> {
        // Keys hold slashes too, in front of the @.
        let (key, place) = text.split_once('@').unwrap_or((text, ""));
        let (places, word) = place.split_once('/').unwrap_or((place, ""));
        let known = places.split('+').filter(|place| place.parse::<EndpointHint>().is_ok());
        let known = known.take(RELAY_PLACES_MAX).collect::<Vec<_>>().join("+");
        let read = |text: &str| text.parse::<Self>();
        read(text).or_else(|error| {
            let with_word = read(&format!("{key}@{known}/{word}"));
            with_word.or_else(|_| read(&format!("{key}@{known}"))).map_err(|_| error)
        })
    }
}

impl FromStr for Keyrelay {
    type Err = KeyrelayError;
    fn from_str(text: &str) -> Result<Self, KeyrelayError> {
        let (key, place) = text.trim().split_once('@').ok_or(KeyrelayError::NotAnEntry)?;
        let key = key.parse().map_err(KeyrelayError::Key)?;
        let (places, tls) = place.split_once('/').unwrap_or((place, ""));
        let mut endpoints = Vec::new();
        for place in places.split('+') {
            let endpoint = place.parse().map_err(KeyrelayError::Place)?;
            if endpoints.len() == RELAY_PLACES_MAX {
                return Err(KeyrelayError::TooManyPlaces);
            }
            endpoints.push(endpoint);
        }
        let tls_port = tls_port(tls).ok_or(KeyrelayError::Tls)?;
        Ok(Self { key, endpoints, tls_port })
    }
}

/// TCP port for TLS, by what stands behind the slash; `Some(None)`: not to be tried.
fn tls_port(text: &str) -> Option<Option<u16>> {
    match text.strip_prefix("tls=") {
        None if text.is_empty() => Some(Some(KEYRELAY_TLS_PORT)),
        None => None,
        Some("off") => Some(None),
        Some(port) => port.parse().ok().filter(|port| *port != 0).map(Some),
    }
}

impl fmt::Display for Keyrelay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.key)?;
        for (number, endpoint) in self.endpoints.iter().enumerate() {
            let between = if number == 0 { "" } else { "+" };
            write!(f, "{between}{endpoint}")?;
        }
        match self.tls_port {
            Some(KEYRELAY_TLS_PORT) => Ok(()),
            Some(port) => write!(f, "/tls={port}"),
            None => write!(f, "/tls=off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

    #[test]
    fn an_entry_survives_text() {
        for place in [
            "relay.example.org:15192",
            "192.0.2.1:15192+[2001:db8::7]:15192/tls=8443",
            "192.0.2.1:15192/tls=off",
        ] {
            let text = format!("{KEY}@{place}");
            let relay: Keyrelay = text.parse().expect("an entry");
            assert_eq!(relay.to_string(), text);
            assert_eq!(Keyrelay::published(&text), Ok(relay));
        }
        let said: Keyrelay = format!(" {KEY}@a:1/tls=443\n").parse().expect("an entry");
        assert_eq!(said.to_string(), format!("{KEY}@a:1"), "the port that is meant without");
    }

    #[test]
    fn what_is_no_entry_is_refused_for_what_is_wrong_with_it() {
        let error = |place: &str| format!("{KEY}@{place}").parse::<Keyrelay>().expect_err(place);
        assert_eq!("a:1".parse::<Keyrelay>(), Err(KeyrelayError::NotAnEntry));
        assert!(matches!("k@a:1".parse::<Keyrelay>(), Err(KeyrelayError::Key(_))));
        for place in ["", "a", "a:0", "a:1+", "+a:1", "a:1+b", "a:1 +b:1"] {
            assert!(matches!(error(place), KeyrelayError::Place(_)), "{place}");
        }
        assert_eq!(error("a:1+a:2+a:3+a:4+a:5"), KeyrelayError::TooManyPlaces);
        for end in ["/8443", "/tls=0", "/tls=70000", "/tls=", "/tls=off/tls=off"] {
            assert_eq!(error(&format!("a:1{end}")), KeyrelayError::Tls, "{end}");
        }
    }

    #[test]
    fn a_later_versions_word_behind_a_published_entry_is_left_out_and_nothing_else() {
        let read = |text: &str| Keyrelay::published(text);
        let plain = read(&format!("{KEY}@a:1"));
        assert!(plain.is_ok());
        // A key with a slash of its own.
        let slashed = "AB/DEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopo=";
        assert!(read(&format!("{slashed}@a:1/later=word")).is_ok());
        assert_eq!(read(&format!("{KEY}@a:1/later=word")), plain);
        assert_eq!(read(&format!("{KEY}@a:0/later=word")).ok(), None);
        assert_eq!(read("nonsense/later=word").ok(), None);
    }
}
