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

/// The document of `iperf3 --json`; both directions together where there were two.
pub(super) fn iperf3(text: &str) -> Result<Received> {
    let document: Value = serde_json::from_str(text).context("iperf3 printed no JSON")?;
    if let Some(error) = document["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let end = &document["end"];
    let mut received = Received::default();
    for name in ["sum_received", "sum_received_bidir_reverse"] {
        let sum = &end[name];
        let Some(bits) = sum["bits_per_second"].as_f64() else { continue };
        received.bits_per_second += bits;
        if let (Some(packets), Some(lost), Some(seconds)) =
            (sum["packets"].as_f64(), sum["lost_packets"].as_f64(), sum["seconds"].as_f64())
            && seconds > 0.0
        {
            received.packets_per_second += (packets - lost) / seconds;
            received.lost_percent = 100.0 * lost / packets.max(1.0);
        }
    }
    if received.bits_per_second == 0.0 {
        bail!("iperf3 says that nothing arrived");
    }
    Ok(received)
}

/// The average of `ping -q`, "rtt min/avg/max/mdev = 0.1/0.2/0.3/0.0 ms".
pub(super) fn ping(text: &str) -> Result<Duration> {
    let line = text.lines().find(|line| line.starts_with("rtt "));
    let average = line
        .and_then(|line| line.split_once(" = "))
        .and_then(|(_, times)| times.split('/').nth(1))
        .and_then(|average| average.parse::<f64>().ok());
    let average = average.with_context(|| format!("ping had no answer: {}", text.trim()))?;
    Duration::try_from_secs_f64(average / 1e3).context("ping's average is no time")
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
        let text =
            "--- 10.0.0.1 ping statistics ---\nrtt min/avg/max/mdev = 0.024/0.25/0.4/0.1 ms\n";
        assert_eq!(ping(text).expect("a time"), Duration::from_micros(250));
    }

    #[test]
    fn counters_are_found_by_name() {
        let text = "Tcp: A RetransSegs\nTcp: 1 7\nTcpExt: X TCPOFOQueue Y\nTcpExt: 3 4 5\n";
        assert_eq!(counter(text, "Tcp", "RetransSegs"), Some(7));
        assert_eq!(counter(text, "TcpExt", "TCPOFOQueue"), Some(4));
        assert_eq!(counter(text, "Udp", "X"), None);
    }
}
