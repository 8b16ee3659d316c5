//! The testbed: clouds out of network namespaces on one Linux machine.
//!
//! ```text
//! behaviour what meshd relies on in an API server, checked against the real one and ours
//! bench    figures beside those of others who do the same
//! api      a small Kubernetes API server that can fail on demand
//! lab      namespaces as nodes, routers and pods; one state directory per lab; down removes all of it
//! oracle   captures every underlay link and finds pod traffic that is not encrypted
//! traffic  what pods say to each other: TCP, UDP, ICMP, v4 and v6, checked byte by byte
//! demo     all of it in one command, with a report and a picture
//! nat      nodes behind every kind of NAT, and which of them reach each other directly
//! setting  what something was measured on
//! parallel jobs at once, a few, and what each needs for itself alone
//! kube     a real Kubernetes cluster in a lab; tool: what its test pods run
//! ```
//!
//! Everything here needs root. The library is what namespace tests use; the `testbed` program is the demo.

pub mod api;
pub mod behaviour;
pub mod bench;
pub mod canary;
pub mod cluster;
pub mod demo;
mod interrupt;
pub mod kube;
pub mod kubectl;
pub mod lab;
pub mod nat;
pub mod oracle;
mod parallel;
pub mod setting;
pub mod tool;
pub mod traffic;

/// One line to whoever watches.
pub(crate) fn progress(text: &str) {
    use std::io::Write as _;
    // Nothing to be done where even stderr is gone.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
