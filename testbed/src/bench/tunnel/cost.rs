//! What TCP had to repair.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::parsed;
use crate::lab::run_in_netns;

/// Segments TCP sent again, and those that came out of order, in one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Repairs {
    pub(super) retransmits: u64,
    pub(super) out_of_order: u64,
}

impl Repairs {
    pub(super) fn read(netns: &Path) -> Result<Self> {
        run_in_netns(netns, || {
            // /proc/net is the reading thread's own only below /proc/thread-self.
            let snmp = fs::read_to_string("/proc/thread-self/net/snmp")?;
            let netstat = fs::read_to_string("/proc/thread-self/net/netstat")?;
            let [retransmits, out_of_order] =
                [(&snmp, "Tcp", "RetransSegs"), (&netstat, "TcpExt", "TCPOFOQueue")].map(
                    |(text, group, name)| {
                        parsed::counter(text, group, name)
                            .with_context(|| format!("this kernel does not count {name}"))
                    },
                );
            Ok(Self { retransmits: retransmits?, out_of_order: out_of_order? })
        })
    }

    pub(super) fn since(self, before: Self) -> Self {
        Self {
            retransmits: self.retransmits.saturating_sub(before.retransmits),
            out_of_order: self.out_of_order.saturating_sub(before.out_of_order),
        }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            retransmits: self.retransmits + other.retransmits,
            out_of_order: self.out_of_order + other.out_of_order,
        }
    }
}
