//! A lab: network namespaces that play nodes, routers and pods, and the wires between them.
//!
//! ```text
//! /run/meshd-testbed/<lab>/
//!     state.json      every namespace with the process that holds it (pid and start time), every wire
//!     <namespace>/    logs of what runs in it
//!
//! testbed ─ unshare(1) ─ holder = PID 1 of the namespaces   one per node or router
//!                          └─ whatever runs inside           dies with the holder
//! ```
//!
//! Nothing outside the holder's namespaces is touched: links, addresses, mounts, nftables and pods (bound below
//! `/run/netns` in the node's own mount namespace) end with it. So `down` is: kill the holders named in the state
//! file, remove the cgroups and disks named there and the directory. A holder waits for a word from its maker until it
//! stands in the state file and ends without it, so that no crash leaves a process that nothing names. Labs are made and
//! removed one at a time: the common folder is locked meanwhile.

mod cgroup;
mod holder;
mod machine;
mod namespace;
mod pod;
mod process;
mod state;
mod topology;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

pub use holder::{HolderOptions, hold};
pub(crate) use namespace::last_lines;
pub use namespace::{Daemon, Namespace, run_in_netns};
pub use pod::{CNI_CONFIG, Pod, PodRequest};
pub use process::ProcessRef;
use state::Turn;
pub(crate) use state::make_dir;
pub use state::{Kind, LinkState, NamespaceState, State};
pub use topology::{
    API_ADDRESS_V4, API_ADDRESS_V6, CLUSTER_CIDRS, HOME_ADDRESS_V4, Hybrid, NodePlan, Wiring,
    hybrid_plan, two_homes_plan,
};

/// Where labs keep their state; a tmpfs on every distribution, so a reboot forgets it with the namespaces.
pub const LABS_DIR: &str = "/run/meshd-testbed";

/// Who is told to end takes its lab down, which may wait 10 s for a process.
const OWNER_TIMEOUT: Duration = Duration::from_secs(20);

/// The programs a lab runs.
#[derive(Debug, Clone)]
pub struct Programs {
    pub testbed: PathBuf,
    pub meshd: PathBuf,
    pub cni: PathBuf,
    /// Started by those who need it.
    pub keyrelay: PathBuf,
}

impl Programs {
    /// All programs beside `testbed`, as cargo leaves them.
    pub fn beside(testbed: &Path) -> Result<Self> {
        let testbed = fs::canonicalize(testbed)
            .with_context(|| format!("no program {}", testbed.display()))?;
        let dir = testbed.parent().context("the testbed program has no folder")?;
        let [meshd, cni, keyrelay] = ["meshd", "meshd-cni", "keyrelay"].map(|name| dir.join(name));
        Ok(Self { meshd, cni, keyrelay, testbed })
    }

    /// Fails with the command to run when one is missing.
    pub fn check(&self) -> Result<()> {
        for program in [&self.meshd, &self.cni] {
            ensure!(
                program.is_file(),
                "{} is missing; build it: cargo build -p meshd -p meshd-cni -p testbed",
                program.display()
            );
        }
        Ok(())
    }
}

/// A running lab. Dropping it takes it down unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
    programs: Programs,
    keep: bool,
}

/// What a signal handler needs to end the lab while another thread builds it.
#[derive(Debug)]
struct Shared {
    name: String,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    wrappers: Vec<Child>,
    /// Set by `down`: nothing may be added any more.
    closed: bool,
}

/// Ends a lab from another thread, e.g. on Ctrl-C.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    pub fn down(&self) -> Result<()> {
        self.0.down()
    }
}

impl Lab {
    /// An empty lab. What a dead owner of the same name left behind is removed first; a living one and a kept lab
    /// are errors.
    pub fn create(name: &str, programs: Programs) -> Result<Self> {
        Self::create_with(name, programs, None)
    }

    /// As [`Lab::create`], of whole machines: with a disk each in `disks/<node>` that outlives a power cycle, and with
    /// cgroups of their own. `disks` is the lab's: `down` removes it. It may not lie below /etc, /opt, /run or /var/lib.
    pub fn create_machines(name: &str, programs: Programs, disks: &Path) -> Result<Self> {
        Self::create_with(name, programs, Some(disks))
    }

    /// A lab that was kept. Several may hold it at once: it is theirs to take care.
    pub fn attach(name: &str, programs: Programs) -> Result<Option<Self>> {
        require_root()?;
        check_name(name)?;
        let Some(state) = State::load(name)? else { return Ok(None) };
        let inner = Inner { state, wrappers: Vec::new(), closed: false };
        let shared = Arc::new(Shared { name: name.to_owned(), inner: Mutex::new(inner) });
        Ok(Some(Self { shared, programs, keep: true }))
    }

    fn create_with(name: &str, programs: Programs, disks: Option<&Path>) -> Result<Self> {
        require_root()?;
        check_name(name)?;
        let _turn = Turn::wait(true)?;
        if let Some(old) = State::load(name)? {
            let up = old.namespaces.iter().any(|entry| entry.holder.is_alive());
            ensure!(
                !old.owner.is_alive(),
                "lab {name} is in use by process {}: wait for it, or remove it first (--down)",
                old.owner.pid
            );
            ensure!(
                !(old.kept && up),
                "lab {name} was kept and is still up: remove it first (--down)"
            );
        }
        remove(name)?;
        let state = State { disks: disks.map(Path::to_owned), ..State::new(name)? };
        state.store()?;
        let inner = Inner { state, wrappers: Vec::new(), closed: false };
        let shared = Arc::new(Shared { name: name.to_owned(), inner: Mutex::new(inner) });
        Ok(Self { shared, programs, keep: false })
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn dir(&self) -> PathBuf {
        State::dir(&self.shared.name)
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Leaves everything running when this value goes, until [`down`].
    pub fn keep(&mut self) -> Result<()> {
        let mut inner = self.shared.open()?;
        inner.state.kept = true;
        inner.state.store()?;
        self.keep = true;
        Ok(())
    }

    /// Removes every trace of the lab.
    pub fn down(self) -> Result<()> {
        self.shared.down()
    }

    /// A new node or router: its own namespaces, held by a process of its own.
    pub fn add_namespace(&self, name: &str, kind: Kind) -> Result<Namespace> {
        check_name(name)?;
        let mut inner = self.shared.open()?;
        ensure!(inner.state.namespace(name).is_none(), "lab {} has {name} already", self.name());
        let dir = self.dir().join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let log = fs::File::create(dir.join("holder.log"))?;
        let machine = match (&inner.state.disks, kind) {
            (Some(disks), Kind::Node) => {
                Some((disks.join(name), cgroup::Groups::plan(self.name(), name)?))
            }
            _ => None,
        };
        if let Some((disk, groups)) = &machine {
            fs::create_dir_all(disk).with_context(|| format!("cannot make {}", disk.display()))?;
            let new = groups.roots.iter().filter(|group| !inner.state.cgroups.contains(group));
            let new: Vec<PathBuf> = new.cloned().collect();
            inner.state.cgroups.extend(new);
            inner.state.store()?;
            groups.create()?;
        }
        let mut wrapper = self
            .holder_command(name, kind, machine.as_ref())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot run unshare(1) from util-linux")?;
        let mut word = String::new();
        let output = wrapper.stdout.take().context("holder has no stdout")?;
        BufReader::new(output).read_line(&mut word)?;
        if word.trim() != "ready" {
            let _ = wrapper.wait();
            let log = fs::read_to_string(dir.join("holder.log")).unwrap_or_default();
            bail!("namespaces of {name} could not be made: {}", log.trim());
        }
        let holder = process::only_child_of(wrapper.id())?;
        let entry = NamespaceState {
            name: name.to_owned(),
            kind,
            wrapper: ProcessRef::of(wrapper.id())?,
            holder: ProcessRef::of(holder)?,
            groups: machine.map(|(_, groups)| groups).unwrap_or_default(),
        };
        let namespace = Namespace::new(&entry, dir);
        inner.state.namespaces.push(entry);
        inner.state.store()?;
        if let Some(entry) = inner.state.namespaces.last() {
            entry.groups.settle(wrapper.id())?;
        }
        let mut input = wrapper.stdin.take().context("holder has no stdin")?;
        input.write_all(b"go\n").context("the holder ended before it was recorded")?;
        inner.wrappers.push(wrapper);
        drop(inner);
        namespace.ip(&["link set lo up"])?;
        Ok(namespace)
    }

    /// A wire between two namespaces; `near` ends in the first. The oracle captures it at the `near` end.
    pub fn add_link(
        &self,
        near: (&Namespace, &str),
        far: (&Namespace, &str),
        underlay: bool,
    ) -> Result<()> {
        let mut inner = self.shared.open()?;
        near.0.ip(&[&format!(
            "link add {} type veth peer name {} netns {}",
            near.1,
            far.1,
            far.0.pid()
        )])?;
        near.0.ip(&[&format!("link set {} up", near.1)])?;
        far.0.ip(&[&format!("link set {} up", far.1)])?;
        inner.state.links.push(LinkState {
            namespace: near.0.name().to_owned(),
            interface: near.1.to_owned(),
            far_namespace: far.0.name().to_owned(),
            far_interface: far.1.to_owned(),
            underlay,
        });
        inner.state.store()
    }

    /// Where its machines have their disks; none where they have none.
    pub fn disks(&self) -> Result<Option<PathBuf>> {
        Ok(self.shared.open()?.state.disks.clone())
    }

    /// Every wire the oracle has to watch.
    pub fn underlay_links(&self) -> Result<Vec<LinkState>> {
        let inner = self.shared.open()?;
        Ok(inner.state.links.iter().filter(|link| link.underlay).cloned().collect())
    }

    /// A namespace of this lab by name.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        let inner = self.shared.open()?;
        let entry =
            inner.state.namespace(name).with_context(|| format!("the lab has no {name}"))?;
        Ok(Namespace::new(entry, self.dir().join(name)))
    }

    /// Ends one namespace and everything in it, as pulling the plug does.
    pub fn power_off(&self, name: &str) -> Result<()> {
        let mut inner = self.shared.open()?;
        let entry =
            inner.state.namespace(name).with_context(|| format!("the lab has no {name}"))?.clone();
        entry.holder.kill_and_wait()?;
        // The kernel takes its wires down some time later: until then their names are in use.
        for link in &inner.state.links {
            let near = (&link.namespace, &link.interface);
            let far = (&link.far_namespace, &link.far_interface);
            let (other, interface) = if *near.0 == name {
                far
            } else if *far.0 == name {
                near
            } else {
                continue;
            };
            if let Some(other) = inner.state.namespace(other) {
                // Gone already is what we want.
                let other = Namespace::new(other, self.dir().join(&other.name));
                let _ = other.ip(&[format!("link delete {interface}")]);
            }
        }
        inner.state.namespaces.retain(|other| other.name != name);
        inner.state.links.retain(|link| link.namespace != name && link.far_namespace != name);
        inner.state.store()
    }

    fn holder_command(
        &self,
        name: &str,
        kind: Kind,
        machine: Option<&(PathBuf, cgroup::Groups)>,
    ) -> Command {
        let roots = machine.map(|(_, groups)| groups.roots.as_slice()).unwrap_or_default();
        let mut command = cgroup::Groups::run_in(roots, "unshare");
        if machine.is_some() {
            command.arg("--cgroup");
        }
        command.args(["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]);
        command.args(["--mount-proc", "--propagation", "private", "--"]);
        command.arg(&self.programs.testbed).arg("holder");
        command.args(["--lab", self.name(), "--name", name, "--kind", kind.as_str()]);
        if let Some((disk, _)) = machine {
            command.arg("--disk").arg(disk);
        }
        // Its own process group: Ctrl-C on the terminal is for the testbed, which then takes the lab down.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = self.shared.down()
        {
            tracing::warn!("lab {} could not be taken down: {error:#}", self.shared.name);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.lock();
        ensure!(!inner.closed, "lab {} has been taken down", self.name);
        Ok(inner)
    }

    fn down(&self) -> Result<()> {
        let mut inner = self.lock();
        if std::mem::replace(&mut inner.closed, true) {
            return Ok(());
        }
        // Ours, even if somebody removed the state file under us.
        let ended: Result<()> =
            inner.state.namespaces.iter().try_for_each(|entry| entry.holder.kill_and_wait());
        let result = down(&self.name).and(ended);
        for wrapper in &mut inner.wrappers {
            // It ends with its holder; one that does not must not hold us up.
            let _ = wrapper.kill();
            let _ = wrapper.wait();
        }
        result
    }
}

/// Removes every trace of a lab, whoever made it; who still runs it is ended first. No lab of that name is fine.
pub fn down(name: &str) -> Result<()> {
    check_name(name)?;
    if let Some(owner) = State::load(name)?.map(|state| state.owner)
        && owner.pid != std::process::id()
        && !owner.signal_and_wait(Signal::TERM, OWNER_TIMEOUT)?
    {
        owner.kill_and_wait()?;
    }
    let Some(_turn) = Turn::wait(false)? else { return Ok(()) };
    remove(name)?;
    // The last lab takes the common folder along; another lab in it is no error.
    let _ = fs::remove_dir(LABS_DIR);
    Ok(())
}

/// As [`down`], for who holds the turn.
fn remove(name: &str) -> Result<()> {
    if let Some(state) = State::load(name)? {
        for entry in &state.namespaces {
            entry.holder.kill()?;
        }
        for entry in &state.namespaces {
            entry.holder.kill_and_wait()?;
            entry.wrapper.kill_and_wait()?;
        }
        for group in &state.cgroups {
            cgroup::remove(group)?;
        }
        if let Some(disks) = &state.disks {
            remove_folder(disks)?;
            remove_shared(disks);
        }
    }
    remove_folder(&State::dir(name))
}

fn remove_folder(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes the folder around a cluster's when it is the common one and empty; a folder somebody chose stays.
pub(crate) fn remove_shared(dir: &Path) {
    let common = Path::new(LABS_DIR).file_name().map(Path::new);
    if let (Some(parent), Some(common)) = (dir.parent(), common)
        && parent.ends_with(common)
    {
        let _ = fs::remove_dir(parent); // others may be in it
    }
}

/// One clear line for everybody who is not root.
pub fn require_root() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "network namespaces need root: run it through sudo"
    );
    Ok(())
}

/// Names become file names, interface names and host names.
fn check_name(name: &str) -> Result<()> {
    let good = !name.is_empty()
        && name.len() <= 40
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        && !name.starts_with('-');
    ensure!(good, "{name:?} is not a name: letters, digits and dashes, at most 40");
    Ok(())
}
