//! Makes container images without a daemon, root or a network, and the same bytes every time: from a Containerfile, of
//! which it knows the few instructions ours has and refuses all others, or from files one by one.

pub mod containerfile;
mod layer;
mod layout;

pub use layer::{Files, Layer};
pub use layout::{Image, Layout};

/// A digest as image descriptors write it: the algorithm, a colon, hexadecimal digits.
fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in ring::digest::digest(&ring::digest::SHA256, bytes).as_ref() {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
