//! What the kernel can do for the data plane, each switchable by an operator who meets a kernel or card that does it badly.
//!
//! ```text
//!  out:  TUN  vnet-header, checksum, tso, uso   ──>  UDP  udp-gso
//!  in:   UDP  udp-gro   ──>  TUN  coalesce-tcp, coalesce-udp (need vnet-header)
//! ```
//! Each is tried at start and falls back by itself; see `netcfg::tun`, `netcfg::udp` and `io::frame`.

use clap::ValueEnum;
use mesh_core::packet::CoalesceOptions;
use netcfg::tun::TunOptions;
use netcfg::udp::UdpOptions;

/// One of them, as it is named on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Offload {
    /// Headers beside the packets of the TUN device; nothing of the device works without.
    VnetHeader,
    /// Packets of this node come without checksum, and we make it.
    Checksum,
    /// TCP packets of up to 64 KiB from the device.
    Tso,
    /// The same of UDP, Linux 6.2.
    Uso,
    /// The kernel cuts what is sent (`UDP_SEGMENT`).
    UdpGso,
    /// The kernel merges what is received (`UDP_GRO`).
    UdpGro,
    /// Received TCP packets are merged before the device gets them.
    CoalesceTcp,
    /// The same of UDP.
    CoalesceUdp,
}

impl Offload {
    /// As on the command line and in metrics.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Those that are switched off.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disabled(Vec<Offload>);

impl From<&[Offload]> for Disabled {
    fn from(offloads: &[Offload]) -> Self {
        Self(offloads.to_vec())
    }
}

impl Disabled {
    fn allow(&self, offload: Offload) -> bool {
        !self.0.contains(&offload)
    }

    /// What is left to be tried on the device.
    pub fn tun(&self, options: TunOptions) -> TunOptions {
        TunOptions {
            vnet_hdr: options.vnet_hdr && self.allow(Offload::VnetHeader),
            csum: options.csum && self.allow(Offload::Checksum),
            tso: options.tso && self.allow(Offload::Tso),
            uso: options.uso && self.allow(Offload::Uso),
            ..options
        }
    }

    /// What is left to be tried on the socket.
    pub fn udp(&self, options: &UdpOptions) -> UdpOptions {
        UdpOptions {
            gso: options.gso && self.allow(Offload::UdpGso),
            gro: options.gro && self.allow(Offload::UdpGro),
            ..options.clone()
        }
    }

    /// What is left to be merged.
    pub fn coalesce(&self, options: CoalesceOptions) -> CoalesceOptions {
        CoalesceOptions {
            tcp: options.tcp && self.allow(Offload::CoalesceTcp),
            udp: options.udp && self.allow(Offload::CoalesceUdp),
            ..options
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_switch_switches_one_thing() {
        let of = |disabled: &Disabled| {
            let tun = disabled.tun(TunOptions::new("t"));
            let udp = disabled.udp(&UdpOptions::default());
            let merged = disabled.coalesce(CoalesceOptions::default());
            [tun.vnet_hdr, tun.csum, tun.tso, tun.uso, udp.gso, udp.gro, merged.tcp, merged.udp]
        };
        assert_eq!(of(&Disabled::default()), [true; 8]);
        for (at, offload) in Offload::value_variants().iter().enumerate() {
            let expected: Vec<bool> = (0..8).map(|other| other != at).collect();
            assert_eq!(of(&Disabled::from(&[*offload][..])).to_vec(), expected, "{offload:?}");
        }
    }
}
