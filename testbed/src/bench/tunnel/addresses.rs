//! Addresses of the two nodes, whoever tunnels between them.

/// On the wire.
pub(super) const WIRE: [&str; 2] = ["198.51.100.1", "198.51.100.2"];

/// In whose names node a is flooded, from behind node b.
pub(super) const FLOODERS: &str = "203.0.113.0/24";

/// Of their pods, one prefix of each family.
pub(super) fn pod_cidrs(place: usize) -> Vec<String> {
    let number = place + 1;
    vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]
}
