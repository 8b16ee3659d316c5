//! The real kernel behind [`Kernel`]: all of it in `netcfg`.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::Context as _;
use mesh_types::attachment::Attachment;
use mesh_types::defaults::NFT_TABLE;
use netcfg::netns::{self, Netns};
use netcfg::pod::{self, PodConfig};
use netcfg::{guard, link};

use crate::kernel::Kernel;
use crate::plan::Plan;

/// Linux, by way of netlink, `/proc` and `nft`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linux;

impl Kernel for Linux {
    fn boot_id(&self) -> anyhow::Result<String> {
        let path = "/proc/sys/kernel/random/boot_id";
        let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
        Ok(text.trim().to_owned())
    }

    fn netns_inode(&self, path: &Path) -> anyhow::Result<Option<u64>> {
        match std::fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("look at {}", path.display())),
            Ok(found) => Ok(Some(found.ino())),
        }
    }

    fn own_netns_inode(&self) -> anyhow::Result<u64> {
        netns::current_inode()
    }

    fn link_exists(&self, name: &str) -> anyhow::Result<bool> {
        Ok(link::get(name)?.is_some())
    }

    fn pod_link_exists(&self, netns: &Path, name: &str) -> anyhow::Result<bool> {
        netns::visit(Netns::open(netns)?, || self.link_exists(name))
    }

    fn taken_addresses(&self, own_link: Option<&str>) -> anyhow::Result<BTreeSet<IpAddr>> {
        pod::taken_addresses(own_link)
    }

    fn guard_stands(&self) -> anyhow::Result<bool> {
        Ok(guard::stands(NFT_TABLE)?)
    }

    fn attach(&self, plan: &Plan) -> anyhow::Result<String> {
        let attachment = &plan.attachment;
        let netns = Netns::open(Path::new(&attachment.netns))?;
        anyhow::ensure!(
            netns.inode()? == attachment.netns_inode,
            "{} became another namespace meanwhile",
            attachment.netns
        );
        let config = config(plan);
        pod::create_link(&config, attachment, &netns)?;
        // The source filter before the pod can send anything.
        pod::attach_host(&config, attachment)?;
        pod::setup_inside(&config, attachment, &netns)?;
        let host = link::require(&attachment.host_ifname)?;
        let mac = host.mac.with_context(|| format!("{} has no hardware address", host.name))?;
        Ok(mac.to_string())
    }

    fn detach(&self, attachment: &Attachment) -> anyhow::Result<()> {
        pod::detach(attachment)
    }

    fn detach_served(&self, attachment: &Attachment, tun: &str) -> anyhow::Result<()> {
        pod::detach_served(attachment, tun)
    }

    fn differences(&self, plan: &Plan) -> anyhow::Result<Vec<String>> {
        let netns = Netns::open(Path::new(&plan.attachment.netns))?;
        pod::check(&config(plan), &plan.attachment, &netns)
    }
}

fn config(plan: &Plan) -> PodConfig {
    PodConfig::new(plan.cluster.clone(), plan.mtu, plan.tun.clone(), plan.table)
}
