//! A home whose router gives ports, by NAT-PMP, PCP or UPnP: what it gives is published, and reached from outside without a
//! relay.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::mesh::TIMEOUT;
use testbed::cluster::Cluster;
use testbed::lab::{HOME_ADDRESS_V4, Namespace, two_homes_plan};

/// The ports that routers hear NAT-PMP and PCP at, and searches of UPnP; and the one this router gives away.
const MAPPING_PORT: u16 = 5_351;
const SEARCH_PORT: u16 = 1_900;
const SEARCH_GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 255, 250);
const GIVEN: u16 = 40_123;

/// The home's side of the router, and the node and port that are asked for.
const INSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
const NODE_PORT: u16 = 15_190;

/// A thread that looks whether it is to end this often.
const TICK: Duration = Duration::from_millis(100);

/// Longest request that is read.
const REQUEST_BYTES_MAX: u64 = 64 * 1_024;

fn outside() -> Ipv4Addr {
    HOME_ADDRESS_V4.parse().expect("an address")
}

/// A router that maps one UDP port, for whoever asks in the one language it speaks.
struct Router {
    stop: Arc<AtomicBool>,
    mapped: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

/// The answer to a datagram, and whether a mapping was made or renewed.
type Answer = fn(&[u8], SocketAddr) -> Option<(Vec<u8>, bool)>;

impl Router {
    fn new() -> Self {
        Self { stop: Arc::default(), mapped: Arc::default(), threads: Vec::new() }
    }

    fn of_datagrams(at: &Namespace, answer: Answer) -> Self {
        let mut router = Self::new();
        let socket = at.run_in(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, MAPPING_PORT))?));
        router.answer(socket.expect("a socket on the router"), answer);
        router
    }

    fn of_upnp(at: &Namespace) -> Self {
        let mut router = Self::new();
        let socket = at.run_in(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SEARCH_PORT))?;
            socket.join_multicast_v4(&SEARCH_GROUP, &INSIDE)?;
            Ok(socket)
        });
        let pages = at.run_in(|| Ok(TcpListener::bind((INSIDE, SEARCH_PORT))?));
        router.answer(socket.expect("a socket on the router"), upnp_search);
        router.serve(pages.expect("a listener on the router"));
        router
    }

    fn answer(&mut self, socket: UdpSocket, answer: Answer) {
        socket.set_read_timeout(Some(TICK)).expect("a timeout");
        let (stop, mapped) = (Arc::clone(&self.stop), Arc::clone(&self.mapped));
        self.threads.push(std::thread::spawn(move || {
            let mut buffer = [0; 1_100];
            while !stop.load(Ordering::Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
                let Some((answer, maps)) = answer(&buffer[..len], from) else { continue };
                mapped.fetch_add(maps.into(), Ordering::Relaxed);
                socket.send_to(&answer, from).expect("answered");
            }
        }));
    }

    fn serve(&mut self, listener: TcpListener) {
        listener.set_nonblocking(true).expect("it does not wait");
        let (stop, mapped) = (Arc::clone(&self.stop), Arc::clone(&self.mapped));
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(TICK / 10);
                    continue;
                };
                // Who asks may have gone.
                mapped
                    .fetch_add(upnp_page(&stream).is_ok_and(|maps| maps).into(), Ordering::Relaxed);
            }
        }));
    }

    /// How often a mapping was made or renewed.
    fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("it ended well");
        }
        self.mapped.load(Ordering::Relaxed)
    }
}

/// RFC 6886 sections 3.2 and 3.3; another version (PCP) is refused as section 3.5 has it.
fn nat_pmp(request: &[u8], _: SocketAddr) -> Option<(Vec<u8>, bool)> {
    const OK: [u8; 2] = [0, 0];
    let epoch = 7_u32.to_be_bytes();
    match request {
        [0, 0] => Some(([&[0, 128], &OK[..], &epoch, &outside().octets()].concat(), false)),
        [0, 1, _, _, inside @ ..] if inside.len() == 8 => {
            let (port, lifetime) = (&inside[..2], &inside[4..8]);
            let given = GIVEN.to_be_bytes();
            let answer = [&[0, 129], &OK[..], &epoch, port, &given, lifetime].concat();
            Some((answer, lifetime != [0; 4]))
        }
        [0, ..] => None,
        _ => Some(([&[0, 128, 0, 1], &epoch[..]].concat(), false)),
    }
}

/// RFC 6887: ANNOUNCE (section 14.1) and MAP (section 11), in version 2 alone.
///
/// ```text
/// request   2 | opcode | 0 0    | lifetime | client's address, 16 bytes | MAP: nonce 12, protocol, 0 0 0, port, port, address 16
/// answer    2 | opcode | 0 code | lifetime | epoch | 12 zeros           | the same, with what was given
/// ```
fn pcp(request: &[u8], from: SocketAddr) -> Option<(Vec<u8>, bool)> {
    const UNSUPPORTED_VERSION: u8 = 1;
    const UNSUPPORTED_OPCODE: u8 = 4;
    const ADDRESS_MISMATCH: u8 = 12;
    let (version, opcode) = (*request.first()?, *request.get(1)?);
    let head = |code: u8, lifetime: &[u8]| {
        [&[2, 0x80 | opcode, 0, code][..], lifetime, &7_u32.to_be_bytes(), &[0; 12]].concat()
    };
    let refused = |code: u8| Some((head(code, &30_u32.to_be_bytes()), false));
    if version != 2 {
        return refused(UNSUPPORTED_VERSION);
    }
    let (lifetime, client, data) = (request.get(4..8)?, request.get(8..24)?, request.get(24..)?);
    let SocketAddr::V4(from) = from else { return None };
    if client != from.ip().to_ipv6_mapped().octets() {
        return refused(ADDRESS_MISMATCH);
    }
    match opcode {
        0 => Some((head(0, &[0; 4]), false)),
        1 => {
            let (given, address) = (GIVEN.to_be_bytes(), outside().to_ipv6_mapped().octets());
            let answer = [&head(0, lifetime)[..], data.get(..18)?, &given, &address].concat();
            Some((answer, lifetime != [0; 4]))
        }
        _ => refused(UNSUPPORTED_OPCODE),
    }
}

/// Where the router describes itself (UPnP Device Architecture 1.0 section 1.2.3).
fn upnp_search(request: &[u8], _: SocketAddr) -> Option<(Vec<u8>, bool)> {
    const GATEWAY: &str = "urn:schemas-upnp-org:device:InternetGatewayDevice:1";
    let text = std::str::from_utf8(request).ok()?;
    (text.starts_with("M-SEARCH * HTTP/1.1\r\n") && text.contains(GATEWAY)).then(|| {
        let answer = format!(
            "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nEXT:\r\nLOCATION: http://{INSIDE}:{SEARCH_PORT}/root.xml\r\n\
             SERVER: testbed UPnP/1.0\r\nST: {GATEWAY}\r\nUSN: uuid:7::{GATEWAY}\r\n\r\n"
        );
        (answer.into_bytes(), false)
    })
}

const CONNECTION: &str = "urn:schemas-upnp-org:service:WANIPConnection:2";

/// Serves one request; whether it made a mapping.
fn upnp_page(mut stream: &TcpStream) -> std::io::Result<bool> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut reader = BufReader::new(stream.try_clone()?.take(REQUEST_BYTES_MAX));
    let (mut head, mut body_bytes) = (String::new(), 0);
    loop {
        let before = head.len();
        reader.read_line(&mut head)?;
        let line = head[before..].trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(length) = line.strip_prefix("content-length:") {
            body_bytes = length.trim().parse().unwrap_or(0);
        }
    }
    let mut body = Vec::new();
    reader.take(body_bytes).read_to_end(&mut body)?;
    let asked = head.split("\r\n").next().unwrap_or_default();
    let (status, page, maps) = upnp_answer(asked, &String::from_utf8_lossy(&body));
    let length = page.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{page}"
    )?;
    Ok(maps)
}

/// WANIPConnection:2, as far as a port is asked for.
fn upnp_answer(asked: &str, body: &str) -> (&'static str, String, bool) {
    let done = |action: &str, what: &str| {
        let page = format!(
            r#"<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>
            <u:{action}Response xmlns:u="{CONNECTION}">{what}</u:{action}Response></s:Body></s:Envelope>"#
        );
        ("200 OK", page)
    };
    let wanted = [
        format!("<NewInternalClient>{NODE}</NewInternalClient>"),
        format!("<NewInternalPort>{NODE_PORT}</NewInternalPort>"),
        "<NewProtocol>UDP</NewProtocol>".to_owned(),
    ];
    let asks_for_port = body.contains("AddAnyPortMapping");
    let (status, page) = match asked.split(' ').nth(1) {
        Some("/root.xml") => ("200 OK", upnp_root()),
        Some("/actions.xml") => ("200 OK", upnp_actions()),
        Some("/control") if body.contains("GetExternalIPAddress") => {
            let address = format!("<NewExternalIPAddress>{}</NewExternalIPAddress>", outside());
            done("GetExternalIPAddress", &address)
        }
        Some("/control") if asks_for_port && wanted.iter().all(|line| body.contains(line)) => {
            let given = format!("<NewReservedPort>{GIVEN}</NewReservedPort>");
            let (status, page) = done("AddAnyPortMapping", &given);
            return (status, page, true);
        }
        Some("/control") if body.contains("DeletePortMapping") => done("DeletePortMapping", ""),
        _ => ("404 Not Found", String::new()),
    };
    (status, page, false)
}

fn upnp_root() -> String {
    format!(
        r#"<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><device><serviceList><service>
        <serviceType>{CONNECTION}</serviceType><SCPDURL>/actions.xml</SCPDURL><controlURL>/control</controlURL>
        </service></serviceList></device></root>"#
    )
}

fn upnp_actions() -> String {
    let action = |name: &str, arguments: &[&str]| {
        let of = |name: &&str| {
            format!("<argument><name>{name}</name><direction>in</direction></argument>")
        };
        let arguments: String = arguments.iter().map(of).collect();
        format!("<action><name>{name}</name><argumentList>{arguments}</argumentList></action>")
    };
    let external = ["NewRemoteHost", "NewExternalPort", "NewProtocol"];
    let internal = [
        "NewInternalPort",
        "NewInternalClient",
        "NewEnabled",
        "NewPortMappingDescription",
        "NewLeaseDuration",
    ];
    let add = action("AddAnyPortMapping", &[&external[..], &internal].concat());
    let delete = action("DeletePortMapping", &external);
    format!(
        r#"<?xml version="1.0"?><scpd xmlns="urn:schemas-upnp-org:service-1-0"><actionList>{add}{delete}</actionList></scpd>"#
    )
}

/// A home behind such a router, and one whose NAT is strict: they meet at the port that is given.
fn is_reached_where_it_was_given_a_port(what: &str, start: impl FnOnce(&Namespace) -> Router) {
    if !common::root() {
        return;
    }
    let plan: Vec<_> = two_homes_plan().into_iter().filter(|node| !node.reachable).collect();
    let mut cluster =
        Cluster::build_in(&common::lab_name(what), common::programs(), &plan).expect("built");
    let strict = cluster.net.second_home.as_ref().expect("a second home");
    strict
        .run_with_input(
            &["nft", "-f", "-"],
            "flush chain ip nat postrouting\n\
             add rule ip nat postrouting oifname wan masquerade fully-random\n",
        )
        .expect("a strict NAT");
    let home = &cluster.net.home;
    let rules = format!(
        "add chain ip nat prerouting {{ type nat hook prerouting priority dstnat; }}\n\
         add rule ip nat prerouting iifname wan udp dport {GIVEN} dnat to {NODE}:{NODE_PORT}\n\
         insert rule inet filter forward ct status dnat accept\n"
    );
    home.run_with_input(&["nft", "-f", "-"], &rules).expect("what the router does with it");
    let router = start(home);
    cluster.flags = vec!["--port-mapping".to_owned()];
    cluster.start_every_meshd().expect("daemons");
    cluster.wait_node_files(TIMEOUT).expect("node files");
    let given = format!("{HOME_ADDRESS_V4}:{GIVEN}");
    let published = cluster.wait(TIMEOUT, || {
        let first = cluster.status("c1")?.endpoints.first().map(ToString::to_string);
        Ok(if first.as_ref() == Some(&given) { Ok(()) } else { Err(format!("{first:?}")) })
    });
    published.unwrap_or_else(|error| panic!("{error:#}\n{:?}", cluster.netcheck("c1")));
    cluster.wait_all_meshed(TIMEOUT).expect("a mesh, without a relay");
    let status = cluster.status("c1").expect("status");
    assert_eq!(status.endpoints[0].to_string(), given, "published first: {:?}", status.endpoints);
    let peer = cluster.status("d1").expect("status").peers[0].clone();
    assert_eq!(peer.endpoint.expect("an endpoint").to_string(), given, "{peer:?}");
    assert_eq!(cluster.netcheck("c1").expect("netcheck").port_mapping, given);
    let without = cluster.netcheck("d1").expect("netcheck").port_mapping;
    assert!(without.contains("given none"), "{without}");
    assert!(router.stop() >= 1);
    assert_eq!(cluster.logged_errors(), Vec::<String>::new());
    cluster.into_lab().down().expect("down");
}

#[test]
fn a_home_is_reached_at_the_port_it_was_given_by_nat_pmp_without_any_relay() {
    is_reached_where_it_was_given_a_port("natpmp", |home| Router::of_datagrams(home, nat_pmp));
}

#[test]
fn a_home_is_reached_at_the_port_it_was_given_by_pcp_without_any_relay() {
    is_reached_where_it_was_given_a_port("pcp", |home| Router::of_datagrams(home, pcp));
}

#[test]
fn a_home_is_reached_at_the_port_it_was_given_by_upnp_without_any_relay() {
    is_reached_where_it_was_given_a_port("upnp", Router::of_upnp);
}
