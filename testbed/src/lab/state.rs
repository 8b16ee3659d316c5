//! The state file of a lab: what `down` needs to know, written before anything can go wrong.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::cgroup::Groups;
use super::{LABS_DIR, ProcessRef};

/// Version of the format below.
const STATE_VERSION: u32 = 1;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub lab: String,
    /// The testbed process that made the lab; gone when the lab was kept.
    pub owner: ProcessRef,
    /// Left up on purpose: another lab of the same name must not replace it.
    #[serde(default)]
    pub kept: bool,
    pub namespaces: Vec<NamespaceState>,
    pub links: Vec<LinkState>,
    /// Where nodes have their disks; without, nodes forget everything when they are powered off.
    #[serde(default)]
    pub disks: Option<PathBuf>,
    /// Every cgroup made for a node, written before it is made.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NamespaceState {
    pub name: String,
    pub kind: Kind,
    /// The unshare(1) process around the holder.
    pub wrapper: ProcessRef,
    /// PID 1 of the namespaces, by its pid on the host.
    pub holder: ProcessRef,
    /// The node's cgroups; none for who lives in ours.
    #[serde(default)]
    pub groups: Groups,
}

/// What a namespace plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A Kubernetes node: own boot id, machine id, /etc, /opt, /run and /var/lib.
    Node,
    /// Anything else with a network stack: a router, a server.
    Router,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Router => "router",
        }
    }
}

/// A wire; captured at its near end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkState {
    pub namespace: String,
    pub interface: String,
    pub far_namespace: String,
    pub far_interface: String,
    /// Whether it carries traffic between nodes: the oracle watches it.
    pub underlay: bool,
}

impl State {
    pub fn new(lab: &str) -> Result<Self> {
        Ok(Self {
            version: STATE_VERSION,
            lab: lab.to_owned(),
            owner: ProcessRef::this()?,
            kept: false,
            namespaces: Vec::new(),
            links: Vec::new(),
            disks: None,
            cgroups: Vec::new(),
        })
    }

    pub fn dir(lab: &str) -> PathBuf {
        Path::new(LABS_DIR).join(lab)
    }

    pub fn namespace(&self, name: &str) -> Option<&NamespaceState> {
        self.namespaces.iter().find(|entry| entry.name == name)
    }

    /// The state of a lab, if there is one.
    pub fn load(lab: &str) -> Result<Option<Self>> {
        let path = Self::dir(lab).join("state.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let state: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        ensure!(
            state.version == STATE_VERSION,
            "{} has version {}, this testbed knows {STATE_VERSION}: take the lab down with the one that made it",
            path.display(),
            state.version
        );
        Ok(Some(state))
    }

    /// Replaces the file in one step: a crash leaves the old state or the new one.
    pub fn store(&self) -> Result<()> {
        let dir = Self::dir(&self.lab);
        make_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let temporary = dir.join("state.json.new");
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        fs::rename(&temporary, dir.join("state.json"))?;
        Ok(())
    }
}

/// Held while a lab of this machine is made or removed: two that begin at once must not share a name.
#[derive(Debug)]
pub(super) struct Turn(#[expect(dead_code, reason = "closing it gives the turn away")] fs::File);

impl Turn {
    /// Waits for our turn; `None` when there is no lab at all and none is to be made.
    pub(super) fn wait(make: bool) -> Result<Option<Self>> {
        loop {
            if make {
                make_dir(Path::new(LABS_DIR)).with_context(|| format!("cannot make {LABS_DIR}"))?;
            }
            let dir = match fs::File::open(LABS_DIR) {
                Ok(dir) => dir,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !make => {
                    return Ok(None);
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| format!("cannot open {LABS_DIR}")),
            };
            rustix::fs::flock(&dir, rustix::fs::FlockOperation::LockExclusive)
                .with_context(|| format!("cannot lock {LABS_DIR}"))?;
            // The last lab takes the folder along; then the next turn is at the new one.
            let now = fs::metadata(LABS_DIR).ok().map(|now| now.ino());
            if now == Some(dir.metadata()?.ino()) {
                return Ok(Some(Self(dir)));
            }
        }
    }
}

/// Another lab's `down` removes the common folder when it is empty, perhaps just before ours is made in it.
pub(crate) fn make_dir(dir: &Path) -> std::io::Result<()> {
    use std::io::ErrorKind;

    const ATTEMPTS: u32 = 100;
    for _ in 1..ATTEMPTS {
        match fs::create_dir_all(dir) {
            // The folder around it went, or went and came and went: `create_dir_all` looks at what it was told is there.
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {}
            result => return result,
        }
    }
    fs::create_dir_all(dir)
}
