//! The mesh as a picture: sites as groups, every link with its latency and path.

use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::fmt::Write;
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use mesh_types::status::PathKind;

use crate::cluster::Cluster;
use crate::traffic::{PairResult, Protocol};

/// What is drawn.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    pub nodes: Vec<PictureNode>,
    pub links: Vec<PictureLink>,
}

#[derive(Debug, Clone)]
pub struct PictureNode {
    pub name: String,
    pub site: String,
    pub key: String,
    pub pods: usize,
}

/// A link between two nodes, by name.
#[derive(Debug, Clone)]
pub struct PictureLink {
    pub ends: (String, String),
    pub latency_ms: Option<f64>,
    pub path: PathKind,
}

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 780.0;
const CENTRE: (f64, f64) = (500.0, 400.0);
const RADII: (f64, f64) = (365.0, 235.0);
const NODE_DISTANCE: f64 = 215.0;
const NODE_RADIUS: f64 = 44.0;

/// One colour per site, readable on white and told apart by colour-blind people (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#e69f00"];

/// Collects keys, paths and latencies from the running cluster.
pub(super) fn of(cluster: &Cluster, pairs: &[PairResult]) -> Result<Picture> {
    let node_of: BTreeMap<&str, &str> =
        cluster.pods.iter().map(|pod| (pod.name.as_str(), pod.node.name())).collect();
    let mut picture = Picture::default();
    for (plan, _) in &cluster.net.nodes {
        let status = cluster.status(&plan.name)?;
        picture.nodes.push(PictureNode {
            name: plan.name.clone(),
            site: plan.site_title.clone(),
            key: status.public_key.short(),
            pods: node_of.values().filter(|node| **node == plan.name).count(),
        });
        for peer in status.peers {
            let ends = (plan.name.clone(), peer.node.to_string());
            // Both ends report the link; each is drawn once.
            if ends.0 < ends.1 {
                let between = |pair: &&PairResult| {
                    let nodes = (node_of.get(pair.from.as_str()), node_of.get(pair.to.as_str()));
                    nodes == (Some(&ends.0.as_str()), Some(&ends.1.as_str()))
                        || nodes == (Some(&ends.1.as_str()), Some(&ends.0.as_str()))
                };
                let echoes =
                    pairs.iter().filter(|pair| pair.protocol == Protocol::Icmp).filter(between);
                let latency_ms = echoes.filter_map(|pair| pair.rtt_ms).min_by(f64::total_cmp);
                picture.links.push(PictureLink { latency_ms, path: peer.path, ends });
            }
        }
    }
    Ok(picture)
}

/// Whether a picture can go to `path`: asked before a minute of work.
pub(super) fn check_place(path: &Path) -> Result<()> {
    ensure!(!path.is_dir(), "{} is a folder: name a file for the picture", path.display());
    let folder = folder(path);
    ensure!(folder.is_dir(), "there is no folder {} for the picture", folder.display());
    Ok(())
}

/// Writes the picture, for whoever called sudo. It replaces a file in one step and never writes through a link that
/// somebody laid where everybody may write; what is no file (a pipe, /dev/null) is written to.
pub(super) fn write(path: &Path, picture: &Picture) -> Result<()> {
    let describe = || format!("cannot write the picture {}", path.display());
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return fs::write(path, picture.to_svg()).with_context(describe);
    }
    let mut file = tempfile::Builder::new()
        .prefix(".mesh-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder(path))
        .with_context(describe)?;
    file.write_all(picture.to_svg().as_bytes()).with_context(describe)?;
    let id = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        std::os::unix::fs::fchown(file.as_file(), Some(user), Some(group))
            .with_context(describe)?;
    }
    file.persist(path).with_context(describe)?;
    Ok(())
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

impl Picture {
    pub fn to_svg(&self) -> String {
        let places = self.places();
        let mut svg = String::new();
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"Inter, 'Segoe UI', 'DejaVu Sans', sans-serif\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fbfcfe\"/>\n\
             <text x=\"40\" y=\"52\" font-size=\"24\" font-weight=\"600\" fill=\"#1b2733\">The mesh</text>\n\
             <text x=\"40\" y=\"78\" font-size=\"14\" fill=\"#5b6b7b\">{} nodes, {} encrypted links, \
             round trips between pods</text>\n",
            self.nodes.len(),
            self.links.len()
        );
        self.draw_sites(&mut svg, &places);
        for link in &self.links {
            draw_line(&mut svg, &places, link);
        }
        for node in &self.nodes {
            self.draw_node(&mut svg, &places, node);
        }
        draw_labels(&mut svg, &places, &self.links);
        draw_legend(&mut svg);
        svg.push_str("</svg>\n");
        svg
    }

    /// Sites stand on an ellipse, the nodes of one across its radius, so that no link hides behind another.
    fn places(&self) -> BTreeMap<&str, (f64, f64)> {
        let sites = self.sites();
        let mut places = BTreeMap::new();
        for (at, site) in sites.iter().enumerate() {
            let angle = TAU * at as f64 / sites.len() as f64 - TAU * 5.0 / 12.0;
            let centre = (CENTRE.0 + RADII.0 * angle.cos(), CENTRE.1 + RADII.1 * angle.sin());
            let nodes: Vec<&PictureNode> =
                self.nodes.iter().filter(|node| node.site == *site).collect();
            let first = -0.5 * NODE_DISTANCE * (nodes.len() as f64 - 1.0);
            for (number, node) in nodes.iter().enumerate() {
                let along = first + NODE_DISTANCE * number as f64;
                let place = (centre.0 - along * angle.sin(), centre.1 + along * angle.cos());
                places.insert(node.name.as_str(), place);
            }
        }
        places
    }

    fn sites(&self) -> Vec<&str> {
        let mut sites: Vec<&str> = Vec::new();
        for node in &self.nodes {
            if !sites.contains(&node.site.as_str()) {
                sites.push(&node.site);
            }
        }
        sites
    }

    fn colour(&self, site: &str) -> &'static str {
        let at = self.sites().iter().position(|other| *other == site).unwrap_or(0);
        COLOURS[at % COLOURS.len()]
    }

    fn draw_sites(&self, svg: &mut String, places: &BTreeMap<&str, (f64, f64)>) {
        const MARGIN: f64 = 74.0;
        for site in self.sites() {
            let points: Vec<(f64, f64)> = self
                .nodes
                .iter()
                .filter(|node| node.site == site)
                .filter_map(|node| places.get(node.name.as_str()).copied())
                .collect();
            let bound = |pick: fn(&(f64, f64)) -> f64, start: f64, choose: fn(f64, f64) -> f64| {
                points.iter().map(pick).fold(start, choose)
            };
            let (left, right) =
                (bound(|p| p.0, f64::MAX, f64::min), bound(|p| p.0, f64::MIN, f64::max));
            let (top, bottom) =
                (bound(|p| p.1, f64::MAX, f64::min), bound(|p| p.1, f64::MIN, f64::max));
            let colour = self.colour(site);
            // Links come from the middle of the page: the title stands on the other side.
            let below = top > CENTRE.1;
            let title_y = if below { bottom + MARGIN - 12.0 } else { top - MARGIN + 22.0 };
            let _ = write!(
                svg,
                "<rect x=\"{:.0}\" y=\"{:.0}\" width=\"{:.0}\" height=\"{:.0}\" rx=\"28\" fill=\"{colour}\" \
                 fill-opacity=\"0.07\" stroke=\"{colour}\" stroke-opacity=\"0.45\" stroke-width=\"1.5\"/>\n\
                 <text x=\"{:.0}\" y=\"{:.0}\" font-size=\"15\" font-weight=\"600\" fill=\"{colour}\">{}</text>\n",
                left - MARGIN,
                top - MARGIN,
                right - left + 2.0 * MARGIN,
                bottom - top + 2.0 * MARGIN,
                left - MARGIN + 20.0,
                title_y,
                escape(site),
            );
        }
    }

    fn draw_node(&self, svg: &mut String, places: &BTreeMap<&str, (f64, f64)>, node: &PictureNode) {
        let Some((x, y)) = places.get(node.name.as_str()) else { return };
        let colour = self.colour(&node.site);
        let _ = write!(
            svg,
            "<circle cx=\"{x:.0}\" cy=\"{y:.0}\" r=\"{NODE_RADIUS}\" fill=\"#ffffff\" stroke=\"{colour}\" \
             stroke-width=\"3\"/>\n\
             <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"18\" font-weight=\"600\" \
             fill=\"#1b2733\">{}</text>\n\
             <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"11\" \
             font-family=\"'JetBrains Mono', 'DejaVu Sans Mono', monospace\" fill=\"#5b6b7b\">{}…</text>\n\
             <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"11\" fill=\"#5b6b7b\">{} pods</text>\n",
            y - 8.0,
            escape(&node.name),
            y + 9.0,
            escape(&node.key),
            y + 25.0,
            node.pods,
        );
    }
}

/// Colour, dashes and word of a path.
fn style(path: PathKind) -> (&'static str, &'static str, &'static str) {
    match path {
        PathKind::Direct => ("#3a7d44", "", "direct"),
        PathKind::Roamed => ("#2a6f97", "", "NAT"),
        PathKind::Relayed => ("#b7791f", " stroke-dasharray=\"8 5\"", "relayed"),
        PathKind::None => ("#c53030", " stroke-dasharray=\"2 6\"", "no path"),
    }
}

fn ends(
    places: &BTreeMap<&str, (f64, f64)>,
    link: &PictureLink,
) -> Option<((f64, f64), (f64, f64))> {
    Some((*places.get(link.ends.0.as_str())?, *places.get(link.ends.1.as_str())?))
}

fn draw_line(svg: &mut String, places: &BTreeMap<&str, (f64, f64)>, link: &PictureLink) {
    let Some((from, to)) = ends(places, link) else { return };
    let (colour, dashes, _) = style(link.path);
    let _ = writeln!(
        svg,
        "<line x1=\"{:.0}\" y1=\"{:.0}\" x2=\"{:.0}\" y2=\"{:.0}\" stroke=\"{colour}\" stroke-width=\"2.5\" \
         stroke-opacity=\"0.75\"{dashes}/>",
        from.0, from.1, to.0, to.1
    );
}

/// A rectangle a label covers: left, top, right, bottom.
type Box4 = (f64, f64, f64, f64);

/// Labels slide along their line until they cover neither another label nor a node, or stay in the middle.
fn draw_labels(svg: &mut String, places: &BTreeMap<&str, (f64, f64)>, links: &[PictureLink]) {
    const ALONG: [f64; 9] = [0.5, 0.42, 0.58, 0.34, 0.66, 0.28, 0.72, 0.22, 0.78];
    let mut taken: Vec<Box4> = places
        .values()
        .map(|(x, y)| (x - NODE_RADIUS, y - NODE_RADIUS, x + NODE_RADIUS, y + NODE_RADIUS))
        .collect();
    for link in links {
        let Some((from, to)) = ends(places, link) else { continue };
        let text = label(link);
        let width = 6.6 * text.chars().count() as f64 + 16.0;
        let at = |along: f64| (from.0 + along * (to.0 - from.0), from.1 + along * (to.1 - from.1));
        let cover = |(x, y): (f64, f64)| (x - width / 2.0, y - 12.0, x + width / 2.0, y + 12.0);
        let free = |place: &(f64, f64)| !taken.iter().any(|other| overlap(*other, cover(*place)));
        let place = ALONG.into_iter().map(at).find(free).unwrap_or_else(|| at(ALONG[0]));
        taken.push(cover(place));
        draw_label(svg, place, width, &text, style(link.path).0);
    }
}

fn overlap(a: Box4, b: Box4) -> bool {
    a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
}

fn label(link: &PictureLink) -> String {
    let word = style(link.path).2;
    match link.latency_ms {
        Some(latency) => format!("{latency:.2} ms · {word}"),
        None => word.to_owned(),
    }
}

fn draw_label(svg: &mut String, (x, y): (f64, f64), width: f64, text: &str, colour: &str) {
    let _ = write!(
        svg,
        "<rect x=\"{:.0}\" y=\"{:.0}\" width=\"{width:.0}\" height=\"22\" rx=\"11\" fill=\"#ffffff\" \
         stroke=\"{colour}\" stroke-opacity=\"0.6\"/>\n\
         <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"12\" fill=\"#1b2733\">{text}</text>\n",
        x - width / 2.0,
        y - 11.0,
        y + 4.0
    );
}

fn draw_legend(svg: &mut String) {
    let mut x = 40.0;
    for path in [PathKind::Direct, PathKind::Roamed, PathKind::Relayed, PathKind::None] {
        let (colour, dashes, word) = style(path);
        let y = HEIGHT - 28.0;
        let _ = write!(
            svg,
            "<line x1=\"{x:.0}\" y1=\"{y:.0}\" x2=\"{:.0}\" y2=\"{y:.0}\" stroke=\"{colour}\" stroke-width=\"3\"{dashes}/>\n\
             <text x=\"{:.0}\" y=\"{:.0}\" font-size=\"13\" fill=\"#5b6b7b\">{word}</text>\n",
            x + 36.0,
            x + 44.0,
            y + 4.0
        );
        x += 150.0;
    }
}

/// Names come from the cluster; in the picture they are text.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Picture {
        let node = |name: &str, site: &str| PictureNode {
            name: name.into(),
            site: site.into(),
            key: "xTIBA5rb".into(),
            pods: 2,
        };
        let names = ["a1", "a2", "b1", "b2", "c1"];
        let sites = ["cloud A", "cloud A", "cloud B", "cloud B", "home <C>"];
        let mut links = Vec::new();
        for (at, from) in names.iter().enumerate() {
            for to in &names[at + 1..] {
                let path = if *to == "c1" { PathKind::Roamed } else { PathKind::Direct };
                let ends = ((*from).to_owned(), (*to).to_owned());
                links.push(PictureLink { ends, latency_ms: Some(0.42), path });
            }
        }
        Picture {
            nodes: names.iter().zip(sites).map(|(name, site)| node(name, site)).collect(),
            links,
        }
    }

    #[test]
    fn every_site_node_and_link_is_in_the_picture() {
        let svg = sample().to_svg();
        assert_eq!(svg.matches("<circle").count(), 5);
        assert_eq!(svg.matches("0.42 ms · direct").count(), 6);
        assert_eq!(svg.matches("0.42 ms · NAT").count(), 4);
        assert!(svg.contains("cloud A") && svg.contains("home &lt;C&gt;") && !svg.contains("<C>"));
    }

    #[test]
    fn nothing_is_drawn_outside_the_page_or_on_another_node() {
        let sample = sample();
        let places: Vec<(f64, f64)> = sample.places().into_values().collect();
        for (at, place) in places.iter().enumerate() {
            assert!((60.0..WIDTH - 60.0).contains(&place.0), "{place:?}");
            assert!((110.0..HEIGHT - 60.0).contains(&place.1), "{place:?}");
            for other in &places[at + 1..] {
                let distance = (place.0 - other.0).hypot(place.1 - other.1);
                assert!(distance > 3.0 * NODE_RADIUS, "{place:?} and {other:?}");
            }
        }
    }

    #[test]
    fn the_picture_replaces_a_file_or_link_and_writes_into_what_is_neither() {
        let folder = tempfile::tempdir().expect("a folder");
        let (picture, other) = (folder.path().join("mesh.svg"), folder.path().join("other"));
        fs::write(&other, "kept").expect("written");
        std::os::unix::fs::symlink(&other, &picture).expect("a link");
        write(&picture, &sample()).expect("written");
        assert_eq!(fs::read_to_string(&other).expect("read"), "kept", "written through a link");
        assert!(fs::read_to_string(&picture).expect("read").contains("cloud A"));
        assert_eq!(fs::metadata(&picture).expect("there").permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 2, "no scratch file");
        write(Path::new("/dev/null"), &sample()).expect("swallowed");
        assert!(!fs::metadata("/dev/null").expect("there").is_file());
    }

    #[test]
    fn a_place_for_the_picture_is_asked_for_beforehand() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(check_place(folder.path()).is_err());
        assert!(check_place(&folder.path().join("none/mesh.svg")).is_err());
        assert!(check_place(&folder.path().join("mesh.svg")).is_ok());
        assert!(check_place(Path::new("mesh.svg")).is_ok());
    }

    #[test]
    fn an_empty_mesh_is_a_picture_too() {
        assert!(Picture::default().to_svg().ends_with("</svg>\n"));
    }
}
