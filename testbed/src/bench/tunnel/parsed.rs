//! What iperf3 and ping print.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// What came through, by iperf3's receiving end.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Received {
    pub(super) bits_per_second: f64,
    pub(super) packets_per_second: f64,
    /// Of those sent, 0 to 100.
    pub(super) lost_percent: f64,
}

/// What `ping` says of its answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pinged {
    pub(super) average: Duration,
    /// Of those sent, 0 to 100.
    pub(super) lost_percent: f64,
}

/// The document of `iperf3 --json`; both directions together where there were two.
pub(super) fn iperf3(text: &str) -> Result<Received> {
    let document: Value = serde_json::from_str(text).context("iperf3 printed no JSON")?;
    if let Some(error) = document["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let end = &document["end"];
    let (mut received, mut sent) = (Received::default(), 0.0);
    for name in ["sum_received", "sum_received_bidir_reverse"] {
        let sum = &end[name];
        let Some(bits) = sum["bits_per_second"].as_f64() else { continue };
        received.bits_per_second += bits;
        sent += sum["packets"].as_f64().unwrap_or(0.0);
        if let (Some(packets), Some(lost), Some(seconds)) =
            (sum["packets"].as_f64(), sum["lost_packets"].as_f64(), sum["seconds"].as_f64())
            && seconds > 0.0
        {
            received.packets_per_second += (packets - lost) / seconds;
            received.lost_percent = 100.0 * lost / packets.max(1.0);
        }
    }
    // Datagrams that are all lost are an outcome; a stream of which nothing arrives did not come about.
    if received.bits_per_second == 0.0 && sent == 0.0 {
        bail!("iperf3 says that nothing arrived");
    }
    Ok(received)
}

/// What `ping -q` says: "10 packets transmitted, 9 received, 10% packet loss, time 9ms" and
/// "rtt min/avg/max/mdev = 0.1/0.2/0.3/0.0 ms".
pub(super) fn ping(text: &str) -> Result<Pinged> {
    let line = text.lines().find(|line| line.starts_with("rtt "));
    let average = line
        .and_then(|line| line.split_once(" = "))
        .and_then(|(_, times)| times.split('/').nth(1))
        .and_then(|average| average.parse::<f64>().ok());
    let average = average.with_context(|| format!("ping had no answer: {}", text.trim()))?;
    let average =
        Duration::try_from_secs_f64(average / 1e3).context("ping's average is no time")?;
    let number = |after: &str| {
        let part = text.split(", ").find_map(|part| part.trim().strip_suffix(after))?;
        part.rsplit(['\n', ' ']).next()?.parse::<f64>().ok()
    };
    let sent = number(" packets transmitted").context("ping does not say how many it sent")?;
    let received = number(" received").context("ping does not say how many came back")?;
    // The last one may be under way when ping ends.
    let lost = (sent - received - 1.0).max(0.0);
    Ok(Pinged { average, lost_percent: 100.0 * lost / sent.max(1.0) })
}

/// A counter of /proc/net/snmp or /proc/net/netstat: a line of names, then a line of values, both with the group in front.
pub(super) fn counter(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
    let place = lines.next()?.split(' ').position(|word| word == name)?;
    lines.next()?.split(' ').nth(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_count() {
        let text = r#"{"end": {"sum_received": {"bits_per_second": 2e9, "seconds": 1},
            "sum_received_bidir_reverse": {"bits_per_second": 1e9, "seconds": 1}}}"#;
        let received = iperf3(text).expect("figures");
        assert_eq!(received, Received { bits_per_second: 3e9, ..Received::default() });
    }

    #[test]
    fn lost_packets_do_not_count() {
        let text = r#"{"end": {"sum_received": {"bits_per_second": 5e6, "seconds": 2,
            "packets": 1000, "lost_packets": 400}}}"#;
        assert_eq!(iperf3(text).expect("figures").packets_per_second, 300.0);
        let all = r#"{"end": {"sum_received": {"bits_per_second": 0, "seconds": 2,
            "packets": 1000, "lost_packets": 1000}}}"#;
        let received = iperf3(all).expect("losing everything is an outcome");
        assert_eq!((received.packets_per_second, received.lost_percent), (0.0, 100.0));
    }

    #[test]
    fn failures_say_what_the_program_said() {
        let error = iperf3(r#"{"error": "unable to connect"}"#).expect_err("a failure");
        assert!(error.to_string().contains("unable to connect"));
        assert!(iperf3("{}").is_err() && iperf3("nothing").is_err());
        assert!(ping("3 packets transmitted, 0 received, 100% packet loss").is_err());
    }

    #[test]
    fn the_average_of_ping() {
        let text = |counts: &str| {
            format!(
                "--- 10.0.0.1 ping statistics ---\n{counts} packet loss, time 9ms\n\
                 rtt min/avg/max/mdev = 0.024/0.25/0.4/0.1 ms\n"
            )
        };
        let pinged = |counts| ping(&text(counts)).expect("a time");
        let average = Duration::from_micros(250);
        let all = pinged("200 packets transmitted, 199 received, 0.5%");
        assert_eq!(all, Pinged { average, lost_percent: 0.0 }, "one may be under way");
        let some = pinged("200 packets transmitted, 149 received, +3 duplicates, 25.5%");
        assert_eq!(some, Pinged { average, lost_percent: 25.0 });
    }

    #[test]
    fn counters_are_found_by_name() {
        let text = "Tcp: A RetransSegs\nTcp: 1 7\nTcpExt: X TCPOFOQueue Y\nTcpExt: 3 4 5\n";
        assert_eq!(counter(text, "Tcp", "RetransSegs"), Some(7));
        assert_eq!(counter(text, "TcpExt", "TCPOFOQueue"), Some(4));
        assert_eq!(counter(text, "Udp", "X"), None);
    }
}
