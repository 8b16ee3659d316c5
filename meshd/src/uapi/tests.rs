use std::time::Duration;

use ipnet::IpNet;
use mesh_types::key::PrivateKey;
use mesh_types::limits::{UAPI_LINE_BYTES_MAX, UAPI_LINES_MAX};
use proptest::prelude::*;

use super::Refusal;
use super::device::{Device, Figures, Live};
use super::line::{Line, PeerKey, known_key, parse};
use super::lines::Lines;
use super::server::{Request, request, skip_request};

fn zone(name: &str) -> Option<u32> {
    (name == "eth0").then_some(7)
}

/// Reads lines as a connection would.
fn lines(text: &str) -> Result<Vec<Line>, Refusal> {
    let mut in_peer = false;
    text.lines()
        .map(|text| {
            let line = parse(text.as_bytes(), in_peer, &zone)?;
            in_peer |= matches!(line, Line::PublicKey(_));
            Ok(line)
        })
        .collect()
}

fn set(device: &Device, text: &str) -> Result<Device, Refusal> {
    device.apply(&lines(text)?)
}

fn key(number: u8) -> String {
    format!("{number:02x}").repeat(32)
}

fn made(text: &str) -> Device {
    set(&Device::default(), text).expect("a good request")
}

fn shown(device: &Device) -> String {
    let text = device.print(&Live::default());
    let told = |line: &&str| {
        !["last_handshake", "tx_bytes", "rx_bytes", "protocol_version"]
            .iter()
            .any(|key| line.starts_with(key))
    };
    text.lines().filter(told).map(|line| format!("{line}\n")).collect()
}

#[test]
fn what_is_set_is_shown() {
    let secret = "c8".to_owned() + &"11".repeat(30) + "51";
    let text = format!(
        "private_key={secret}\nlisten_port=51820\nfwmark=4096\n\
         public_key={a}\npreshared_key={psk}\nendpoint=192.0.2.1:5\npersistent_keepalive_interval=25\n\
         allowed_ip=10.0.0.0/8\nallowed_ip=fd00::/64\n\
         public_key={b}\npreshared_key={none}\nendpoint=[fe80::1%7]:6\npersistent_keepalive_interval=0\n",
        a = key(9),
        b = key(2),
        psk = key(3),
        none = key(0),
    );
    assert_eq!(shown(&made(&text)), text);
}

#[test]
fn figures_are_shown_as_wg_reads_them() {
    let peer = key(9);
    let text = format!("listen_port=99\npublic_key={peer}\nendpoint=192.0.2.1:5\n");
    let device = made(&text);
    let figures = Figures {
        endpoint: Some("[2001:db8::1]:77".parse().expect("an endpoint")),
        last_handshake: Some(Duration::new(12, 34)),
        rx_bytes: 5,
        tx_bytes: 6,
    };
    let live = Live::from([(PeerKey([9; 32]), figures)]);
    let expected = format!(
        "listen_port=99\npublic_key={peer}\npreshared_key={}\nprotocol_version=1\n\
         endpoint=[2001:db8::1]:77\nlast_handshake_time_sec=12\nlast_handshake_time_nsec=34\n\
         tx_bytes=6\nrx_bytes=5\npersistent_keepalive_interval=0\n",
        key(0)
    );
    assert_eq!(*device.print(&live), expected);
}

#[test]
fn every_wrong_line_has_the_number_of_the_reference() {
    let device = [
        ("nonsense", -71),
        ("", -71),
        ("private_key", -71),
        ("bogus=1", -22),
        ("private_key=", -22),
        ("private_key=12", -22),
        ("listen_port=65536", -22),
        ("listen_port=+1", -22),
        ("listen_port=-1", -22),
        ("listen_port=", -22),
        ("fwmark=4294967296", -22),
        ("fwmark=0x1", -22),
        ("replace_peers=false", -22),
        ("allowed_ip=10.0.0.0/8", -22),
        ("public_key=zz", -22),
    ];
    for (text, errno) in device {
        let refusal = parse(text.as_bytes(), false, &zone).expect_err(text);
        assert_eq!(refusal.errno(), errno, "{text}");
    }
    let odd = format!("public_key={}g", &key(1)[1..]);
    let long = format!("preshared_key={}00", key(1));
    let peer = [
        "listen_port=1",
        "private_key=00",
        "remove=1",
        "update_only=yes",
        "replace_allowed_ips=",
        "endpoint=1.2.3.4",
        "endpoint=host:1",
        "endpoint=1.2.3.4:65536",
        "endpoint=[fe80::1%none]:1",
        "endpoint=[::1]",
        "persistent_keepalive_interval=65536",
        "persistent_keepalive_interval=off",
        "allowed_ip=10.0.0.1",
        "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.0.0.0/08",
        "allowed_ip=010.0.0.0/8",
        "allowed_ip=--10.0.0.0/8",
        "protocol_version=2",
        odd.as_str(),
        long.as_str(),
    ];
    for text in peer {
        assert_eq!(parse(text.as_bytes(), true, &zone).expect_err(text).errno(), -22, "{text}");
    }
    assert_eq!(parse(b"fwmark=\xff", false, &zone).expect_err("no number").errno(), -22);
    assert_eq!(parse(b"\xff", false, &zone).expect_err("no line").errno(), -71);
    assert_eq!(Refusal::NotPermitted.errno(), -1);
    assert_eq!(Refusal::InUse.errno(), -98);
    assert_eq!(Refusal::TooLong.errno(), -5);
}

#[test]
fn an_endpoint_may_name_its_interface_and_a_mapped_one_is_ipv4() {
    let endpoint = |text: &str| match parse(format!("endpoint={text}").as_bytes(), true, &zone) {
        Ok(Line::Endpoint(endpoint)) => endpoint.to_string(),
        other => format!("{other:?}"),
    };
    assert_eq!(endpoint("[fe80::1%eth0]:9"), "[fe80::1%7]:9");
    assert_eq!(endpoint("[::ffff:192.0.2.1]:9"), "192.0.2.1:9");
    assert_eq!(endpoint("[2001:db8::1]:9"), "[2001:db8::1]:9");
}

#[test]
fn an_allowed_ip_moves_to_who_was_given_it_last_and_goes_only_from_its_owner() {
    let (a, b) = (key(1), key(2));
    let device = made(&format!(
        "public_key={a}\nallowed_ip=10.0.0.1/8\nallowed_ip=10.1.0.0/16\npublic_key={b}\nallowed_ip=10.0.0.0/8\n"
    ));
    let owned = |device: &Device| shown(device).replace(&key(0), "0");
    assert!(owned(&device).contains(&format!("public_key={a}\npreshared_key=0\npersistent_keepalive_interval=0\nallowed_ip=10.1.0.0/16\npublic_key={b}")));
    let same = set(&device, &format!("public_key={a}\nallowed_ip=-10.0.0.0/8\n")).expect("good");
    assert_eq!(shown(&same), shown(&device), "it is not a's");
    let less = set(&device, &format!("public_key={b}\nallowed_ip=-10.0.0.0/8\n")).expect("good");
    assert!(!shown(&less).contains("10.0.0.0/8"));
    let bits = set(&device, &format!("public_key={b}\nallowed_ip=-10.9.9.9/8\n")).expect("good");
    assert_eq!(shown(&bits), shown(&less), "bits behind the prefix say nothing");
    let none = set(&device, &format!("public_key={a}\nreplace_allowed_ips=true\n")).expect("good");
    assert!(!shown(&none).contains("10.1.0.0/16") && shown(&none).contains("10.0.0.0/8"));
}

#[test]
fn peers_are_made_updated_and_removed_as_the_lines_say() {
    let (a, b, own) = (key(1), key(2), PrivateKey::from_bytes([7; 32]));
    let device = made(&format!("public_key={a}\n"));
    let unmade = set(&device, &format!("public_key={b}\nupdate_only=true\nallowed_ip=::/0\n"));
    assert_eq!(shown(&unmade.expect("good")), shown(&device));
    let updated = format!("public_key={a}\nupdate_only=true\npersistent_keepalive_interval=9\n");
    assert!(shown(&set(&device, &updated).expect("good")).contains("interval=9"));
    let gone = format!("public_key={a}\nremove=true\nallowed_ip=::/0\n");
    assert_eq!(shown(&set(&device, &gone).expect("good")), "");
    let again = set(&device, &format!("replace_peers=true\npublic_key={a}\n")).expect("good");
    let change = device.change_to(&again, &[]);
    assert_eq!(change.made_anew.len(), 1, "its session must go");
    // A device is no peer of its own, whichever came first.
    let hex = |bytes: &[u8; 32]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let (secret, public) = (hex(own.expose()), hex(wg_engine::public_key(&own).as_bytes()));
    for text in [
        format!("private_key={secret}\npublic_key={public}\nallowed_ip=::/0\n"),
        format!("public_key={public}\nallowed_ip=::/0\n"),
    ] {
        let device = set(&made(&text), &format!("private_key={secret}\n")).expect("good");
        assert_eq!(shown(&device), format!("private_key={secret}\n"));
    }
}

#[test]
fn a_key_of_low_order_is_kept_and_never_spoken_to() {
    let text = format!("private_key={}\npublic_key={}\nendpoint=127.0.0.1:1\n", key(8), key(0));
    let device = made(&text);
    assert!(device.contains(&PeerKey([0; 32])));
    assert_eq!(device.peer_configs(1_420), []);
    assert_eq!(device.endpoints().len(), 0);
}

#[test]
fn a_change_names_what_is_new_and_nothing_else() {
    let (a, b) = (key(9), key(2));
    let before = made(&format!(
        "listen_port=5\npublic_key={a}\nendpoint=192.0.2.1:1\npublic_key={b}\nendpoint=192.0.2.2:1\n"
    ));
    let asked = lines(&format!("fwmark=1\npublic_key={a}\nendpoint=192.0.2.1:1\n")).expect("good");
    let after = before.apply(&asked).expect("good");
    let change = before.change_to(&after, &asked);
    assert!(change.fwmark && change.identities && !change.port && !change.own_key);
    assert_eq!(change.made_anew, []);
    let keyed = lines(&format!("private_key={}\n", key(5))).expect("good");
    assert!(before.change_to(&before.apply(&keyed).expect("good"), &keyed).first_key);
    assert!(!change.first_key);
    // Named again, though it is the same: the peer may have roamed meanwhile.
    let endpoints: Vec<_> = change.endpoints.values().map(ToString::to_string).collect();
    assert_eq!(endpoints, ["192.0.2.1:1"]);
}

#[test]
fn the_key_of_a_line_is_named_only_if_it_is_one() {
    let peer = ["public_key", "remove", "preshared_key", "allowed_ip", "protocol_version"];
    for key in ["private_key", "listen_port", "fwmark", "replace_peers"].iter().chain(&peer) {
        assert_eq!(known_key(format!("{key}=x=y").as_bytes()), Some(*key));
    }
    for text in ["private_key", "c2VjcmV0=", "=", "", "fwmark =1"] {
        assert_eq!(known_key(text.as_bytes()), None, "{text}");
    }
}

async fn read(bytes: &[u8], writable: bool) -> Vec<Request> {
    let mut said = Lines::new(bytes);
    let mut all = Vec::new();
    loop {
        let next = request(&mut said, writable).await.expect("memory reads");
        let end = matches!(next, Request::End | Request::Nonsense);
        if matches!(next, Request::RefusedSet(..)) {
            skip_request(&mut said).await.expect("memory reads");
        }
        all.push(next);
        if end {
            return all;
        }
    }
}

fn told(requests: &[Request]) -> String {
    let word = |request: &Request| match request {
        Request::Get => "get".to_owned(),
        Request::Set(lines) => format!("set {}", lines.len()),
        Request::Refused(why) | Request::RefusedSet(why, _) => format!("{}", why.errno()),
        Request::Nonsense => "nonsense".to_owned(),
        Request::End => "end".to_owned(),
    };
    requests.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn requests_follow_each_other_on_one_connection() {
    let long = format!("set=1\nfwmark={}\nfwmark=1\n\nget=1\n\n", "1".repeat(UAPI_LINE_BYTES_MAX));
    let longer = "x".repeat(3 * UAPI_LINE_BYTES_MAX);
    let table: &[(&str, bool, &str)] = &[
        ("get=1\n\nset=1\nfwmark=1\n\nget=1\n\n", true, "get set 1 get end"),
        ("set=1\n\n", true, "set 0 end"),
        ("set=1\nfwmark=1\n", true, "set 1 end"),
        ("set=1\r\nfwmark=1\r\n\r\nget=1\r\n\r\n", true, "set 1 get end"),
        ("set=1\nfwmark=1\r\r\n\nget=1\n\n", true, "-22 get end"),
        ("set=1\nfwmark=1", true, "-71 end"),
        ("set=1\nbad\nfwmark=2\n\nget=1\n\n", true, "-71 get end"),
        (&long, true, "-5 get end"),
        ("get=1\nx\n\n", true, "-22 nonsense"),
        ("get=2\n\n", true, "nonsense"),
        ("\n\n", true, "nonsense"),
        ("GET / HTTP/1.1\n", true, "nonsense"),
        (&longer, true, "nonsense"),
        ("get=1", true, "nonsense"),
        ("get=1\n", true, "end"),
        ("set=1\nfwmark=1\n\nget=1\n\n", false, "-1 get end"),
        ("", true, "end"),
    ];
    for (text, writable, expected) in table {
        assert_eq!(&told(&read(text.as_bytes(), *writable).await), expected, "{text:.80}");
    }
    let many = format!("set=1\n{}\n", "fwmark=1\n".repeat(UAPI_LINES_MAX + 1));
    assert_eq!(told(&read(many.as_bytes(), true).await), "-5 end");
}

/// A line that makes sense, about one of few peers and prefixes.
fn sensible() -> impl Strategy<Value = String> {
    let prefix = (0u8..4, 7u8..=9).prop_map(|(high, len)| format!("{}.0.0.0/{len}", high << 6));
    prop_oneof![
        3 => (0u8..5).prop_map(|peer| format!("public_key={}", key(peer))),
        4 => prefix.clone().prop_map(|prefix| format!("allowed_ip={prefix}")),
        2 => prefix.prop_map(|prefix| format!("allowed_ip=-{prefix}")),
        1 => Just("remove=true".to_owned()),
        1 => Just("update_only=true".to_owned()),
        1 => Just("replace_allowed_ips=true".to_owned()),
        1 => (1u16..9).prop_map(|s| format!("persistent_keepalive_interval={s}")),
        1 => (1u16..9).prop_map(|port| format!("endpoint=192.0.2.1:{port}")),
        1 => (1u8..9).prop_map(|byte| format!("preshared_key={}", key(byte))),
    ]
}

/// What the device must equal: peers in a list, prefixes in a list, looked through.
#[derive(Default)]
struct Plain {
    peers: Vec<String>,
    prefixes: Vec<(IpNet, String)>,
    subject: Option<(String, bool)>,
}

impl Plain {
    fn line(&mut self, text: &str) {
        let (key, value) = text.split_once('=').expect("a line");
        if key == "public_key" {
            let made = !self.peers.iter().any(|peer| peer == value);
            if made {
                self.peers.push(value.to_owned());
            }
            self.subject = Some((value.to_owned(), made));
            return;
        }
        let Some((peer, made)) = self.subject.clone() else { return };
        match key {
            "remove" => self.remove(&peer),
            "update_only" if made => self.remove(&peer),
            "replace_allowed_ips" => self.prefixes.retain(|(_, owner)| *owner != peer),
            "allowed_ip" => {
                let net = |text: &str| text.parse::<IpNet>().expect("a prefix").trunc();
                match value.strip_prefix('-') {
                    Some(value) => {
                        self.prefixes.retain(|held| *held != (net(value), peer.clone()));
                    }
                    None if self.prefixes.contains(&(net(value), peer.clone())) => {}
                    None => {
                        self.prefixes.retain(|(held, _)| *held != net(value));
                        self.prefixes.push((net(value), peer));
                    }
                }
            }
            _ => {}
        }
    }

    fn remove(&mut self, peer: &str) {
        self.peers.retain(|held| held != peer);
        self.prefixes.retain(|(_, owner)| owner != peer);
        self.subject = None;
    }

    fn owned(&self) -> Vec<(String, Vec<String>)> {
        let of = |peer: &String| {
            let own = self.prefixes.iter().filter(|(_, owner)| owner == peer);
            (peer.clone(), own.map(|(prefix, _)| prefix.to_string()).collect())
        };
        self.peers.iter().map(of).collect()
    }
}

/// Peers and their prefixes, as shown.
fn owned(device: &Device) -> Vec<(String, Vec<String>)> {
    let mut peers: Vec<(String, Vec<String>)> = Vec::new();
    for line in device.print(&Live::default()).lines() {
        match line.split_once('=') {
            Some(("public_key", key)) => peers.push((key.to_owned(), Vec::new())),
            Some(("allowed_ip", prefix)) => {
                peers.last_mut().expect("a peer before its prefix").1.push(prefix.to_owned());
            }
            _ => {}
        }
    }
    peers
}

proptest! {
    #[test]
    fn any_bytes_are_a_line_or_a_refusal(bytes: Vec<u8>, in_peer: bool) {
        let _ = parse(&bytes, in_peer, &zone);
    }

    #[test]
    fn any_value_of_a_known_key_is_a_line_or_a_refusal(
        key in "(private_key|listen_port|fwmark|public_key|preshared_key|endpoint|allowed_ip|persistent_keepalive_interval)",
        value in "\\PC{0,70}",
        in_peer: bool,
    ) {
        let _ = parse(format!("{key}={value}").as_bytes(), in_peer, &zone);
    }

    #[test]
    fn any_stream_of_lines_ends_and_asks_for_bounded_things(text in "([a-z_]{0,12}=?[0-9a-f/.:-]{0,12}\n){0,30}") {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        for start in ["", "set=1\n", "get=1\n\n"] {
            let all = runtime.block_on(read(format!("{start}{text}").as_bytes(), true));
            prop_assert!(all.len() <= 32);
        }
    }

    #[test]
    fn a_device_does_what_a_plain_list_of_peers_would(
        requests in proptest::collection::vec(proptest::collection::vec(sensible(), 0..25), 1..6),
    ) {
        let (mut device, mut plain) = (Device::default(), Plain::default());
        for texts in requests {
            plain.subject = None;
            // Lines of a peer follow the peer's.
            let texts: Vec<_> = texts.into_iter().skip_while(|text| !text.starts_with("public")).collect();
            texts.iter().for_each(|text| plain.line(text));
            device = set(&device, &texts.join("\n")).expect("lines that make sense");
            prop_assert_eq!(owned(&device), plain.owned());
        }
        // What is shown is a request that makes the same device.
        prop_assert_eq!(shown(&made(&shown(&device))), shown(&device));
    }

    #[test]
    fn a_tunnel_gets_every_prefix_once(
        texts in proptest::collection::vec(sensible(), 0..40),
    ) {
        let texts: Vec<_> = texts.into_iter().skip_while(|text| !text.starts_with("public")).collect();
        let device = made(&format!("private_key={}\n{}", key(0x48), texts.join("\n")));
        let mut prefixes: Vec<_> = device.peer_configs(1_420).into_iter().flat_map(|peer| peer.allowed_ips).collect();
        let before = prefixes.len();
        prefixes.sort();
        prefixes.dedup();
        prop_assert_eq!(prefixes.len(), before);
    }
}
