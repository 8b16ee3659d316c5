//! `meshd uninstall`: takes away everything of ours.
//!
//! ```text
//! node file, ADDs under way ─> CNI (--cni) ─> pod links (--force) ─> routes, rules, TUN ─> source filter
//!     ──all gone──> guard ─> key, state ─> installed.json
//!     └─otherwise─> guard and files stay for the next try
//! ```
//!
//! Pods come first: without the node file the CNI plugin attaches no new one, and what it is attaching is waited for and
//! counts. The guard goes after what it guards, so that nothing leaves in clear meanwhile; what says which names to look for
//! goes last. Sysctls stay: others may rely on forwarding by now.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use mesh_types::defaults;

use crate::args::UninstallArgs;
use crate::config::{self, Kernel, Paths};
use crate::files;
use crate::reconcile::marks;
use crate::{cni_install, host_copy, installed, lock, preflight};

/// Files of ours in the state directory besides those [`Paths`] names.
const DAMAGED_MARK: &str = ".damaged-";

/// Of the daemon's routes and of the plugin's.
const ROUTE_PROTOCOLS: [u8; 2] = [defaults::ROUTE_PROTOCOL, defaults::ROUTE_PROTOCOL_CNI];

/// The flag that the copy on the host, of another version perhaps, is not told.
const BY_HOST_COPY: &str = "--by-host-copy";

/// What there is to remove.
struct Plan {
    paths: Paths,
    /// Names from the flags, and from what was installed where that differs.
    kernels: Vec<Kernel>,
    /// Host interfaces of pods, to go as well.
    pod_links: Vec<String>,
    /// The plugin and its configuration.
    cni: Option<cni_install::Wanted>,
    /// Where a daemon that was killed leaves the socket of its device.
    uapi_dir: Option<PathBuf>,
}

/// An ADD of the plugin under way ends within this time, or something is wrong with it: kubelets give a pod no more.
const ADD_TIMEOUT: Duration = Duration::from_secs(30);
const ADD_POLL: Duration = Duration::from_millis(50);

/// What stays on the node.
const STAYS: &str = "sysctls stay as they are (net.ipv4.ip_forward, net.ipv6.conf.all.forwarding, accept_ra): \
                     a reboot brings back those of the system";

/// `meshd uninstall`.
pub fn run(args: &UninstallArgs) -> anyhow::Result<()> {
    let mut plan = plan(args)?;
    if args.by_host_copy {
        let words = std::env::args_os().skip(1).filter(|word| word != BY_HOST_COPY);
        host_copy::become_it(&plan.paths.state_dir.join(host_copy::FOLDER), words);
    }
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    preflight::check_capability(&status)?;
    let _lock = match plan.paths.state_dir.is_dir() {
        true => Some(lock::take(&plan.paths.lock(), Duration::ZERO)?),
        false => None,
    };
    plan.pod_links = pod_links()?;
    let mut out = std::io::stdout().lock();
    let found = found(&plan)?;
    if args.dry_run {
        return tell(&mut out, "would remove", &found);
    }
    refuse_pods(&plan, args.force)?;
    // One may have come since, and after this none comes any more.
    close_to_pods(&plan.paths, ADD_TIMEOUT)?;
    plan.pod_links = pod_links()?;
    refuse_pods(&plan, args.force)?;
    let failures = remove_all(&plan);
    if !failures.is_empty() {
        bail!("not everything could be removed, try again: {}", failures.join("; "));
    }
    tell(&mut out, "removed", &found)
}

fn tell(out: &mut impl std::io::Write, done: &str, found: &[String]) -> anyhow::Result<()> {
    match found {
        [] => writeln!(out, "nothing of ours is on this node"),
        found => writeln!(out, "{done} {}\n{STAYS}", found.join(", ")),
    }
    .context("print")
}

fn plan(args: &UninstallArgs) -> anyhow::Result<Plan> {
    let paths = config::paths(&args.places)?;
    let mut kernels = vec![config::kernel(&args.kernel)?];
    match installed::read(&paths.installed()) {
        Ok(Some(installed)) => {
            for kernel in [installed.kernel()].into_iter().chain(installed.previous) {
                if !kernels.contains(&kernel) {
                    kernels.push(kernel);
                }
            }
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(error = format!("{error:#}"), "going by the flags alone"),
    }
    let uapi_dir = config::uapi_dir(&args.uapi)?;
    Ok(Plan { paths, kernels, pod_links: Vec::new(), cni: config::cni_to_remove(args)?, uapi_dir })
}

fn refuse_pods(plan: &Plan, force: bool) -> anyhow::Result<()> {
    ensure!(
        plan.pod_links.is_empty() || force,
        "{} pods are attached ({}): drain the node first, or pass --force to cut them off",
        plan.pod_links.len(),
        plan.pod_links.iter().take(3).cloned().collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

/// No pod is attached after this. The plugin looks for the node file once more when it has claimed its record: one that claims
/// later finds none, and one that claimed before is waited for.
fn close_to_pods(paths: &Paths, patience: Duration) -> anyhow::Result<()> {
    let node_file = paths.node_file();
    ignore_missing(std::fs::remove_file(&node_file))
        .with_context(|| format!("remove {}", node_file.display()))?;
    let end = Instant::now() + patience;
    while let Some(record) = claimed_record(&paths.ipam())? {
        ensure!(
            Instant::now() < end,
            "the CNI plugin still attaches a pod ({}): try again",
            record.display()
        );
        std::thread::sleep(ADD_POLL);
    }
    Ok(())
}

/// A record some ADD holds, see the crate `ipam`.
fn claimed_record(ipam: &Path) -> anyhow::Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(ipam) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("read {}", ipam.display()))?,
    };
    let records = entries.flatten().map(|entry| entry.path());
    for record in records.filter(|path| path.extension().is_some_and(|it| it == "json")) {
        // One that went meanwhile is nobody's.
        let Ok(file) = std::fs::File::open(&record) else { continue };
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(Some(record)),
            Err(std::fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", record.display()));
            }
        }
    }
    Ok(None)
}

/// What of ours is there, in words.
fn found(plan: &Plan) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    if !plan.pod_links.is_empty() {
        found.push(format!("links of {} pods", plan.pod_links.len()));
    }
    for Kernel { tun, table, rule_priority, .. } in &plan.kernels {
        let device = netcfg::link::get(tun).with_context(|| format!("look at {tun}"))?;
        if device.is_some_and(|link| link.kind == "tun") {
            found.push(format!("device {tun}"));
        }
        let routes = netcfg::route::list(*table).context("list routes")?;
        if routes.iter().any(|route| ROUTE_PROTOCOLS.contains(&route.protocol)) {
            found.push(format!("routes in table {table}"));
        }
        let rules = netcfg::route::rules(*rule_priority, *table, defaults::ROUTE_PROTOCOL);
        if !rules.context("list routing rules")?.is_empty() {
            found.push(format!("rules at {rule_priority}"));
        }
    }
    for table in [defaults::NFT_TABLE, defaults::NFT_TABLE_CNI] {
        // What cannot be looked at is taken to be there.
        if netcfg::guard::stands(table).unwrap_or(true) {
            found.push(format!("nftables {table}"));
        }
    }
    let paths = &plan.paths;
    let lock = paths.lock();
    let ours = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        entry.path() != lock
            && name.to_str().is_some_and(|it| it == host_copy::FOLDER || Paths::is_ours(it))
    };
    if let Some(cni) = &plan.cni {
        let ours = cni_install::installed(cni).context("look for the CNI configuration")?;
        found.extend(ours.iter().map(|path| path.display().to_string()));
    }
    if std::fs::read_dir(&paths.state_dir).is_ok_and(|all| all.flatten().any(ours)) {
        found.push(format!("key and state in {}", paths.state_dir.display()));
    }
    Ok(found)
}

/// Host interfaces of pods, by their names: a record may be damaged or gone.
fn pod_links() -> anyhow::Result<Vec<String>> {
    let links = netcfg::link::list().context("list interfaces")?;
    let ours = |link: &netcfg::link::Link| {
        link.kind == "veth" && link.name.starts_with(defaults::POD_LINK_PREFIX)
    };
    Ok(links.into_iter().filter(ours).map(|link| link.name).collect())
}

/// Every step that is safe is tried; answers what failed.
fn remove_all(plan: &Plan) -> Vec<String> {
    let mut failures = Vec::new();
    let mut step = |what: &str, result: anyhow::Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{what}: {error:#}"));
        }
    };
    if let Some(cni) = &plan.cni {
        let done = cni_install::uninstall(cni);
        for kept in done.iter().flat_map(|done| &done.kept) {
            tracing::warn!("{kept}");
        }
        step("CNI", done.map(drop));
    }
    for name in &plan.pod_links {
        let gone = netcfg::link::delete_by_name(name).map(drop).map_err(anyhow::Error::from);
        step(&format!("link {name}"), gone);
    }
    for kernel in &plan.kernels {
        step("routes and rules", remove_routing(kernel));
        step("TUN device", netcfg::tun::remove(&kernel.tun).map(drop));
        if let Some(dir) = &plan.uapi_dir {
            step("socket for wg", remove_wg_socket(dir, &kernel.tun));
        }
    }
    step("nftables", netcfg::guard::remove(defaults::NFT_TABLE_CNI).map(drop));
    if failures.is_empty()
        && let Err(error) = remove_guard_and_state(&plan.paths)
    {
        failures.push(format!("{error:#}"));
    }
    failures
}

fn remove_guard_and_state(paths: &Paths) -> anyhow::Result<()> {
    netcfg::guard::remove(defaults::NFT_TABLE).context("guard")?;
    remove_state(paths).context("state")
}

/// Only a socket that nobody answers at: another WireGuard program may have a device called like ours.
fn remove_wg_socket(dir: &Path, device: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    let path = crate::uapi::server::path(dir, device);
    let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|it| it.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(&path).is_err() {
        ignore_missing(std::fs::remove_file(&path))
            .with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// Our routes, those of the CNI plugin, and the rules that lead to them.
pub fn remove_routing(kernel: &Kernel) -> anyhow::Result<()> {
    netcfg::state::remove_all(&marks(kernel), &ROUTE_PROTOCOLS)
}

/// Only what has our names; a directory somebody else uses too stays. What says which names to look for goes last.
fn remove_state(paths: &Paths) -> anyhow::Result<()> {
    let mut ours: Vec<PathBuf> =
        vec![paths.node_file(), paths.key(), paths.cache(), paths.last_heard(), paths.socket()];
    let damaged = |entry: &std::fs::DirEntry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.contains(DAMAGED_MARK) && Paths::is_ours(name))
    };
    if let Ok(entries) = std::fs::read_dir(&paths.state_dir) {
        ours.extend(entries.flatten().filter(damaged).map(|entry| entry.path()));
    }
    let remove = |path: &Path| {
        ignore_missing(std::fs::remove_file(path))
            .with_context(|| format!("remove {}", path.display()))
    };
    for path in ours {
        remove(&path)?;
        // A daemon killed while it wrote leaves this.
        remove(&files::temporary_name(&path)?)?;
    }
    let ipam = paths.ipam();
    ignore_missing(std::fs::remove_dir_all(&ipam))
        .with_context(|| format!("remove {}", ipam.display()))?;
    // The guard is gone: nothing needs its nft any more.
    let copies = paths.state_dir.join(host_copy::FOLDER);
    ignore_missing(std::fs::remove_dir_all(&copies))
        .with_context(|| format!("remove {}", copies.display()))?;
    remove(&paths.installed())?;
    remove(&files::temporary_name(&paths.installed())?)?;
    remove(&paths.lock())?;
    for directory in [&paths.state_dir, &paths.run_dir] {
        remove_if_empty(directory)?;
    }
    Ok(())
}

fn remove_if_empty(directory: &Path) -> anyhow::Result<()> {
    use std::io::ErrorKind;
    match std::fs::remove_dir(directory) {
        // A mount point is the installer's; in a container the folder it is in is read-only besides.
        Err(error)
            if !matches!(
                error.kind(),
                ErrorKind::NotFound
                    | ErrorKind::DirectoryNotEmpty
                    | ErrorKind::ResourceBusy
                    | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

fn ignore_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_is_being_attached_is_waited_for_and_none_comes_after() {
        let dir = tempfile::tempdir().expect("scratch");
        let paths = Paths { state_dir: dir.path().join("state"), run_dir: dir.path().join("run") };
        let records = paths.ipam();
        std::fs::create_dir_all(&records).expect("directories");
        std::fs::write(paths.node_file(), "{}").expect("write");
        std::fs::write(records.join("lock"), "").expect("write");
        let record = std::fs::File::create(records.join("a_10.244.1.2.json")).expect("record");
        record.lock().expect("claim");
        let error =
            close_to_pods(&paths, Duration::from_millis(1)).expect_err("an ADD is under way");
        assert!(error.to_string().contains("a_10.244.1.2.json"), "{error:#}");
        assert!(!paths.node_file().exists(), "the plugin would attach another");
        drop(record);
        close_to_pods(&paths, Duration::ZERO).expect("nobody is being attached");
    }

    #[test]
    fn names_to_look_for_are_kept_until_everything_else_is_gone() {
        let dir = tempfile::tempdir().expect("scratch");
        let paths = Paths { state_dir: dir.path().join("state"), run_dir: dir.path().join("run") };
        // A directory in the place of a file cannot be removed as one.
        std::fs::create_dir_all(paths.key()).expect("directory");
        std::fs::write(paths.installed(), "x").expect("write");
        remove_state(&paths).expect_err("the key stays");
        assert!(paths.installed().exists());
        std::fs::remove_dir(paths.key()).expect("remove");
        remove_state(&paths).expect("removed");
        assert!(!paths.state_dir.exists());
    }

    #[test]
    fn only_files_of_ours_are_removed_and_a_shared_directory_stays() {
        let dir = tempfile::tempdir().expect("scratch");
        let paths = Paths { state_dir: dir.path().join("state"), run_dir: dir.path().join("run") };
        std::fs::create_dir_all(paths.ipam().join("mesh")).expect("directories");
        std::fs::create_dir(&paths.run_dir).expect("directory");
        for path in [
            paths.key(),
            files::temporary_name(&paths.cache()).expect("a name"),
            paths.cache(),
            paths.lock(),
            paths.ipam().join("mesh/a.json"),
        ] {
            std::fs::write(path, "x").expect("write");
        }
        std::fs::write(paths.state_dir.join("private-key.json.damaged-1"), "x").expect("write");
        std::fs::write(paths.state_dir.join("somebody-elses.damaged-1"), "x").expect("write");
        remove_state(&paths).expect("removed");
        assert!(!paths.run_dir.exists());
        let left: Vec<_> = std::fs::read_dir(&paths.state_dir)
            .expect("listing")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, ["somebody-elses.damaged-1"]);
        std::fs::remove_file(paths.state_dir.join("somebody-elses.damaged-1")).expect("remove");
        remove_state(&paths).expect("twice is free");
        assert!(!paths.state_dir.exists());
    }
}
