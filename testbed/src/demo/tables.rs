//! The report as text.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Report;
use crate::cluster::{Cluster, NodeFacts};
use crate::traffic::{PairResult, Protocol};

/// As `kubectl get nodes -o custom-columns=…` prints them.
pub(super) fn nodes(nodes: &[NodeFacts]) -> String {
    let header = ["NAME", "SITE", "PUBLIC-KEY", "ENDPOINTS", "POD-CIDRS"].map(str::to_owned);
    let none = |text: String| if text.is_empty() { "<none>".to_owned() } else { text };
    let rows = nodes.iter().map(|node| {
        [
            node.name.clone(),
            none(node.site.clone()),
            none(node.public_key.clone()),
            none(node.endpoints.join(",")),
            none(node.pod_cidrs.join(",")),
        ]
    });
    columns(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

/// Rows send to columns. Each cell counts its good checks and shows the median round trip of ICMP.
pub(super) fn matrix(pairs: &[PairResult]) -> String {
    let mut cells: BTreeMap<(&str, &str), Vec<&PairResult>> = BTreeMap::new();
    let mut names: Vec<&str> = Vec::new();
    for pair in pairs {
        cells.entry((&pair.from, &pair.to)).or_default().push(pair);
        if !names.contains(&pair.from.as_str()) {
            names.push(&pair.from);
        }
    }
    let mut rows = vec![
        std::iter::once("from \\ to").chain(names.iter().copied()).map(str::to_owned).collect(),
    ];
    for from in &names {
        let mut row = vec![(*from).to_owned()];
        row.extend(
            names
                .iter()
                .map(|to| cells.get(&(*from, *to)).map_or("·".to_owned(), |cell| shown(cell))),
        );
        rows.push(row);
    }
    let good = pairs.iter().filter(|pair| pair.ok).count();
    format!(
        "{}{good} of {} checks good (each cell: checks, ICMP round trip in ms)",
        rows_to_text(&rows),
        pairs.len()
    )
}

fn shown(cell: &[&PairResult]) -> String {
    let good = cell.iter().filter(|pair| pair.ok).count();
    let rtts =
        cell.iter().filter(|pair| pair.protocol == Protocol::Icmp).filter_map(|pair| pair.rtt_ms);
    let best = rtts.fold(f64::INFINITY, f64::min);
    let rtt = if best.is_finite() { format!("{best:.2}") } else { "–".to_owned() };
    if good == cell.len() {
        format!("{good} {rtt}")
    } else {
        format!("{good}/{} {rtt}", cell.len())
    }
}

/// The whole report.
pub(super) fn report(report: &Report) -> String {
    let mut text = nodes(&report.nodes);
    text.push('\n');
    text.push_str(&matrix(&report.pairs));
    let verdict =
        if report.problems.is_empty() { "the mesh works" } else { "the mesh does NOT work" };
    let _ = write!(
        text,
        "\n\nTCP between clouds   {:.2} Gbit/s\n\
         plaintext oracle     deliberate leak {}, then {} of {} packets in clear ({} not seen)\n\
         meshd killed         pods silent for {}\n\
         took                 {:.1} s\n\n{verdict}\n",
        report.throughput_gbps,
        if report.canary_caught { "caught" } else { "NOT caught" },
        report.plaintext_packets,
        report.captured_packets,
        report.lost_packets,
        report.restart_gap_ms.map_or("good".to_owned(), |gap| format!("{gap:.0} ms")),
        report.duration_s,
    );
    text
}

/// Commands for a shell in each node and pod.
pub(super) fn how_to_enter(cluster: &Cluster) -> String {
    let mut text = "the cluster stays up; enter it with\n".to_owned();
    let meshd = quoted(&cluster.lab().programs().meshd.display().to_string());
    // Who is root without sudo may not have it.
    let sudo = if std::env::var_os("SUDO_UID").is_some() { "sudo " } else { "" };
    for (plan, node) in &cluster.net.nodes {
        let enter = format!("{sudo}nsenter -t {} -m -u -i -n -p", node.pid());
        let _ = writeln!(text, "  node {:<8} {enter} bash", plan.name);
        let _ = writeln!(text, "       status  {enter} {meshd} status");
        for pod in cluster.pods.iter().filter(|pod| pod.node.name() == plan.name) {
            let netns = pod.netns();
            let name = netns.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(text, "  pod  {:<8} {enter} ip netns exec {name} bash", pod.name);
        }
    }
    let script = std::env::var("TESTBED_DEMO").unwrap_or_else(|_| "./testbed/demo".to_owned());
    let _ = write!(text, "and remove every trace of it with\n  {} --down", quoted(&script));
    if cluster.lab().name() != super::DEFAULT_LAB {
        let _ = write!(text, " --lab {}", cluster.lab().name());
    }
    text
}

/// As a shell reads it back.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

pub(super) fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Icmp => "ICMP",
    }
}

fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    rows_to_text(&rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>())
}

/// Left-aligned columns, three spaces apart, as kubectl does.
fn rows_to_text(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}   ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_blanks_or_quotes_can_be_pasted_into_a_shell() {
        assert_eq!(quoted("/home/a-b/meshd"), "/home/a-b/meshd");
        assert_eq!(quoted("/home/it's me/x"), r"'/home/it'\''s me/x'");
    }
}
