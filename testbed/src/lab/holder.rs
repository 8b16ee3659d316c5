//! The process that holds the namespaces of a node: their PID 1.
//!
//! ```text
//! /run               fresh tmpfs
//! /etc /opt /var/lib overlays: the host's files below, the node's changes in its tmpfs
//! /sys               the node's own network devices
//! machine-id, boot_id  the node's own, by bind mounts
//! ```
//!
//! A node with a disk is a whole machine: see [`super::machine`].

use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};
use rustix::process::{WaitOptions, wait};

use super::{Kind, cgroup, machine};

/// Scratch folder in the node's own /run.
const SCRATCH: &str = "/run/.testbed";

/// How often an idle PID 1 looks for orphans to reap.
const REAP_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, clap::Args)]
pub struct HolderOptions {
    /// Lab the namespaces belong to
    #[arg(long)]
    pub lab: String,
    /// Name of the node; becomes its host name
    #[arg(long)]
    pub name: String,
    #[arg(long, value_enum)]
    pub kind: Kind,
    /// Folder that outlives the namespaces: makes the node a whole machine
    #[arg(long)]
    pub disk: Option<PathBuf>,
}

/// Sets the node up, says so on stdout, waits until it is on record, and reaps orphans until it is killed.
pub fn hold(options: &HolderOptions) -> Result<()> {
    rustix::system::sethostname(options.name.as_bytes()).context("cannot set the host name")?;
    let cgroups = options.disk.as_ref().map(|_| cgroup::Mounts::of_host()).transpose()?;
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).context("cannot mount /sys")?;
    let run_mode = c"mode=0755";
    mount("tmpfs", "/run", "tmpfs", MountFlags::NOSUID, Some(run_mode))
        .context("cannot mount /run")?;
    fs::create_dir_all(SCRATCH)?;
    no_address_detection()?;
    if options.kind == Kind::Node {
        let base = options.disk.as_deref().unwrap_or(Path::new(SCRATCH));
        for path in ["/etc", "/opt", "/var/lib"] {
            overlay(base, path)?;
        }
        fs::create_dir_all("/opt/cni/bin")?;
        fs::create_dir_all("/etc/cni/net.d")?;
        identity()?;
    }
    if let Some(disk) = &options.disk {
        machine::mount_real_folders(disk)?;
        machine::shield_settings(Path::new(SCRATCH))?;
        if let Some(cgroups) = &cgroups {
            cgroups.mount_again()?;
        }
        machine::share_mounts()?;
    }
    writeln!(std::io::stdout(), "ready")?;
    let mut word = String::new();
    std::io::stdin().lock().read_line(&mut word)?;
    if word.trim() != "go" {
        return Ok(()); // our maker died before it wrote us down
    }
    if let Some(cgroups) = &cgroups {
        cgroups.hand_controllers_on()?;
    }
    reap()
}

/// Addresses work at once: duplicate address detection would hold link-local ones back for over a second, and a
/// router without one cannot ask for its neighbours.
fn no_address_detection() -> Result<()> {
    for which in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/accept_dad");
        fs::write(&path, "0")
            .with_context(|| format!("cannot write {path}: is IPv6 in the kernel?"))?;
    }
    Ok(())
}

/// The node sees the host's files and writes its own, which go below `base`.
fn overlay(base: &Path, path: &str) -> Result<()> {
    let base = format!("{}{path}", base.display());
    let (upper, work) = (format!("{base}/upper"), format!("{base}/work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let data = format!("lowerdir={path},upperdir={upper},workdir={work}");
    let data = std::ffi::CString::new(data)?;
    mount("overlay", path, "overlay", MountFlags::empty(), Some(data.as_c_str())).with_context(
        || format!("cannot mount an overlay on {path}: does the kernel have overlayfs?"),
    )
}

/// Own machine id and boot id: what tells a cloned or rebooted machine from another.
fn identity() -> Result<()> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let boot_file = Path::new(SCRATCH).join("boot_id");
    fs::write(&boot_file, boot_id)?;
    // A disk from before the last power cycle brings its machine id along.
    let marker = Path::new("/etc/.testbed-machine-id");
    if !marker.exists() {
        let machine_id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.replace('-', "");
        fs::write("/etc/machine-id", machine_id)?;
        fs::write(marker, "")?;
    }
    let target = "/proc/sys/kernel/random/boot_id";
    mount_bind(&boot_file, target).context("cannot give the node its own boot id")?;
    mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"")
        .context("cannot protect the boot id")?;
    Ok(())
}

/// Orphans of the PID namespace become our children.
fn reap() -> Result<()> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::CHILD) => std::thread::sleep(REAP_INTERVAL),
            Err(error) => return Err(error).context("cannot wait for orphans"),
        }
    }
}
