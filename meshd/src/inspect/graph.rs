//! Sites, nodes and the paths between them, as text for a graph program. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use mesh_core::cluster::RawNode;
use mesh_types::status::{PathKind, PeerStatus, Status};

use super::args::Language;
use super::print::printable;
use crate::status::path_word;

/// Nodes drawn at most: beyond, nobody sees a path among them, and drawing programs give up.
pub const NODES_MAX: usize = 100;

/// What is drawn.
pub struct Picture<'a> {
    pub nodes: &'a [RawNode],
    /// What daemons see, by the name of their node; why not otherwise.
    pub views: &'a BTreeMap<String, Result<Status, String>>,
}

/// How two nodes see each other.
#[derive(Debug, Clone, PartialEq)]
struct Edge {
    a: usize,
    b: usize,
    path: PathKind,
    label: String,
}

/// The text, for `language`.
pub fn draw(picture: &Picture<'_>, language: Language) -> String {
    let sites = sites(picture.nodes);
    let edges = edges(picture);
    match language {
        Language::Mermaid => mermaid(picture, &sites, &edges),
        Language::Dot => dot(picture, &sites, &edges),
    }
}

/// Positions of nodes by site; nodes without one come first.
fn sites(nodes: &[RawNode]) -> BTreeMap<&str, Vec<usize>> {
    let mut sites: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (position, node) in nodes.iter().enumerate() {
        sites.entry(node.site.as_deref().unwrap_or_default()).or_default().push(position);
    }
    sites
}

/// One for every two nodes of which at least one was asked. Where both were and differ, the better path is drawn: the other
/// side has not sent yet.
fn edges(picture: &Picture<'_>) -> Vec<Edge> {
    let view = |from: &RawNode, to: &RawNode| -> Option<&PeerStatus> {
        let status = picture.views.get(&from.name)?.as_ref().ok()?;
        status.peers.iter().find(|peer| peer.node.as_str() == to.name)
    };
    let asked = |node: &RawNode| picture.views.get(&node.name).is_some_and(Result::is_ok);
    let mut edges = Vec::new();
    for (a, from) in picture.nodes.iter().enumerate() {
        for (b, to) in picture.nodes.iter().enumerate().skip(a + 1) {
            if !asked(from) && !asked(to) {
                continue;
            }
            let best = [view(from, to), view(to, from)]
                .into_iter()
                .flatten()
                .max_by_key(|peer| rank(peer));
            let (path, label) = match best {
                Some(peer) => (peer.path, label(peer)),
                None => (PathKind::None, "not meshed".to_owned()),
            };
            edges.push(Edge { a, b, path, label });
        }
    }
    edges
}

fn rank(peer: &PeerStatus) -> (u8, bool) {
    let path = match peer.path {
        PathKind::None => 0,
        PathKind::Relayed => 1,
        PathKind::Roamed => 2,
        PathKind::Direct => 3,
    };
    (path, peer.rtt_ms.is_some())
}

fn label(peer: &PeerStatus) -> String {
    match (peer.path, peer.rtt_ms) {
        (PathKind::None, _) => "no path".to_owned(),
        (path, Some(rtt)) => format!("{} {rtt:.1} ms", path_word(path)),
        (path, None) => path_word(path).to_owned(),
    }
}

fn mermaid(picture: &Picture<'_>, sites: &BTreeMap<&str, Vec<usize>>, edges: &[Edge]) -> String {
    let mut text = "graph LR\n".to_owned();
    let quoted = |part: &str| {
        printable(part)
            .replace('#', "#35;")
            .replace('"', "#quot;")
            .replace('<', "#lt;")
            .replace('>', "#gt;")
    };
    // Writing to a String cannot fail.
    for (position, (site, nodes)) in sites.iter().enumerate() {
        let _ = writeln!(text, "  subgraph s{position}[\"{}\"]", quoted(site_word(site)));
        for node in nodes {
            let raw = &picture.nodes[*node];
            let _ = writeln!(
                text,
                "    n{node}[\"{}<br/>{}\"]",
                quoted(&raw.name),
                quoted(&raw.pod_cidrs.join(" "))
            );
        }
        text.push_str("  end\n");
    }
    for Edge { a, b, path, label } in edges {
        let line = if *path == PathKind::None { "-.-" } else { "---" };
        let _ = writeln!(text, "  n{a} {line}|\"{label}\"| n{b}");
    }
    for (node, why) in unasked(picture) {
        let _ = writeln!(text, "  %% not asked: {}: {}", printable(node), printable(why));
    }
    text
}

fn dot(picture: &Picture<'_>, sites: &BTreeMap<&str, Vec<usize>>, edges: &[Edge]) -> String {
    let mut text = "graph mesh {\n  layout=fdp; node [shape=box];\n".to_owned();
    let quoted = |part: &str| printable(part).replace('\\', "\\\\").replace('"', "\\\"");
    for (position, (site, nodes)) in sites.iter().enumerate() {
        let _ = writeln!(
            text,
            "  subgraph cluster_{position} {{\n    label=\"{}\";",
            quoted(site_word(site))
        );
        for node in nodes {
            let raw = &picture.nodes[*node];
            let _ = writeln!(
                text,
                "    n{node} [label=\"{}\\n{}\"];",
                quoted(&raw.name),
                quoted(&raw.pod_cidrs.join(" "))
            );
        }
        text.push_str("  }\n");
    }
    for Edge { a, b, path, label } in edges {
        let style = if *path == PathKind::None { ", style=dashed" } else { "" };
        let _ = writeln!(text, "  n{a} -- n{b} [label=\"{label}\"{style}];");
    }
    for (node, why) in unasked(picture) {
        let _ = writeln!(text, "  // not asked: {}: {}", printable(node), printable(why));
    }
    text.push_str("}\n");
    text
}

fn site_word(site: &str) -> &str {
    if site.is_empty() { "no site" } else { site }
}

fn unasked<'a>(picture: &'a Picture<'_>) -> impl Iterator<Item = (&'a str, &'a str)> {
    let drawn: BTreeSet<&str> = picture.nodes.iter().map(|node| node.name.as_str()).collect();
    picture.views.iter().filter_map(move |(node, view)| {
        let why = view.as_ref().err()?;
        drawn.contains(node.as_str()).then_some((node.as_str(), why.as_str()))
    })
}

#[cfg(test)]
mod tests {
    use super::super::judge::tests::node;
    use super::*;
    use crate::status;
    use crate::view::tests::sample;

    /// Node 1 was asked and reaches node 2 alone; node 3 could not be.
    fn drawn(language: Language, change: impl FnOnce(&mut Vec<RawNode>)) -> String {
        let mut nodes: Vec<RawNode> = (1..=3).map(|number| node(number).raw).collect();
        change(&mut nodes);
        let views = [
            ("node-1".to_owned(), Ok(status::build(&sample().snapshot()))),
            ("node-3".to_owned(), Err("its kubelet is behind NAT".to_owned())),
        ];
        draw(&Picture { nodes: &nodes, views: &views.into() }, language)
    }

    #[test]
    fn mermaid_shows_sites_nodes_and_the_paths_of_those_asked() {
        assert_eq!(
            drawn(Language::Mermaid, |_| {}),
            "graph LR\n  \
             subgraph s0[\"cloud-a\"]\n    \
             n0[\"node-1<br/>10.244.1.0/24\"]\n    n1[\"node-2<br/>10.244.2.0/24\"]\n  end\n  \
             subgraph s1[\"home\"]\n    n2[\"node-3<br/>10.244.3.0/24\"]\n  end\n  \
             n0 ---|\"direct 1.5 ms\"| n1\n  n0 -.-|\"no path\"| n2\n  \
             %% not asked: node-3: its kubelet is behind NAT\n"
        );
    }

    #[test]
    fn dot_shows_the_same() {
        let text = drawn(Language::Dot, |_| {});
        for line in [
            "graph mesh {",
            "  subgraph cluster_1 {",
            "    n2 [label=\"node-3\\n10.244.3.0/24\"];",
            "  n0 -- n1 [label=\"direct 1.5 ms\"];",
            "  n0 -- n2 [label=\"no path\", style=dashed];",
            "  // not asked: node-3: its kubelet is behind NAT",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn names_of_others_break_out_of_no_quotes() {
        let odd = |nodes: &mut Vec<RawNode>| {
            nodes[0].site = Some("a\"]\n  n9[\"x".into());
            nodes[2].pod_cidrs = vec!["\\\"];<script>".into()];
        };
        let text = drawn(Language::Mermaid, odd);
        assert!(text.contains("subgraph s0[\"a#quot;]   n9[#quot;x\"]"), "{text}");
        assert!(text.contains("\\#quot;];#lt;script#gt;\"]"), "{text}");
        let text = drawn(Language::Dot, odd);
        assert!(text.contains("label=\"a\\\"]   n9[\\\"x\";"), "{text}");
    }
}
