//! What makes a node a whole machine: disks that outlive a power cycle, cgroups and kernel settings of its own.
//!
//! ```text
//! <disk>/etc /opt /var/lib          what the node changed in them, over the host's files
//! <disk>/containerd kubelet …       real folders: an overlay cannot hold the overlays of containers
//! ```

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount};

/// Folders of the node with a real folder of its disk on them.
const REAL_FOLDERS: [(&str, &str); 4] = [
    ("/var/lib/containerd", "containerd"),
    ("/var/lib/kubelet", "kubelet"),
    ("/var/lib/meshd", "meshd"),
    ("/var/log", "log"),
];

/// Settings of the whole machine below that a kubelet would change, with the values it wants to see: the node sees
/// these, and the machine keeps its own.
const SETTINGS: [(&str, &str); 6] = [
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// The node's real folders; its overlays stand already.
pub(super) fn mount_real_folders(disk: &Path) -> Result<()> {
    for (path, name) in REAL_FOLDERS {
        let folder = disk.join(name);
        fs::create_dir_all(&folder)?;
        fs::create_dir_all(path)?;
        mount_bind(&folder, path).with_context(|| format!("cannot bind a folder on {path}"))?;
    }
    Ok(())
}

/// Files over the settings; `scratch` holds them.
pub(super) fn shield_settings(scratch: &Path) -> Result<()> {
    for (name, value) in SETTINGS {
        let target = Path::new("/proc/sys").join(name);
        if !target.exists() {
            continue; // a kernel without it: nothing to shield
        }
        let file = scratch.join(name.replace('/', "."));
        fs::write(&file, format!("{value}\n"))?;
        mount_bind(&file, &target)
            .and_then(|()| mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, c""))
            .with_context(|| format!("cannot shield {}", target.display()))?;
    }
    Ok(())
}

/// Containers may ask for mounts that travel between them and the node; last of all.
pub(super) fn share_mounts() -> Result<()> {
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("cannot share the node's mounts")
}
