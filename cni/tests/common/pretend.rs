//! A node that only pretends: the verbs run in this process, on a real folder and a kernel of names.

#![allow(dead_code, reason = "each test program uses its part")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::Path;

use mesh_types::attachment::Attachment;
use meshd_cni::command::{Streams, run};
use meshd_cni::kernel::Kernel;
use meshd_cni::plan::Plan;
use serde_json::{Value, json};

pub(crate) const BOOT: &str = "b0000000-0000-4000-8000-000000000001";

/// A kernel with nothing but names in it.
#[derive(Debug)]
pub(crate) struct Pretend {
    pub(crate) links: RefCell<BTreeSet<String>>,
    pub(crate) pods: RefCell<BTreeSet<(String, String)>>,
    pub(crate) guard: bool,
    /// Addresses of pods without a record.
    pub(crate) taken: BTreeSet<IpAddr>,
    /// Namespaces that are gone.
    pub(crate) dead: RefCell<BTreeSet<String>>,
    pub(crate) attach_fails: bool,
    /// Goes while the plugin is at work, before it has claimed anything.
    pub(crate) vanishes: RefCell<Option<std::path::PathBuf>>,
}

impl Pretend {
    fn new() -> Self {
        Self {
            links: RefCell::new(BTreeSet::from(["meshd0".to_owned()])),
            pods: RefCell::default(),
            dead: RefCell::default(),
            guard: true,
            taken: BTreeSet::new(),
            attach_fails: false,
            vanishes: RefCell::default(),
        }
    }
}

impl Kernel for Pretend {
    fn boot_id(&self) -> anyhow::Result<String> {
        Ok(BOOT.to_owned())
    }

    fn netns_inode(&self, path: &Path) -> anyhow::Result<Option<u64>> {
        Ok(match path.to_str() {
            Some("/proc/self/ns/net") => Some(1),
            Some(path) if self.dead.borrow().contains(path) => None,
            Some(path) if path.starts_with("/run/netns/") => Some(path.len() as u64),
            _ => None,
        })
    }

    fn own_netns_inode(&self) -> anyhow::Result<u64> {
        if let Some(path) = self.vanishes.borrow_mut().take() {
            fs::remove_file(path)?;
        }
        Ok(1)
    }

    fn link_exists(&self, name: &str) -> anyhow::Result<bool> {
        Ok(self.links.borrow().contains(name))
    }

    fn pod_link_exists(&self, netns: &Path, name: &str) -> anyhow::Result<bool> {
        let pod = (netns.display().to_string(), name.to_owned());
        Ok(self.pods.borrow().contains(&pod))
    }

    fn taken_addresses(&self, _: Option<&str>) -> anyhow::Result<BTreeSet<IpAddr>> {
        Ok(self.taken.clone())
    }

    fn guard_stands(&self) -> anyhow::Result<bool> {
        Ok(self.guard)
    }

    fn attach(&self, plan: &Plan) -> anyhow::Result<String> {
        let Attachment { host_ifname, netns, ifname, .. } = &plan.attachment;
        self.links.borrow_mut().insert(host_ifname.clone());
        anyhow::ensure!(!self.attach_fails, "the kernel says no");
        self.pods.borrow_mut().insert((netns.clone(), ifname.clone()));
        Ok("02:00:00:00:00:01".to_owned())
    }

    fn detach(&self, attachment: &Attachment) -> anyhow::Result<()> {
        self.links.borrow_mut().remove(&attachment.host_ifname);
        let pod = (attachment.netns.clone(), attachment.ifname.clone());
        self.pods.borrow_mut().remove(&pod);
        Ok(())
    }

    fn detach_served(&self, attachment: &Attachment, _: &str) -> anyhow::Result<()> {
        self.detach(attachment)
    }

    fn differences(&self, plan: &Plan) -> anyhow::Result<Vec<String>> {
        let there = self.links.borrow().contains(&plan.attachment.host_ifname);
        Ok(if there { Vec::new() } else { vec!["the link is gone".to_owned()] })
    }
}

pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) kernel: Pretend,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = json!({
            "version": 1, "node": "n1", "boot_id": BOOT,
            "cluster_prefixes": ["10.244.0.0/16", "fd00:10:244::/48"],
            "pod_cidrs": ["10.244.3.0/24", "fd00:10:244:3::/64"],
            "mtu": 1380, "tun": "meshd0", "table": 5190,
        });
        fs::write(dir.path().join("node.json"), file.to_string()).unwrap();
        Self { dir, kernel: Pretend::new() }
    }

    pub(crate) fn config(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "mesh", "type": "meshd-cni",
            "nodeFile": self.dir.path().join("node.json"),
            "stateDir": self.dir.path().join("ipam"),
            "dns": {"nameservers": ["10.96.0.10"]},
        })
    }

    pub(crate) fn call(&self, verb: &str, stdin: &str) -> (u8, String) {
        self.call_with(verb, stdin, &[])
    }

    pub(crate) fn call_with(
        &self,
        verb: &str,
        stdin: &str,
        overrides: &[(&str, &str)],
    ) -> (u8, String) {
        let mut stdout = Vec::new();
        let status = self.raw(verb, &mut stdin.as_bytes(), overrides, &mut stdout);
        (status, String::from_utf8(stdout).unwrap())
    }

    pub(crate) fn raw(
        &self,
        verb: &str,
        stdin: &mut dyn Read,
        overrides: &[(&str, &str)],
        stdout: &mut dyn Write,
    ) -> u8 {
        let mut environment = BTreeMap::from([
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "c0ffee"),
            ("CNI_NETNS", "/run/netns/pod"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ]);
        environment.extend(overrides.iter().copied());
        let mut streams = Streams { stdin, stdout, stderr: &mut io::sink() };
        run(|name| environment.get(name).map(|v| (*v).to_owned()), &mut streams, &self.kernel)
    }

    /// Folders differ between runs.
    pub(crate) fn same_everywhere(&self, text: &str) -> String {
        text.replace(&self.dir.path().display().to_string(), "DIR")
    }
    /// Names of the records on disk.
    pub(crate) fn records(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("ipam")) else { return Vec::new() };
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| Path::new(name).extension().is_some_and(|e| e == "json"))
            .collect()
    }
}
