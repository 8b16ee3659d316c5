//! Cgroups of a machine: a group of its own in every hierarchy, which it sees as the root.
//!
//! ```text
//! version 1   <hierarchy><our own group>/meshd-testbed-<lab>-<name>      processes are in it
//! version 2   <mount>/meshd-testbed-<lab>-<name>/init                    processes are in init: groups that hand
//!                                                                        controllers on may hold none themselves
//! ```

use std::ffi::{CString, OsStr};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

/// How long a group may stay busy after its last process was killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// Groups below a group that are removed with it; a machine with its pods has a few hundred.
const DEEPEST: usize = 32;

/// Where mounts inside a machine go.
const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// The group that is mounted there.
    root: String,
    /// `cpu`, `cpu,cpuacct`, `name=systemd`; empty for version 2.
    controllers: String,
}

/// The groups of one machine, as paths of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Its root groups.
    pub roots: Vec<PathBuf>,
    /// Where its processes are.
    pub leaves: Vec<PathBuf>,
}

impl Groups {
    /// Where the groups of a machine will be; nothing is made yet.
    pub(super) fn plan(lab: &str, name: &str) -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let leaf = format!("meshd-testbed-{lab}-{name}");
        let hierarchies = hierarchies()?;
        let roots: Vec<PathBuf> = hierarchies
            .iter()
            .map(|hierarchy| {
                let own = hierarchy.own_group(&own);
                hierarchy.mount.join(own.trim_start_matches('/')).join(&leaf)
            })
            .collect();
        let unified = hierarchies.iter().any(Hierarchy::is_unified);
        let leaves = match unified {
            true => roots.iter().map(|root| root.join("init")).collect(),
            false => roots.clone(),
        };
        Ok(Self { roots, leaves })
    }

    /// Makes them. What a machine of the same name left behind is removed first: groups of dead pods slow kubelet down.
    pub(super) fn create(&self) -> Result<()> {
        for root in &self.roots {
            remove(root)?;
            fs::create_dir(root)
                .with_context(|| format!("cannot make the cgroup {}", root.display()))?;
            // A new cpuset group allows nothing until it is told otherwise.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (ours, theirs) = (root.join(file), root.with_file_name(file));
                if let Ok(allowed) = fs::read_to_string(theirs)
                    && ours.exists()
                {
                    fs::write(&ours, allowed.trim())
                        .with_context(|| format!("cannot write {}", ours.display()))?;
                }
            }
        }
        for leaf in &self.leaves {
            fs::create_dir_all(leaf)
                .with_context(|| format!("cannot make the cgroup {}", leaf.display()))?;
        }
        Ok(())
    }

    /// Moves a process that began in the root groups to where the others are.
    pub(super) fn settle(&self, pid: u32) -> Result<()> {
        if self.leaves == self.roots {
            return Ok(());
        }
        for leaf in &self.leaves {
            fs::write(leaf.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("cannot join the cgroup {}", leaf.display()))?;
        }
        Ok(())
    }

    /// A command that runs `program` in groups: root ones for who makes the cgroup namespace, leaves for all others.
    pub(super) fn run_in(groups: &[PathBuf], program: &str) -> Command {
        if groups.is_empty() {
            return Command::new(program);
        }
        // A shell, because only a process can move itself before it becomes another program.
        let script = "count=$1; shift
            while [ $count -gt 0 ]; do echo 0 > \"$1/cgroup.procs\"; shift; count=$((count - 1)); done
            exec \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-ec", script, "sh"]).arg(groups.len().to_string());
        command.args(groups.iter().map(|group| group.as_os_str()).collect::<Vec<&OsStr>>());
        command.arg(program);
        command
    }
}

impl Hierarchy {
    fn is_unified(&self) -> bool {
        self.controllers.is_empty()
    }

    /// The group this process is in, relative to what is mounted. Version 2 allows no groups with controllers below one
    /// with processes, except at the root.
    fn own_group(&self, proc_self_cgroup: &str) -> String {
        if self.is_unified() {
            return String::new();
        }
        let path = proc_self_cgroup.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let controllers = parts.nth(1)?;
            (controllers == self.controllers).then(|| parts.next().unwrap_or_default())
        });
        let path = path.unwrap_or("/");
        let inside = path.strip_prefix(self.root.trim_end_matches('/')).unwrap_or("/");
        if inside.contains("..") { String::new() } else { inside.to_owned() }
    }
}

/// The hierarchies machines get: those of version 1 where they carry the controllers, else version 2.
fn hierarchies() -> Result<Vec<Hierarchy>> {
    let found = parse(&fs::read_to_string("/proc/self/mountinfo")?);
    ensure!(!found.is_empty(), "no cgroups are mounted: a kubelet cannot run without");
    Ok(found)
}

/// Reads /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut old = Vec::new();
    let mut unified = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(root), Some(mount), Some(kind)) = (left.get(3), left.get(4), right.first())
        else {
            continue;
        };
        let options = right.get(2).copied().unwrap_or_default().split(',');
        let controllers: Vec<&str> = options
            .filter(|option| {
                !matches!(*option, "rw" | "ro" | "xattr" | "noprefix" | "clone_children")
                    && !option.starts_with("release_agent=")
            })
            .collect();
        let (mount, root) = (PathBuf::from(mount), (*root).to_owned());
        match *kind {
            "cgroup" => old.push(Hierarchy { mount, root, controllers: controllers.join(",") }),
            "cgroup2" => unified.push(Hierarchy { mount, root, controllers: String::new() }),
            _ => {}
        }
    }
    let carries_memory =
        |hierarchy: &Hierarchy| hierarchy.controllers.split(',').any(|c| c == "memory");
    if old.iter().any(carries_memory) {
        return old;
    }
    // A path may be mounted over; the last mount is the one that is seen.
    unified.pop().into_iter().collect()
}

/// The hierarchies of the host, read before the machine's own /sys hides them.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Hierarchy>);

impl Mounts {
    pub(super) fn of_host() -> Result<Self> {
        hierarchies().map(Self)
    }

    /// Mounts them again on the machine's own /sys, where the cgroup namespace makes its groups the roots.
    pub(super) fn mount_again(&self) -> Result<()> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        if self.0.iter().any(Hierarchy::is_unified) {
            return mount("cgroup2", MOUNT_POINT, "cgroup2", flags, None)
                .context("cannot mount cgroups");
        }
        mount("tmpfs", MOUNT_POINT, "tmpfs", flags, Some(c"mode=0755"))
            .context("cannot mount a folder for cgroups")?;
        for hierarchy in &self.0 {
            let name = hierarchy.mount.file_name().context("a cgroup mount without a name")?;
            let target = Path::new(MOUNT_POINT).join(name);
            fs::create_dir_all(&target)?;
            let data = CString::new(hierarchy.controllers.as_str())?;
            mount("cgroup", &target, "cgroup", flags, Some(data.as_c_str()))
                .with_context(|| format!("cannot mount the cgroups {}", hierarchy.controllers))?;
            for controller in hierarchy.controllers.split(',') {
                let alias = Path::new(MOUNT_POINT).join(controller);
                if !alias.exists() && !controller.contains('=') {
                    std::os::unix::fs::symlink(name, &alias)?;
                }
            }
        }
        Ok(())
    }

    /// Version 2: the machine's first process leaves the root group, which can then hand its controllers on. Whoever
    /// else began in the root group must have left it.
    pub(super) fn hand_controllers_on(&self) -> Result<()> {
        if self.0.iter().any(Hierarchy::is_unified) { hand_on() } else { Ok(()) }
    }
}

fn hand_on() -> Result<()> {
    let root = Path::new(MOUNT_POINT);
    fs::create_dir_all(root.join("init"))?;
    fs::write(root.join("init/cgroup.procs"), "0").context("cannot leave the root cgroup")?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    for controller in controllers.split_whitespace() {
        fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("cannot hand the cgroup controller {controller} on"))?;
    }
    Ok(())
}

/// Removes a group with everything below it, once its processes are gone.
pub(super) fn remove(group: &Path) -> Result<()> {
    let end = Instant::now() + EMPTY_TIMEOUT;
    loop {
        match remove_once(group, 0) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => {
                return Err(error)
                    .with_context(|| format!("cannot remove the cgroup {}", group.display()));
            }
            // Killed processes leave their group a little after they are gone.
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn remove_once(group: &Path, depth: usize) -> std::io::Result<()> {
    let entries = match fs::read_dir(group) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    if depth < DEEPEST {
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                remove_once(&entry.path(), depth + 1)?;
            }
        }
    }
    fs::remove_dir(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_version_1_win_where_they_carry_the_controllers() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            35 31 0:32 /a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let found = parse(mounts);
        let controllers: Vec<&str> = found.iter().map(|one| one.controllers.as_str()).collect();
        assert_eq!(controllers, ["cpu,cpuacct", "memory", "name=systemd"]);
        let own = "5:memory:/a/b\n4:cpu,cpuacct:/\n1:name=systemd:/../x\n0::/";
        let groups: Vec<String> = found.iter().map(|one| one.own_group(own)).collect();
        assert_eq!(groups, ["/", "/b", ""]);
    }

    #[test]
    fn version_2_alone_is_used_from_its_root() {
        let found = parse("24 1 0:22 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].own_group("0::/user.slice/session-1.scope"), "");
        assert_eq!(parse("22 1 0:20 / /proc rw - proc proc rw"), []);
    }
}
