//! The configuration protocol. Its pure files are compiled in as they are: no program depends on another, and the rest of
//! `meshd` would be built for each target.

#![allow(dead_code, unreachable_pub)] // not all of it is asked

#[path = "../../../meshd/src/uapi/device.rs"]
mod device;
#[path = "../../../meshd/src/uapi/line.rs"]
mod line;
#[path = "../../../meshd/src/uapi/refusal.rs"]
mod refusal;

use device::{Device, Live};
use line::{Line, parse};
use refusal::Refusal;

/// Reads the lines of a request as the server does.
fn read(text: &[u8]) -> Option<Vec<Line>> {
    let mut lines = Vec::new();
    let mut in_peer = false;
    for text in text.split(|byte| *byte == b'\n') {
        let line = parse(text, in_peer, &|_| Some(1)).ok()?;
        in_peer |= matches!(line, Line::PublicKey(_));
        lines.push(line);
    }
    Some(lines)
}

/// Any lines: no panic, a request is taken whole or leaves everything as it was, and what a device says of itself makes
/// the same device.
pub(crate) fn lines(data: &[u8]) {
    let mut device = Device::default();
    for request in data.split(|byte| *byte == 0).take(16) {
        let Some(lines) = read(request) else { continue };
        let Ok(new) = device.apply(&lines) else { continue };
        device.change_to(&new, &lines);
        device = new;
        device.peer_configs(1_420);
        device.endpoints();
        let text = device.print(&Live::new());
        let settable: Vec<&str> = text
            .lines()
            .filter(|line| {
                !["last_handshake", "tx_bytes", "rx_bytes"]
                    .iter()
                    .any(|name| line.starts_with(name))
            })
            .collect();
        if settable.is_empty() {
            continue;
        }
        let again = read(settable.join("\n").as_bytes()).expect("what is printed can be read");
        let copy = Device::default().apply(&again).expect("and applied");
        assert_eq!(*copy.print(&Live::new()), *text);
    }
}
