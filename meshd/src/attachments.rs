//! Reads the CNI plugin's records of pod interfaces, below `<state-dir>/ipam`.
//!
//! The plugin owns the layout; we take every `*.json` below the directory that says it is an attachment, two levels
//! deep (network, attachment). A file that does not is counted and named, and the others go on.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipam::owner::RecordName;
use mesh_types::attachment::{ATTACHMENT_VERSION, Attachment};

use crate::files;

/// Attachments read: kubelets are told of at most a few hundred pods per node.
pub const ATTACHMENTS_MAX: usize = 4_096;

/// Directories below the root that are looked into: the network's, and one for the plugin's own order.
const DEPTH_MAX: usize = 2;

/// A younger record may belong to a pod the plugin is making this moment: what is missing is not missing yet.
pub const SETTLED_AFTER: Duration = Duration::from_secs(5);

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Attachments {
    /// In the order of host interface names.
    pub good: Vec<Attachment>,
    /// Files that are no attachments though their name says so, with the reason.
    pub bad: Vec<(PathBuf, String)>,
    /// Records of another boot, left out.
    pub earlier: usize,
    /// Records left out because the plugin may still be at work on them: look again after [`SETTLED_AFTER`].
    pub unsettled: usize,
}

/// Every attachment of this boot below `root`; none where there is no such directory.
pub fn read(root: &Path, boot_id: &str) -> Attachments {
    read_older(root, boot_id, Duration::ZERO)
}

/// As [`read`], without those the plugin may still be at work on.
pub fn read_settled(root: &Path, boot_id: &str) -> Attachments {
    read_older(root, boot_id, SETTLED_AFTER)
}

/// Host ends that the names of records below `root` speak of, readable or not, of whatever age.
pub fn recorded_links(root: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(root) else { return BTreeSet::new() };
    let names = entries.flatten().take(ATTACHMENTS_MAX).map(|entry| entry.file_name());
    let records = names.filter_map(|name| RecordName::parse(name.to_str()?));
    records.map(|record| record.owner.host_ifname()).collect()
}

fn read_older(root: &Path, boot_id: &str, age: Duration) -> Attachments {
    let mut found = Attachments::default();
    walk(root, 0, age, &mut found);
    let all = found.good.len();
    found.good.retain(|attachment| attachment.boot_id == boot_id);
    found.earlier = all - found.good.len();
    found.good.sort_by(|a, b| a.host_ifname.cmp(&b.host_ifname));
    found
}

fn walk(directory: &Path, depth: usize, age: Duration, found: &mut Attachments) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if found.good.len() + found.bad.len() >= ATTACHMENTS_MAX {
            return;
        }
        let path = entry.path();
        // The plugin's temporary files begin with a dot.
        let hidden = entry.file_name().as_encoded_bytes().first() == Some(&b'.');
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < DEPTH_MAX && !hidden => {
                walk(&path, depth + 1, age, found);
            }
            Ok(kind)
                if kind.is_file() && !hidden && path.extension().is_some_and(|e| e == "json") =>
            {
                if is_younger(&path, age) {
                    found.unsettled += 1;
                    continue;
                }
                match read_one(&path) {
                    Ok(Some(attachment)) => found.good.push(attachment),
                    Ok(None) => {}
                    Err(why) => found.bad.push((path, why)),
                }
            }
            _ => {}
        }
    }
}

/// A clock that was set back makes a file look young for ever: only a known, small age counts.
fn is_younger(path: &Path, age: Duration) -> bool {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.ok().and_then(|then| then.elapsed().ok()).is_some_and(|known| known < age)
}

/// `None` for a file that vanished meanwhile: the plugin removed the pod.
fn read_one(path: &Path) -> Result<Option<Attachment>, String> {
    let Some(bytes) = files::read_bounded(path).map_err(|error| format!("{error:#}"))? else {
        return Ok(None);
    };
    let attachment: Attachment =
        serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if attachment.version != ATTACHMENT_VERSION {
        return Err(format!("has version {}", attachment.version));
    }
    Ok(Some(attachment))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(host: &str, boot: &str) -> Attachment {
        Attachment {
            version: ATTACHMENT_VERSION,
            network: "mesh".into(),
            container_id: "c1".into(),
            ifname: "eth0".into(),
            netns: "/run/netns/x".into(),
            netns_inode: 1,
            boot_id: boot.into(),
            host_ifname: host.into(),
            pod_mac: "02:00:00:00:00:01".into(),
            addresses: vec!["10.244.1.2".parse().expect("address")],
            mtu: None,
        }
    }

    #[test]
    fn good_records_of_this_boot_are_read_and_bad_ones_named() {
        let dir = tempfile::tempdir().expect("scratch");
        let network = dir.path().join("mesh/attachments");
        std::fs::create_dir_all(&network).expect("directories");
        let write =
            |name: &str, text: String| std::fs::write(network.join(name), text).expect("write");
        let json = |a: &Attachment| serde_json::to_string(a).expect("json");
        write("b.json", json(&sample("meshp2", "now")));
        write("a.json", json(&sample("meshp1", "now")));
        write("old.json", json(&sample("meshp0", "before")));
        write("bad.json", "{".into());
        write(".tmp.json", "{".into());
        write("lock", String::new());
        let found = read(dir.path(), "now");
        let names: Vec<_> = found.good.iter().map(|a| a.host_ifname.as_str()).collect();
        assert_eq!(names, ["meshp1", "meshp2"]);
        assert_eq!(found.earlier, 1);
        assert_eq!(found.bad.len(), 1);
        assert!(found.bad[0].0.ends_with("bad.json"));
    }

    #[test]
    fn a_record_the_plugin_has_just_written_is_not_settled() {
        let dir = tempfile::tempdir().expect("scratch");
        let text = serde_json::to_string(&sample("meshp1", "now")).expect("json");
        std::fs::write(dir.path().join("a.json"), text).expect("write");
        let young = read_settled(dir.path(), "now");
        assert_eq!((young.good.len(), young.bad.len()), (0, 0));
        assert!(young.unsettled > 0, "somebody has to look again");
        assert_eq!(read(dir.path(), "now").good.len(), 1);
    }

    #[test]
    fn no_directory_means_no_pods() {
        assert_eq!(read(Path::new("/nonexistent"), "now"), Attachments::default());
    }
}
