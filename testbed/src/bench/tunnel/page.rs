//! `docs/performance.md`: what was measured, on what, and how to measure it again.

use std::fmt::Write as _;

use super::super::figures::Report;
use super::super::page as pages;

const HOW: &str = "\
# How fast the data plane is

Written by `./testbed/bench tunnel --page docs/performance.md --svg docs/performance.svg`: change the program, not this file.

Two network namespaces on one machine, a veth pair between them, the same traffic through each program in turn, round after
round. Both ends and the traffic share the processors, so throughput here says what a byte costs, not what one end alone
could do; ratios between programs of the same run are what to look at. Values are medians of the rounds, with the lowest and the
highest behind them, and how many rounds where some gave nothing; a ratio is that of the medians.

- TCP and UDP by iperf3, latency by ping and by one connection with one 64-byte request under way (`rr_…`); `…_load`, both at once, is beside
  one TCP stream, and `ping_load_lost` is how many pings did not come back. `pod_…` is between two pods, whose network our CNI plugin made for every program.
- Tunnels have MTU 1420 where the name says nothing else; the wire is as wide as that needs. Figures without `bbr` use cubic.
- `cpu_per_gbit`: processor time of the programs at both ends, in ticks of 10 ms, system calls included, for a Gbit of `tcp_1_cubic`.
- `…_100`, `…_1000`: node a has so many peers and a session with each. `idle_cpu_…` is its daemon's share of one core while nobody speaks.
- `out_of_order`, `retransmits`: what TCP at both ends counted during `tcp_1_cubic`, in the worst round.
- `flood_loss`: packets lost of 5,000 a second through the tunnel, while a hundred thousand true handshake initiations a second
  come in the names of others, untracked by the firewall.
- meshd is the program of a release, static and with musl, and runs as on a node (`meshd run --roster`): control plane, guard and
  counters are in its figures. nebula uses its default cipher, AES-GCM. vxlan and veth do not encrypt and are measured once, for scale.

To repeat it: `./testbed/bench tunnel`, on any Linux with root, namespaces and a few Debian packages that it installs; it says how
long it will take. `--only tcp_1_cubic --seconds 3` is a look in a minute, `--json` prints the same figures for programs.

";

/// The page for these figures.
pub(super) fn write(report: &Report) -> String {
    let mut text = HOW.to_owned();
    let _ = writeln!(text, "Measured on {}.\n", report.setting());
    text.push_str("![Everybody's values](performance.svg)\n\n");
    pages::table(&mut text, "meshd", report);
    text
}

#[cfg(test)]
mod tests {
    use super::super::super::figures::{Better, Figure, Target};
    use super::super::super::plan::LeftOut;
    use super::*;

    #[test]
    fn the_page_says_what_was_missed_and_what_was_left_out() {
        let what = ("tcp", "Gbit/s", Better::Higher);
        let figure = Figure::beside(what, &[1.0], Some(("peer", &[1.0])), Target::ratio(1.7, 2.0));
        let left_out = LeftOut { lines: vec!["bbr: none".to_owned()], ours: true };
        let report = Report::new(2, vec![figure]).of_traffic(10, None, left_out);
        let page = write(&report);
        assert!(
            page.contains("| tcp | Gbit/s | 1.00 (1.00–1.00, 1 of 2 rounds) | peer |"),
            "{page}"
        );
        assert!(page.contains("**missed**") && page.ends_with("- bbr: none\n"), "{page}");
    }
}
