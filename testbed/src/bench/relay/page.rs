//! The relay's section of `docs/performance.md`.

use std::fmt::Write as _;

use super::super::figures::Report;
use super::super::page as pages;

const HOW: &str = "\
# How fast the relay is

Written by `./testbed/bench relay --page docs/performance.md`: change the program, not this file.

Three network namespaces on one machine: clients on a near and a far side, and between them a machine on which every relay runs, each
measured in turn, round after round. Clients, wire and relay share the processors, so throughput here says what a byte
costs all of them together; ratios between relays of the same round are what to look at. `cpu_per_gbit` is the relay's part alone.

- keyrelay: members on both sides, who speak by carried datagrams. coturn: an allocation and a channel on the near side, plain
  datagrams on the far one, no authentication. derper: DERP over TLS on both sides, by Tailscale's own client library.
  forwarder: a program of ours that makes keyrelay's system calls by the same code: as many threads, gathered and spread as its are,
  and the same bursts of datagrams that came one by one. It does nothing in between but compute an address. direct: a wire without a
  relay, which shows what the load generator can do.
- The messages are the same for all, 1,408 bytes or 64; headers of the relays do not count as carried. Over UDP the senders hand over up
  to 44 datagrams in one call (`UDP_SEGMENT`), as WireGuard programs do. As many bytes are under way as serve each relay best,
  which is tried out first.
- `forward_1`, `forward_10`, `forward_100`: so many pairs of clients, 1,408 bytes. `single_64`, `single_64_100`: messages of 64 bytes that reach
  the relay one by one, as from a network interface that merges nothing, for one pair and for a hundred.
- `rtt_…`: a request of 64 bytes and its answer, one under way at a time; `added_…` is that less the same without a relay. `load_…` is `rtt_…`
  beside 300 Mbit/s of another pair.
- For `rtt_…` and `load_…` the relay and all clients share one processor: to hand work to another, or to wake one of a virtual machine, takes
  longer than any of these relays, and hides them.
- `cpu_per_gbit`: processor time of the relay, in ticks of 10 ms, system calls included, for a Gbit of `forward_1`.
- `resident_10000`: memory of keyrelay with so many members registered. `flood_…`: 1,000,000 datagrams of strangers of five sorts from 64
  addresses, 100,000 a second: by what memory grows, and what a member's `rtt_p99` is during it, divided by what it is in the pauses of it.
- keyrelay's budgets are set above what it can carry; they are counted all the same.

What limits each: coturn takes and sends one datagram with each system call, and one client's all in one thread. derper encrypts what each
client sends and what it receives, in user space, and so do the clients, whose Go is in its throughput. keyrelay and the forwarder
are limited by the processors that clients and relay share, and in `single_64` by one thread of the relay.

To repeat it: `./testbed/bench relay`, on any Linux with root, namespaces and a few Debian packages that it installs. `--only forward_1
--seconds 3 --rounds 1` is a look in a minute, `--json` prints the same figures for programs.

";

/// The section for these figures.
pub(super) fn write(report: &Report) -> String {
    let mut text = HOW.to_owned();
    let _ = writeln!(text, "Measured on {}.\n", report.setting());
    pages::table(&mut text, "keyrelay", report);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_how_it_was_measured_as_this_program_does() {
        assert!(
            pages::written(pages::Section::Second).starts_with(HOW),
            "docs/performance.md is not what this program writes: ./testbed/bench relay --page docs/performance.md"
        );
    }
}
