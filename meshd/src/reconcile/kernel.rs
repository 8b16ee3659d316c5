//! The kernel as the reconciler sees it: a seam, so that its decisions are tested without one.

use std::net::IpAddr;

use mesh_types::attachment::Attachment;
use mesh_types::netstate::NetState;

use crate::endpoints::Found;

/// Something that was made, changed or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// One of few: `route`, `rule`, `address`, ...
    pub kind: &'static str,
    /// In words, for the log.
    pub what: String,
}

/// What became of the host side of pods.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodsMade {
    pub made: Vec<Made>,
    /// Pods that could not be put right, and why.
    pub failed: Vec<String>,
    /// Pods of which nothing is left.
    pub gone: Vec<Attachment>,
    /// Host ends of all pods' links, whatever records say.
    pub links: Vec<String>,
}

/// Every method makes the kernel be as asked, says what it had to do for it, and is free when all is right.
pub trait Kernel: Send {
    fn guard(&mut self) -> anyhow::Result<Vec<Made>>;

    fn sysctls(&mut self) -> anyhow::Result<Vec<Made>>;

    /// Addresses that may become endpoints.
    fn addresses(&mut self) -> anyhow::Result<Vec<Found>>;

    /// MTU of the way to `address`.
    fn path_mtu(&mut self, address: IpAddr) -> anyhow::Result<u32>;

    fn network(&mut self, wanted: &NetState) -> anyhow::Result<Vec<Made>>;

    /// `mtu` of pod interfaces, for what has to be made anew. Addresses of pods that are `taken` by other nodes get no way.
    fn pods(
        &mut self,
        attachments: &[Attachment],
        taken: &[IpAddr],
        mtu: u32,
    ) -> anyhow::Result<PodsMade>;

    /// Whether nothing of a pod is left, neither its namespace nor its link.
    fn pod_is_gone(&self, attachment: &Attachment) -> bool;

    /// Removes what the host still has of a pod that is gone.
    fn forget_pod(&self, attachment: &Attachment) -> anyhow::Result<()>;
}
