//! What people and programs read.

use mesh_core::cluster::record::shown;
use mesh_core::cluster::{NodeRecord, RawNode};
use mesh_types::limits::{CANDIDATES_PER_NODE_MAX, SHOWN_CHARS_MAX};
use serde_json::{Value, json};

use super::judge::{Meshed, Report};
use crate::status::columns;

/// The table of `keys`.
pub fn keys(nodes: &[RawNode], wide: bool) -> String {
    let mut header = vec!["NODE", "SITE", "PUBLIC-KEY", "ENDPOINTS", "POD-CIDRS", "VERSION"];
    if wide {
        header.extend(["OVERRIDE", "ADDRESSES", "PROBLEMS"]);
    }
    let mut rows: Vec<Vec<String>> = vec![header.into_iter().map(String::from).collect()];
    for node in nodes {
        let mut row = vec![
            shown(&node.name),
            cell(node.site.as_deref()),
            cell(node.public_key.as_deref()),
            long(node.endpoints.as_deref()),
            list(node.pod_cidrs.iter().map(|cidr| shown(cidr))),
            cell(node.version.as_deref()),
        ];
        if wide {
            row.push(cell(node.endpoint_override.as_deref()));
            row.push(list(node.addresses.iter().map(|address| shown(&address.address))));
            row.push(problems(node).join("; "));
        }
        rows.push(row.into_iter().map(or_dash).collect());
    }
    columns(&rows)
}

/// The document of `keys`.
pub fn keys_json(nodes: &[RawNode]) -> Value {
    let node = |node: &RawNode| {
        let endpoints = node.endpoints.as_deref().unwrap_or_default().split(',');
        let endpoints: Vec<&str> =
            endpoints.map(str::trim).filter(|endpoint| !endpoint.is_empty()).collect();
        let addresses: Vec<&str> = node.addresses.iter().map(|it| it.address.as_str()).collect();
        json!({
            "node": node.name, "site": node.site, "publicKey": node.public_key, "endpoints": endpoints,
            "podCIDRs": node.pod_cidrs, "version": node.version, "endpoint": node.endpoint_override,
            "addresses": addresses, "problems": problems(node),
        })
    };
    nodes.iter().map(node).collect()
}

/// What of a record is not believed.
fn problems(node: &RawNode) -> Vec<String> {
    match NodeRecord::from_raw(node) {
        Ok(record) => record.problems.iter().map(ToString::to_string).collect(),
        Err(why) => vec![why.to_string()],
    }
}

/// The table of `status`, what daemons told below it, and how many are meshed.
pub fn reports(reports: &[Report], wide: bool) -> String {
    let mut header = vec!["NODE", "MESHED", "SITE", "POD-CIDRS", "VERSION"];
    if wide {
        header.push("POD");
    }
    header.push("WHY");
    let mut rows: Vec<Vec<String>> = vec![header.into_iter().map(String::from).collect()];
    for report in reports {
        let meshed = match report.meshed {
            Meshed::Yes => "yes",
            Meshed::Partly => "partly",
            Meshed::No => "NO",
        };
        let mut row = vec![
            report.node.clone(),
            meshed.to_owned(),
            report.site.clone(),
            report.pod_cidrs.join(","),
            report.version.clone(),
        ];
        if wide {
            row.push(report.pod.clone().unwrap_or_default());
        }
        row.push(printable(&report.why.join("; ")));
        rows.push(row.into_iter().map(or_dash).collect());
    }
    let mut text = columns(&rows);
    for report in reports.iter().filter(|report| !report.events.is_empty()) {
        text.push_str(&format!("\ntold of {}:\n", report.node));
        for event in &report.events {
            text.push_str(&format!("  {}\n", printable(event)));
        }
    }
    let meshed = reports.iter().filter(|report| report.meshed == Meshed::Yes).count();
    text.push_str(&format!("\n{meshed} of {} nodes meshed\n", reports.len()));
    text
}

/// Text of others, in one line, without what a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn cell(text: Option<&str>) -> String {
    text.map(shown).unwrap_or_default()
}

/// A list in one text, longer than one name.
fn long(text: Option<&str>) -> String {
    let most = CANDIDATES_PER_NODE_MAX * SHOWN_CHARS_MAX;
    printable(&text.unwrap_or_default().chars().take(most).collect::<String>())
}

fn list(texts: impl Iterator<Item = String>) -> String {
    texts.collect::<Vec<_>>().join(",")
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::super::judge::tests::node;
    use super::*;

    #[test]
    fn keys_are_whole_and_what_is_missing_is_a_dash() {
        let good = node(1).raw;
        let key = good.public_key.clone().expect("a key");
        let bare = RawNode { name: "node-2".into(), ..RawNode::default() };
        let table = keys(&[good.clone(), bare.clone()], false);
        let lines: Vec<Vec<&str>> =
            table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["NODE", "SITE", "PUBLIC-KEY", "ENDPOINTS", "POD-CIDRS", "VERSION"]);
        assert_eq!(
            lines[1],
            ["node-1", "cloud-a", &key, "203.0.113.1:15190", "10.244.1.0/24", "0.1.0"]
        );
        assert_eq!(lines[2], ["node-2", "-", "-", "-", "-", "-"]);
        let json = keys_json(&[good, bare]);
        assert_eq!(json[0]["publicKey"], key);
        assert_eq!(json[0]["endpoints"], json!(["203.0.113.1:15190"]));
        assert_eq!((&json[1]["publicKey"], &json[1]["endpoints"]), (&Value::Null, &json!([])));
    }

    #[test]
    fn a_terminal_obeys_nothing_a_node_publishes() {
        let mut odd = node(1).raw;
        odd.public_key = Some("\u{1b}[2Jkey".into());
        odd.endpoints = Some("\u{1b}]0;title\u{7}\n".into());
        let table = keys(&[odd], true);
        assert!(table.chars().all(|c| c == '\n' || !c.is_control()), "{table:?}");
        assert_eq!(table.lines().count(), 2);
    }
}
