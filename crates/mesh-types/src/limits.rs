//! Every bound of the project, each with the reason for its number.

use std::time::Duration;

/// Longest node name (DNS subdomain, RFC 1123; Kubernetes' own bound).
pub const NAME_BYTES_MAX: usize = 253;

/// Candidates believed of one node. Cloud nodes have one to four addresses per family; more than
/// this is a mistake or an attempt to make us an amplifier.
pub const CANDIDATES_PER_NODE_MAX: usize = 16;

/// Longest `endpoints` annotation read; 16 bracketed IPv6 endpoints with separators fit eight times.
pub const ENDPOINTS_ANNOTATION_BYTES_MAX: usize = 8 * 1024;

/// Pod CIDRs of one node. Kubernetes allows two (one per family); the roster may split further.
pub const POD_CIDRS_PER_NODE_MAX: usize = 16;

/// Shortest pod CIDR believed of one node, per family. Kubernetes' defaults are /24 and /64; a /16 is
/// 65,536 pods on one node, a /48 the smallest site assignment (RFC 6177).
pub const POD_CIDR_LENGTH_MIN_V4: u8 = 16;
pub const POD_CIDR_LENGTH_MIN_V6: u8 = 48;

/// Longest pod CIDR: room for the network, the node's own address and a pod.
pub const POD_CIDR_LENGTH_MAX_V4: u8 = 30;
pub const POD_CIDR_LENGTH_MAX_V6: u8 = 126;

/// Longest site name: a label value has 63 characters, a roster may say a little more.
pub const SITE_BYTES_MAX: usize = 253;

/// Characters of foreign text shown in a message: enough to recognise it, not enough to flood a log.
pub const SHOWN_CHARS_MAX: usize = 64;

/// Cluster prefixes. One per family is usual; migrations have a second pair.
pub const CLUSTER_PREFIXES_MAX: usize = 16;

/// Nodes in one mesh. Kubernetes' own stated maximum is 5,000; memory per idle peer is a few KiB.
pub const NODES_MAX: usize = 8_192;

/// Largest file of ours we read back (key, roster, node file): a roster of `NODES_MAX` nodes fits.
pub const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Largest CNI configuration accepted on stdin; runtimes send a few KiB.
pub const CNI_STDIN_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Engines of one peer: (own keys: current and next) x (peer keys: current and next) x (process
/// generations: this one and its predecessor during a hand-over).
pub const ENGINES_PER_PEER_MAX: usize = 8;

/// Packets kept for a peer while its first handshake runs. The kernel keeps 128 (`MAX_STAGED_PACKETS`
/// in drivers/net/wireguard/device.h); super-packets count once.
pub const STAGED_PACKETS_PER_PEER_MAX: usize = 128;

/// Bytes of them: eight super-packets, and more than twice what 128 packets of an MTU take. Whose peers do not answer needs
/// tens of them to fill [`STAGED_BYTES_MAX`].
pub const STAGED_BYTES_PER_PEER_MAX: usize = 512 * 1024;

/// Bytes kept for all peers together while handshakes run: a thousand dead peers must not hold
/// more than this. One 64 KiB super-packet for each of 256 peers. Beyond it whoever holds most gives up its oldest.
pub const STAGED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Handshake messages accepted from one source (IPv4 address or IPv6 /64) per second, as the kernel
/// (`PACKETS_PER_SECOND` in drivers/net/wireguard/ratelimiter.c).
pub const HANDSHAKES_PER_SOURCE_PER_SECOND: u32 = 20;

/// Burst of handshake messages from one source (`PACKETS_BURSTABLE`, same file).
pub const HANDSHAKES_PER_SOURCE_BURST: u32 = 5;

/// Sources the limiter remembers; beyond it the oldest are forgotten. The kernel bounds its table at
/// 8192 to 16384 entries by memory.
pub const HANDSHAKE_SOURCES_MAX: usize = 8_192;

/// Handshake messages handled per second over all sources before cookies are asked for. One costs
/// about 100 us (two to four X25519 operations), so this is a fifth of a core.
pub const HANDSHAKES_PER_SECOND_BEFORE_COOKIES: u32 = 2_000;

/// Of these, those that lead nowhere, as they are of nobody known, garbled or recorded: more than so many in a second are a
/// flood, whatever their number, and take a hundredth of a core.
pub const FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES: u32 = 100;

/// Responses a second that do not verify though an initiation waits under their index, before a cookie is asked for: in the name
/// of addresses that configuration names, and of all others. Each takes two X25519 operations, about 100 us: together a
/// twentieth of a core.
pub const FORGED_RESPONSES_PER_SECOND: u32 = 200;

/// Cookie replies a second over all sources. One costs a few microseconds, so this is some percent of a core; and sources may
/// be forged: 1.3 MB a second is what we can be made to send to somebody who asked for nothing. Ten times the handshakes
/// answered, so that of true initiators under a flood of that size all are asked.
pub const COOKIES_PER_SECOND: u32 = 10 * HANDSHAKES_PER_SECOND_BEFORE_COOKIES;

/// Burst of cookie replies: those of 50 ms.
pub const COOKIES_BURST: u32 = COOKIES_PER_SECOND / 20;

/// Keys one `keyrelay` serves: two meshes of `NODES_MAX` nodes. Each takes about 14 KiB from its first handshake on (144 MiB for
/// 10,000 of them, docs/performance.md; so 232 MiB), 11 KiB of them its engine, which is kept, since it remembers the last
/// initiation. One that has made 192 sessions is replaced and lives for 180 s more beside the new one: 411 MiB if all are at once.
pub const RELAY_CLIENTS_MAX: usize = 2 * NODES_MAX;

/// Rosters one `keyrelay` serves: a file and a pool of bandwidth each.
pub const RELAY_ROSTERS_MAX: usize = 64;

/// Locks the relay's table of addresses is divided into, so that threads seldom wait for each other: four for each of
/// `SHARDS_MAX`.
pub const RELAY_ADDRESS_STRIPES: usize = 4 * SHARDS_MAX;

/// Threads of a relay and messages one of them receives in a call. Its datagrams come from many clients, so that the
/// kernel merges few of them; buffers are 64 KiB each, so 2 MiB for a thread.
pub const RELAY_THREADS_MAX: usize = SHARDS_MAX;
pub const RELAY_RECEIVE_MESSAGES: usize = 32;

/// Bytes a relay carries from, and to, one client in a second: 1 Gbit/s. More than most uplinks; whoever has a faster one says so.
pub const RELAY_CLIENT_BYTES_PER_SECOND: u64 = 125_000_000;

/// Bytes it carries for one roster in a second: 10 Gbit/s.
pub const RELAY_ROSTER_BYTES_PER_SECOND: u64 = 1_250_000_000;

/// What may come at once of a second's bytes, and at least: four of the kernel's bursts of 64 KiB.
pub const RELAY_BURST: Duration = Duration::from_millis(100);
pub const RELAY_BURST_BYTES_MIN: u64 = 4 * GSO_BYTES_MAX as u64;

/// Carried handshake messages of one client, in bytes per second: they do not wait for its data. A node begins about 3,200
/// handshakes in a second (`INITIATIONS_PER_TURN`), 188 bytes each, and answers as many.
pub const RELAY_HANDSHAKE_BYTES_PER_SECOND: u64 = 1_000_000;

/// Longest carried WireGuard message: what fits into a UDP datagram with the header before it, less 467 bytes for
/// headers to come.
pub const RELAY_MESSAGE_BYTES_MAX: usize = 65_000;

/// How often one sender is told that a receiver is not registered.
pub const RELAY_NOT_HERE_PAUSE: Duration = Duration::from_secs(1);

/// How often a member that has no session may be believed an initiation older than its last (its clock went back): each
/// makes a new engine.
pub const RELAY_OLD_INITIATION_PAUSE: Duration = Duration::from_secs(5);

/// Connections to a relay where UDP is blocked. Each takes a file descriptor, of which a process has 1,024 unless told
/// otherwise, and at most 300 KiB (queue, frame, TLS).
pub const RELAY_STREAMS_MAX: usize = 512;

/// Of them without a member behind them yet, over all and of one IPv4 address or IPv6 /64: a handful of nodes behind one
/// router begin at a time.
pub const RELAY_STREAMS_HALF_OPEN_MAX: usize = 128;
pub const RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX: usize = 8;

/// Bytes waiting to be written to one connection: a tenth of a second at 10 Mbit/s. More is delay and no help.
pub const RELAY_STREAM_QUEUE_BYTES: usize = 128 * 1024;

/// Relays a node reaches over TLS at a time: one in use and one kept warm.
pub const RELAYS_OVER_TLS_MAX: usize = 2;

/// Bytes waiting to be written to a node's connection to a relay, and as many that the kernel holds unsent: a tenth of a second
/// at 10 Mbit/s each.
pub const RELAY_LINK_QUEUE_BYTES: usize = 128 * 1024;

/// What the data plane may tell of relays before control has looked: a question and an answer of each a second, for minutes.
pub const RELAY_NOTES_MAX: usize = 1_024;

/// Members that one thread tells of the relay's end in one turn: a message costs about 2 us.
pub const RELAY_LEAVING_PER_TURN: usize = 256;

/// Relays a node registers at: the nearest, one kept warm, and as many again while addresses change.
pub const RELAYS_MAX: usize = 4;

/// Addresses and names of one relay: of each IP family the one outside, and that of its pod.
pub const RELAY_PLACES_MAX: usize = 4;

/// Longest packet with which a node asks a relay what arrives: what Ethernet's 1500 bytes leave behind IPv4, UDP and WireGuard.
pub const RELAY_SIZE_PACKET_BYTES_MAX: usize = 1_500 - 28 - 32;

/// Control messages looked at of one received burst: a probe and its answer over every way at once.
pub const FRAMES_MAX: usize = 64;

/// Allowed prefixes over all peers.
pub const ALLOWED_IPS_MAX: usize = 262_144;

/// Asked for each of the two buffers of a data plane's UDP socket, of which the kernel takes the double (socket(7)): datagrams wait
/// there while other things are done, and the windows of several TCP streams that grow until one is lost. With a fourth of it
/// four streams of cubic lost packets all the time.
pub const UDP_SOCKET_BUFFER_BYTES: usize = 16 * 1024 * 1024;

/// UDP payload of one GSO send: 65,535 less IPv4 and UDP headers (udp(7)).
pub const GSO_BYTES_MAX: usize = 65_507;

/// Datagrams in one GSO send; kernels before 6.9 stop at 64 (`UDP_MAX_SEGMENTS`).
pub const GSO_SEGMENTS_MAX: usize = 64;

/// Bytes read from the TUN before the socket is looked at again: bounds the wait of a small packet
/// behind a bulk flow (measured: 128 to 256 KiB cost no throughput).
pub const TUN_DRAIN_BYTES: usize = 256 * 1024;

/// TUN queues each shard reads in turn, so that sparse flows do not wait behind bulk: seven of eight have another queue
/// than one bulk flow has, and waiting for so many costs about 1 us in a turn.
pub const TUN_QUEUES_PER_SHARD: usize = 8;

/// Bytes and packets read from one of them before the next is looked at: a super-packet, or what takes as long.
pub const TUN_QUEUE_BYTES: usize = 64 * 1024;
pub const TUN_QUEUE_READS: usize = 32;

/// Packets read from the TUN before the socket is looked at again: small ones fill two GSO sends and take
/// about 200 us, where 256 KiB of them would take 6 ms.
pub const TUN_DRAIN_READS: usize = 128;

/// Bytes a packet or datagram costs of [`TUN_DRAIN_BYTES`] and [`UDP_DRAIN_BYTES`] at least: a pod chooses the segments of its
/// super-packets, and 256 KiB in segments of 48 bytes take 20 times as long as in such of an MTU.
pub const PACKET_COST_BYTES: usize = 1024;

/// Buffers of one receive call, where the kernel merges: a bulk flow fills them.
pub const UDP_DRAIN_BUFFERS: usize = 4;

/// Bytes received before the TUN is looked at again, or [`UDP_RECV_MESSAGES_MAX`] messages. Datagrams that are not merged (many
/// peers, handshakes, a flood of strangers) come four to a call, and must not have a smaller share than what pods send in
/// a turn.
pub const UDP_DRAIN_BYTES: usize = TUN_DRAIN_BYTES;

/// Inner packets one TUN read may stand for: 64 KiB at Linux' smallest segment, of 48 bytes (`TCP_MIN_SND_MSS`) less TCP options,
/// which take 12 where timestamps are used and 40 at most (`TCP_MIN_GSO_SIZE`, 8). They take some milliseconds, and end the turn
/// (`PACKET_COST_BYTES`). A crafted segment size of 1 must not become 65,000 datagrams.
pub const SEGMENTS_PER_SUPER_PACKET_MAX: usize = 64 * 1024 / 8;

/// Packets the coalescer holds before it is emptied into the TUN: `UDP_DRAIN_BUFFERS` GRO buffers of 128
/// datagrams. One frame of so many pieces stays below writev's 1,024 vectors (`UIO_MAXIOV`).
pub const COALESCE_PACKETS_MAX: usize = 512;

/// Connections the coalescer can append to at one time. The table is searched in order; a burst of
/// 64 KiB seldom holds more, and a connection pushed out only loses merging.
pub const COALESCE_FLOWS_MAX: usize = 16;

/// Cluster events between their source and the reconciler. A burst beyond it waits in the source, whose
/// own back-pressure is the API server's watch window.
pub const CLUSTER_EVENTS_MAX: usize = 256;

/// Messages taken by one `recvmmsg`: without GRO one per datagram, as many as a GSO send holds; each has a
/// 64 KiB buffer, so this bounds a socket at 4 MiB.
pub const UDP_RECV_MESSAGES_MAX: usize = 64;

/// Destinations remembered as refusing segmented sends; beyond it the next refusal costs one failed system
/// call per send again. An eighth of the largest mesh behind odd paths at once is a fault elsewhere.
pub const GSO_REFUSED_DESTINATIONS_MAX: usize = 1_024;

/// Entries of the pods' source filter from which on a new pod looks for those without a link. A node of 250 pods (kubelets
/// take 110 unless told otherwise) has 500; a daemon keeps it at that.
pub const SOURCES_UNPRUNED_MAX: usize = 2_048;

/// "Host unreachable" a second and at once, from one shard: programs and pods hear why within a try or two, and a scan of the
/// mesh's prefixes from inside is no load. The kernel's own bound for all ICMP errors is 1,000 a second (`icmp_msgs_per_sec`).
pub const UNREACHABLES_PER_SECOND: u32 = 100;
pub const UNREACHABLES_BURST: u32 = 50;

/// Datagrams of tunnels remembered while their fragments come from the device: those in its queues at one time. Of what is
/// forgotten, fragments go round once more.
pub const OWN_FRAGMENTS_MAX: usize = 64;

/// What a tunnel's datagram that a device carries inside another loses of its hop limit, and from which it begins at most. So
/// seven tunnels inside one another work, and a loop of them ends after as many turns. Two, which is what people build, leave
/// 56: no way through the Internet is so long.
pub const LAYER_HOPS: u8 = 8;
pub const LAYERS_BEGIN_AT: u8 = 64;

/// Addresses shared by peers of several shards of which one socket takes everything: `keyrelay`s and endpoints of networks behind
/// one address. Each costs up to nine instructions for every datagram; what comes from more may be overtaken.
pub const GATHERED_ADDRESSES_MAX: usize = 16;

/// Links of ours the kernel watch knows by index: pods (a kubelet takes a few hundred) and the TUN. What befalls the
/// addresses of more is seen at the next slow turn.
pub const WATCH_LINKS_MAX: usize = 8_192;

/// Longest network interface name (`IFNAMSIZ` less the terminating zero).
pub const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// Askers for figures of the data plane at one time: status, metrics and readiness, some of each.
pub const SNAPSHOT_REQUESTS_MAX: usize = 16;

/// Seconds a receiver index stays unused after its peer or engine is gone: nobody else may get it
/// while the other side could still send to it (`REJECT_AFTER_TIME`, whitepaper section 6.1).
pub const INDEX_QUARANTINE_SECONDS: u64 = 180;

/// Indexes in quarantine at most: every engine of every peer replaced once within it.
pub const INDEX_QUARANTINE_MAX: usize = NODES_MAX * ENGINES_PER_PEER_MAX;

/// Initiations handled per peer and second (`INITIATIONS_PER_SECOND`, drivers/net/wireguard/messages.h).
pub const HANDSHAKES_PER_PEER_PER_SECOND: u32 = 50;

/// Copies of an initiation that are no flood: who begins sends it to every candidate, and one comes first.
pub const INITIATION_COPIES_MAX: usize = CANDIDATES_PER_NODE_MAX;

/// Time within which known candidates are tried again while packets come from an address that is
/// none of them. Less than 15 s, so that a peer captured on the way is back within 15 s.
pub const PROBE_INTERVAL_SECONDS: u64 = 10;

/// Destinations of initiations remembered: 3,200 handshakes begin in a second (`INITIATIONS_PER_TURN`), each with
/// every candidate of a node.
pub const PROBE_TARGETS_MAX: usize = 65_536;

/// Peers whose timers run in one turn: an initiation costs about 100 us, packets wait no longer than 6 ms.
pub const PEER_TIMERS_PER_TURN: usize = 64;

/// Handshakes `initiate_all` begins in one turn, and the pause between turns: about 3,000 per second, less
/// than the cost of one core, and 8,192 peers in 3 s.
pub const INITIATIONS_PER_TURN: usize = 32;
pub const INITIATIONS_PAUSE_MS: u64 = 10;

/// Sealed datagrams waiting to be sent: what is left of the reads before, and one super-packet of smallest segments, over IPv6
/// and to a relay (1.5 MiB). Memory that no such packet came to use is none.
pub const TRANSMIT_ARENA_BYTES: usize = 1_792 * 1024;

/// Where in it an open batch may begin when all others have left and the TUN is read on: a send is moved after twice its length
/// has left, and a bulk flow goes through no more memory than a processor has at hand.
pub const TRANSMIT_BEGIN_MAX: usize = 160 * 1024;

/// Decrypted packets waiting for the TUN: `UDP_DRAIN_BUFFERS` GRO buffers.
pub const RECEIVE_ARENA_BYTES: usize = UDP_DRAIN_BUFFERS * 64 * 1024;

/// Events control has not collected; one per peer.
pub const EVENTS_MAX: usize = NODES_MAX;

/// Addresses `meshd pod-check` asks: a check of a thousand nodes in both families, and pods of an earlier one.
pub const POD_CHECK_ADDRESSES_MAX: usize = 4096;

/// Questions `meshd ping` asks of each address: a measure, not a load.
pub const PING_COUNT_MAX: u8 = 20;

/// Longest line of a configuration request, without its end: as wireguard-go's scanner of lines takes them. One that makes sense
/// takes a hundred.
pub const UAPI_LINE_BYTES_MAX: usize = 64 * 1024 - 1;

/// Lines of one request: every peer with everything that can be said of it, and all allowed prefixes.
pub const UAPI_LINES_MAX: usize = 8 * NODES_MAX + ALLOWED_IPS_MAX + 16;

/// Connections to a configuration socket at one time: root's own tools, which ask and leave. Each takes a file
/// descriptor, of which a process has 1,024 unless told otherwise.
pub const UAPI_CONNECTIONS_MAX: usize = 256;

/// Threads the data plane may be spread over. Every two have rings between them, so memory and looks into them grow with
/// the square; sealing saturates a 100 Gbit/s port before this.
pub const SHARDS_MAX: usize = 16;

/// Bytes gathered before they go to another shard, within one turn: half a super-packet in hand while the next is read
/// makes no difference to it, and few small packets cost one wake-up together. A parcel holds one more packet, so twice
/// this at most.
pub const HANDOVER_PARCEL_BYTES: usize = 64 * 1024;

/// Packets gathered likewise: what one drain of the TUN reads.
pub const HANDOVER_PARCEL_PACKETS: usize = TUN_DRAIN_READS;

/// Parcels on their way from one shard to another, of each kind: two drains of the TUN, so that its owner has enough to do
/// while the other reads. What is more waits in the kernel's queue.
pub const HANDOVER_PARCELS_MAX: usize = 8;

/// Initiations of other shards' peers between two looks of the shard: those of one receive call, 64 to each buffer.
pub const ADMITTED_MAX: usize = UDP_DRAIN_BUFFERS * GSO_SEGMENTS_MAX;
