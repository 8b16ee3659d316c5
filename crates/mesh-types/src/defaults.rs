//! What we use unless told otherwise, chosen to clash with nobody on a Kubernetes node.

/// WireGuard UDP port: below NodePorts (30000) and the ephemeral range, not 51820 (taken by Kilo,
/// KubeSpan, Calico, flannel and Antrea), 51871 (Cilium), 41641 (Tailscale) or 4242 (Nebula).
pub const UDP_PORT: u16 = 15190;

/// TCP port of health and metrics, on loopback unless told otherwise.
pub const ADMIN_PORT: u16 = 15191;

/// UDP port of `keyrelay`.
pub const KEYRELAY_PORT: u16 = 15192;

/// TCP port at which a node tries a keyrelay where UDP is blocked: what networks let out that let out little.
pub const KEYRELAY_TLS_PORT: u16 = 443;

/// Firewall mark of our outer packets and the mask it is read with. 0x80 is AWS', 0x20/0x40
/// KubeSpan's, 0x2000/0x4000/0x8000 portmap's and kube-proxy's, high bits Calico's, Cilium's and
/// Tailscale's.
pub const MARK: u32 = 0x4;
pub const MARK_MASK: u32 = 0x4;

/// Routing table and rule priority.
pub const TABLE: u32 = 5190;
pub const RULE_PRIORITY: u32 = 5190;

/// Route protocol numbers (`rtm_protocol`) of `meshd` and of the CNI plugin; unassigned in
/// include/uapi/linux/rtnetlink.h.
pub const ROUTE_PROTOCOL: u8 = 190;
pub const ROUTE_PROTOCOL_CNI: u8 = 191;

/// Metric of the `unreachable` fallback: behind every real route.
pub const FALLBACK_METRIC: u32 = 4_278_198_272;

/// Metric of routes into the tunnel. The kernel turns 0 into this for IPv6 (`IP6_RT_PRIO_USER`,
/// include/net/ip6_route.h): saying it for both families keeps wanted and observed routes equal.
pub const ROUTE_METRIC: u32 = 1024;

/// MTU assumed of an underlay nobody has measured (Ethernet).
pub const UNDERLAY_MTU: u32 = 1500;

/// The TUN device.
pub const TUN_NAME: &str = "meshd0";

/// Host side of a pod's veth pair: this prefix and ten hex digits. The guard knows pods by it.
pub const POD_LINK_PREFIX: &str = "meshp";

/// nftables tables: the guard (`meshd`), and pods (`meshd-cni`: anti-spoof, masquerade).
pub const NFT_TABLE: &str = "meshd";
pub const NFT_TABLE_CNI: &str = "meshd-cni";

/// Where state that survives a reboot lives, and what does not.
pub const STATE_DIR: &str = "/var/lib/meshd";
pub const RUN_DIR: &str = "/run/meshd";

/// File names below the state directory.
pub const KEY_FILE: &str = "private-key.json";
pub const NODE_FILE: &str = "node.json";
pub const CACHE_FILE: &str = "cluster.json";
pub const ENDPOINTS_FILE: &str = "endpoints.json";
pub const IPAM_DIR: &str = "ipam";

/// The status socket below the run directory.
pub const SOCKET_FILE: &str = "meshd.sock";

/// Link-local gateways of pods; the host answers by a permanent neighbour entry, never by ARP.
pub const POD_GATEWAY_V4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 1, 1);
pub const POD_GATEWAY_V6: std::net::Ipv6Addr = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Bytes an underlay packet needs beyond the inner packet: outer IP header (20 or 40), UDP (8), WireGuard
/// header and tag (16 + 16, whitepaper section 5.4.6), and the header a relayed packet carries.
pub const OVERHEAD_V4: u32 = 20 + 8 + 32 + RELAY_HEADER_BYTES;
pub const OVERHEAD_V6: u32 = 40 + 8 + 32 + RELAY_HEADER_BYTES;

/// Room reserved in the MTU for the header of a relayed packet, so that a path may change to a relay
/// without changing the MTU under living connections.
pub const RELAY_HEADER_BYTES: u32 = 40;

/// IPv6 asks for this much of every link (RFC 8200 section 5).
pub const MTU_MIN: u32 = 1280;

/// Keepalive towards peers that need it, in seconds (`wg(8)`: 25 suits most NATs).
pub const KEEPALIVE_SECONDS: u16 = 25;
