//! The kernel as the verbs see it: a seam, so that they are tested without one.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use mesh_types::attachment::Attachment;

use crate::plan::Plan;

/// Works in the network namespace of the node.
pub trait Kernel {
    /// Id of the running boot.
    fn boot_id(&self) -> anyhow::Result<String>;

    /// Inode of the file at `path`, which may or may not be a namespace; `None` when there is none.
    fn netns_inode(&self, path: &Path) -> anyhow::Result<Option<u64>>;

    /// Inode of the namespace we run in.
    fn own_netns_inode(&self) -> anyhow::Result<u64>;

    /// Whether the node has an interface of this name.
    fn link_exists(&self, name: &str) -> anyhow::Result<bool>;

    /// Whether the namespace at `netns` has an interface of this name.
    fn pod_link_exists(&self, netns: &Path, name: &str) -> anyhow::Result<bool>;

    /// Addresses the node's kernel leads to pods, but for those behind `own_link`.
    fn taken_addresses(&self, own_link: Option<&str>) -> anyhow::Result<BTreeSet<IpAddr>>;

    /// Whether the guard's table is there.
    fn guard_stands(&self) -> anyhow::Result<bool>;

    /// Makes everything of the plan; returns the hardware address of the host side. What a failed call leaves,
    /// [`Kernel::detach`] removes.
    fn attach(&self, plan: &Plan) -> anyhow::Result<String>;

    /// Removes everything of an attachment; what is gone already is fine.
    fn detach(&self, attachment: &Attachment) -> anyhow::Result<()>;

    /// As [`Kernel::detach`], but a daemon that holds `tun` takes the pod out of the source filter.
    fn detach_served(&self, attachment: &Attachment, tun: &str) -> anyhow::Result<()>;

    /// How the kernel differs from the plan, in words; empty when it does not.
    fn differences(&self, plan: &Plan) -> anyhow::Result<Vec<String>>;
}
