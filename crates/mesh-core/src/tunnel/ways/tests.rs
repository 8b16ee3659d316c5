use super::*;

fn at(ms: u64) -> MonoTime {
    MonoTime::ZERO + Duration::from_millis(ms)
}

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an endpoint")
}

fn relay() -> Endpoint {
    Endpoint { carry: Some([7; 32]), ..Endpoint::direct(addr("203.0.113.1:1")) }
}

/// One tick; where probes go.
fn probes(ways: &mut Ways, ms: u64, direct: Option<&str>, relays: &[Endpoint]) -> Vec<Endpoint> {
    let (mut out, mut drawn) = (Vec::new(), ms << 16);
    let direct = direct.map(|text| Endpoint::direct(addr(text)));
    let around = Around { direct, candidates: &[], relays };
    let token = || {
        drawn += 1;
        drawn
    };
    ways.tick(at(ms), &around, &mut ProbeLimiter::default(), token, &mut out);
    let to = out.iter().filter_map(|ask| match ask {
        Ask::Probe { to, .. } => Some(*to),
        Ask::CallMeNow { .. } => None,
    });
    to.collect()
}

#[test]
fn a_peer_that_invites_in_a_row_makes_us_probe_what_it_names_once_a_second() {
    let mut ways = Ways::default();
    let mut asked = 0;
    for call in 0..2_000_u64 {
        let named = (0..16).map(|i| SocketAddr::from(([198, 51, (call % 250) as u8, i], 1)));
        ways.told(at(call), named, Nat::default());
        asked += probes(&mut ways, call, None, &[]).len();
    }
    assert_eq!(asked, 2 * 16, "two seconds");
}

#[test]
fn one_tick_draws_no_more_tokens_than_there_are() {
    let addresses = |net: u8| (0..16).map(move |i| SocketAddr::from(([198, 51, net, i], 1)));
    let candidates: Vec<_> = addresses(1).collect();
    let relays: Vec<_> = (0..RELAYS_MAX as u8)
        .map(|i| Endpoint { addr: SocketAddr::from(([203, 0, 113, i], 1)), ..relay() })
        .collect();
    let mut ways = Ways::default();
    ways.told(at(0), addresses(2), Nat::default());
    let direct = Some(Endpoint::direct(addr("192.0.2.1:1")));
    let around = Around { direct, candidates: &candidates, relays: &relays };
    let (mut out, mut drawn) = (Vec::new(), 0);
    let token = || {
        drawn += 1;
        drawn
    };
    ways.tick(at(0), &around, &mut ProbeLimiter::default(), token, &mut out);
    assert!(out.len() > 16 + 16 + RELAYS_MAX, "everything was asked: {}", out.len());
    assert!(drawn as usize <= TOKENS_MAX, "{drawn}");
}

#[test]
fn an_answer_counts_only_from_where_its_probe_went() {
    let mut ways = Ways::default();
    ways.told(at(0), [addr("192.0.2.1:1")].into_iter(), Nat::default());
    let to = probes(&mut ways, 0, None, &[relay()]);
    assert!(to.contains(&Endpoint::direct(addr("192.0.2.1:1"))));
    let around = Around { direct: None, candidates: &[], relays: &[relay()] };
    let tokens: Vec<u64> = ways.asked.iter().map(|asked| asked.token).collect();
    for token in tokens {
        assert_eq!(ways.answered(at(10), token, addr("192.0.2.9:1"), false), None);
        assert_eq!(ways.answered(at(10), token, addr("192.0.2.1:1"), true), None);
        assert_eq!(ways.answered(at(10), token + 1_000, addr("192.0.2.1:1"), false), None);
    }
    assert_eq!(ways.way(at(11), &around), Some(relay()));
}

#[test]
fn a_punched_way_is_believed_for_fifteen_seconds_and_a_published_one_for_a_session() {
    let direct = Endpoint::direct(addr("192.0.2.1:1"));
    for (candidates, seconds) in [(vec![], 15), (vec![direct.addr], 180)] {
        let mut ways = Ways::default();
        ways.heard(at(0), direct.addr, false);
        let around = Around { direct: Some(direct), candidates: &candidates, relays: &[relay()] };
        let end = seconds * 1_000;
        assert_eq!(ways.way(at(end - 1), &around), Some(direct));
        assert_eq!(ways.way(at(end), &around), Some(relay()));
        let alone = Around { relays: &[], ..around };
        assert_eq!(ways.way(at(end), &alone), Some(direct), "there is no other");
    }
}

#[test]
fn a_relay_that_says_it_leaves_is_not_taken_up_again_for_carrying_on_meanwhile() {
    let other = Endpoint { addr: addr("203.0.113.2:1"), ..relay() };
    let relays = [relay(), other];
    let around = Around { direct: None, candidates: &[], relays: &relays };
    let mut ways = Ways::default();
    ways.used(at(0));
    let asked = probes(&mut ways, 0, None, &relays);
    assert!(asked.contains(&relay()) && asked.contains(&other), "{asked:?}");
    ways.avoid(at(1), relay().addr);
    for ask in ways.asked.clone() {
        ways.answered(at(2), ask.token, ask.to.addr, true);
    }
    ways.heard(at(3), relay().addr, true);
    assert_eq!(ways.way(at(4), &around), Some(other));
    assert!(ways.again_at.is_none());
}

#[test]
fn a_way_on_which_much_is_lost_is_asked_more_often_before_it_is_given_up() {
    // Probes over a way that carries no more, until it is lost, after each `nth` before was answered.
    let asked_before_it_was_lost = |nth: usize| {
        let (mut ways, mut asked) = (Ways::default(), 0);
        for ms in (0..60_000).step_by(10) {
            ways.used(at(ms));
            asked += probes(&mut ways, ms, None, &[relay()]).len();
            let newest = ways.asked.back().filter(|it| it.at == at(ms)).map(|it| it.token);
            if let Some(token) = newest.filter(|_| asked.is_multiple_of(nth)) {
                ways.answered(at(ms), token, relay().addr, true);
            }
        }
        let mut asked = 0;
        for ms in (60_000..70_000).step_by(10) {
            ways.used(at(ms));
            asked += probes(&mut ways, ms, None, &[relay()]).len();
            if ways.avoid.is_some() {
                return asked;
            }
        }
        panic!("it is never lost");
    };
    assert_eq!([1, 2].map(asked_before_it_was_lost), [4, 9]);
}
