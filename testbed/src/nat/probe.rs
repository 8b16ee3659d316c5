//! What a site does to UDP, measured from inside it by the method of RFC 5780.
//!
//! ```text
//! mapping (4.3)      one socket asks A1:P1, A2:P1, A2:P2: does it look the same to all, to both ports of A2, to none?
//! filtering (4.4)    a fresh socket asks A1:P1 to answer from A2:P2, then from A1:P2: which answer comes in?
//! hairpinning (4.5)  a second socket sends to what the first looks like: does it arrive?
//! lifetime (4.6)     a socket is silent for a while; asked by a second one, A1:P1 sends to what it looked like: does it arrive?
//! ```

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::host::place;
use super::kind::{Behaviour, Filtering, Lifetime, Mapping, Ports, SHORT_LIFETIME_S};
use super::site::Site;
use super::wire::{From, MESSAGE_BYTES, Message};
use crate::traffic::{Family, would_block};

/// No datagram is lost here but on purpose: several, so that a machine that stands still for a moment proves nothing.
const ATTEMPTS: u32 = 5;
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(200);

/// What a mapping of any kind has to outlive, and what a short one must not.
const SURVIVED: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_secs(SHORT_LIFETIME_S as u64);
const FORGOTTEN: Duration = Duration::from_secs(SHORT_LIFETIME_S as u64 + 5);

/// A machine that stands still too long in between lets a short mapping go: then it is measured again.
const LIFETIME_ATTEMPTS: u32 = 3;

/// How far a NAT that counts may have come between two of our questions: others ask, too.
const SEQUENTIAL_STEP: u16 = 16;

/// Tells questions apart.
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

pub(super) fn next_id() -> u32 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// What the site does to UDP; none where none comes back.
pub fn measure(site: &Site) -> Result<Option<Behaviour>> {
    let family = *site.kind.families().first().context("a site without a family")?;
    let socket = site.socket(family)?;
    let Some(first) = ask(&socket, place(family, 0, 0), From::Same)? else { return Ok(None) };
    let again = |address, port| {
        ask(&socket, place(family, address, port), From::Same)?
            .context("the host answered once and not again")
    };
    let seen = [first, again(1, 0)?, again(1, 1)?];
    let own = socket.local_addr()?;
    let mapping = mapping(own, seen);
    let hairpinning = match mapping {
        Mapping::None => None,
        _ => Some(hairpins(site, family, &socket, first)?),
    };
    Ok(Some(Behaviour {
        mapping,
        filtering: filtering(site, family)?,
        ports: ports(own, seen),
        hairpinning,
        lifetime: lifetime(site, family)?,
    }))
}

/// Whether a TCP connection to the host can be made.
pub fn reaches_by_tcp(site: &Site) -> Result<bool> {
    let family = *site.kind.families().first().context("a site without a family")?;
    let timeout = ATTEMPT_TIMEOUT * ATTEMPTS;
    site.node
        .run_in(|| Ok(std::net::TcpStream::connect_timeout(&place(family, 0, 0), timeout).is_ok()))
}

fn mapping(own: SocketAddr, [first, second, third]: [SocketAddr; 3]) -> Mapping {
    if first == own && second == own && third == own {
        Mapping::None
    } else if first == second && second == third {
        Mapping::EndpointIndependent
    } else if second == third {
        Mapping::AddressDependent
    } else {
        Mapping::AddressAndPortDependent
    }
}

fn ports(own: SocketAddr, seen: [SocketAddr; 3]) -> Ports {
    let [first, second, third] = seen.map(|seen| seen.port());
    let follows = |port: u16, last: u16| (1..=SEQUENTIAL_STEP).contains(&port.wrapping_sub(last));
    if seen.iter().all(|seen| seen.port() == own.port()) {
        Ports::Preserved
    } else if follows(second, first) && follows(third, second) {
        Ports::Sequential
    } else {
        Ports::Unrelated
    }
}

fn filtering(site: &Site, family: Family) -> Result<Filtering> {
    // Fresh: it must not have sent to where the answers are to come from.
    let socket = site.socket(family)?;
    let host = place(family, 0, 0);
    ask(&socket, host, From::Same)?.context("no answer to a second socket")?;
    Ok(if ask(&socket, host, From::OtherAddressAndPort)?.is_some() {
        Filtering::EndpointIndependent
    } else if ask(&socket, host, From::OtherPort)?.is_some() {
        Filtering::AddressDependent
    } else {
        Filtering::AddressAndPortDependent
    })
}

fn hairpins(site: &Site, family: Family, first: &UdpSocket, mapped: SocketAddr) -> Result<bool> {
    let second = site.socket(family)?;
    let id = next_id();
    let ping = Message::Ping { id }.to_string();
    let heard = |text: &str, _| (Message::parse(text) == Some(Message::Ping { id })).then_some(());
    for _ in 0..ATTEMPTS {
        // Refused is as good as lost.
        let _ = second.send_to(ping.as_bytes(), mapped);
        if await_on(first, ATTEMPT_TIMEOUT, heard)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn lifetime(site: &Site, family: Family) -> Result<Lifetime> {
    for _ in 0..LIFETIME_ATTEMPTS {
        let begin = Instant::now();
        // One for each question: an answer that comes in keeps a mapping alive.
        let (early, late) = (silent(site, family)?, silent(site, family)?);
        std::thread::sleep(SURVIVED);
        let survived = arrives(site, family, &early)?;
        if !survived && begin.elapsed() > SHORT {
            continue;
        }
        ensure!(survived, "a mapping was gone after {SURVIVED:?}");
        std::thread::sleep(FORGOTTEN.saturating_sub(begin.elapsed()));
        let there = arrives(site, family, &late)?;
        return Ok(if there { Lifetime::Long } else { Lifetime::Short });
    }
    bail!("the machine stood still: how long mappings live could not be measured")
}

/// A socket that the host has seen and that says nothing any more.
fn silent(site: &Site, family: Family) -> Result<(UdpSocket, SocketAddr)> {
    let socket = site.socket(family)?;
    let mapped =
        ask(&socket, place(family, 0, 0), From::Same)?.context("no answer to another socket")?;
    Ok((socket, mapped))
}

/// Whether what the host sends to a silent socket reaches it.
fn arrives(
    site: &Site,
    family: Family,
    (socket, mapped): &(UdpSocket, SocketAddr),
) -> Result<bool> {
    let asker = site.socket(family)?;
    Ok(exchange(&asker, place(family, 0, 0), From::Same, Some((socket, *mapped)))?.is_some())
}

/// What the socket looks like to the host; none when no answer comes in.
pub(super) fn ask(socket: &UdpSocket, host: SocketAddr, from: From) -> Result<Option<SocketAddr>> {
    exchange(socket, host, from, None)
}

/// Asks on one socket and waits for the answer there, or at another that looks like `to`.
fn exchange(
    socket: &UdpSocket,
    host: SocketAddr,
    from: From,
    to: Option<(&UdpSocket, SocketAddr)>,
) -> Result<Option<SocketAddr>> {
    let id = next_id();
    let question = Message::Ask { id, from, to: to.map(|(_, address)| address) }.to_string();
    let listener = to.map_or(socket, |(listener, _)| listener);
    let right = |source: SocketAddr| match from {
        From::Same => source == host,
        From::OtherPort => source.ip() == host.ip() && source.port() != host.port(),
        From::OtherAddressAndPort => source.ip() != host.ip() && source.port() != host.port(),
    };
    for _ in 0..ATTEMPTS {
        // Refused by a firewall is as good as lost.
        let _ = socket.send_to(question.as_bytes(), host);
        let answer =
            await_on(listener, ATTEMPT_TIMEOUT, |text, source| match Message::parse(text) {
                Some(Message::Seen { id: answered, address })
                    if answered == id && right(source) =>
                {
                    Some(address)
                }
                _ => None,
            })?;
        if answer.is_some() {
            return Ok(answer);
        }
    }
    Ok(None)
}

/// Waits for a message that `wanted` makes something of.
fn await_on<T>(
    socket: &UdpSocket,
    within: Duration,
    wanted: impl Fn(&str, SocketAddr) -> Option<T>,
) -> Result<Option<T>> {
    let end = Instant::now() + within;
    let mut buffer = [0; MESSAGE_BYTES];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv_from(&mut buffer) {
            Ok((count, source)) => {
                let text =
                    String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
                if let Some(found) = wanted(&text, source) {
                    return Ok(Some(found));
                }
            }
            // A process that was stopped and goes on is interrupted while it waits with a timeout (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted || would_block(&error) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(ports: [u16; 3]) -> [SocketAddr; 3] {
        ports.map(|port| SocketAddr::from(([192, 0, 2, 20], port)))
    }

    #[test]
    fn what_the_host_saw_tells_the_mapping() {
        let own = SocketAddr::from(([192, 168, 1, 10], 33_000));
        let public = SocketAddr::from(([192, 0, 2, 20], 33_000));
        assert_eq!(mapping(public, seen([33_000; 3])), Mapping::None);
        assert_eq!(mapping(own, seen([33_000; 3])), Mapping::EndpointIndependent);
        assert_eq!(mapping(own, seen([7, 8, 8])), Mapping::AddressDependent);
        assert_eq!(mapping(own, seen([7, 8, 9])), Mapping::AddressAndPortDependent);
    }

    #[test]
    fn what_the_host_saw_tells_how_ports_are_chosen() {
        let own = SocketAddr::from(([192, 168, 1, 10], 33_000));
        assert_eq!(ports(own, seen([33_000; 3])), Ports::Preserved);
        assert_eq!(ports(own, seen([20_000, 20_001, 20_004])), Ports::Sequential);
        assert_eq!(ports(own, seen([20_000, 20_000, 20_000])), Ports::Unrelated);
        assert_eq!(ports(own, seen([20_000, 51_000, 1_100])), Ports::Unrelated);
    }
}
