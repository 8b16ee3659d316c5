//! Vocabulary shared by every program of the project: keys, prefixes, names, file formats, limits.
//!
//! No I/O, no clock, no randomness and no async: a type here can be built and compared in any test.
//!
//! | module | holds |
//! |---|---|
//! | [`key`] | public, private and preshared keys; redacted and zeroised |
//! | [`nat`] | what NATs do to a node's packets |
//! | [`net`] | cluster prefixes, pod CIDRs, endpoints and which of them are believable |
//! | [`node`] | validated node names, sites |
//! | [`annotations`] | the Kubernetes keys we read and write, with their parsers |
//! | [`defaults`] | port, mark, table and names we use unless told otherwise |
//! | [`keyrelay`] | a relay as text, by flag and as relays publish themselves |
//! | [`limits`] | every bound, each with its reason |
//! | [`netcheck`] | the document behind `meshd netcheck --json` |
//! | [`netstate`] | kernel objects as data: what the core wants and `netcfg` does |
//! | [`node_file`] | the file `meshd` leaves for the CNI plugin |
//! | [`attachment`] | the record the CNI plugin keeps for each pod interface |
//! | [`roster`] | the YAML file that replaces Kubernetes outside a cluster |
//! | [`carry`] | the header of what `keyrelay` carries between members |
//! | [`relay_frame`] | what nodes and `keyrelay` say to each other inside their sessions |
//! | [`stream_frame`] | the same where they go over a stream |
//! | [`status`] | the document behind `meshd status --json` |
//! | [`time`] | the clock as a number, handed in by the shells |

pub mod annotations;
pub mod attachment;
pub mod carry;
pub mod defaults;
pub mod key;
pub mod keyrelay;
pub mod limits;
pub mod nat;
pub mod net;
pub mod netcheck;
pub mod netstate;
pub mod node;
pub mod node_file;
pub mod relay_frame;
pub mod roster;
pub mod status;
pub mod stream_frame;
pub mod time;

pub use ipnet::{IpNet, Ipv4Net, Ipv6Net};
