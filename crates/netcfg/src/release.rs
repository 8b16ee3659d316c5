//! Faults of Linux that cannot be seen at run time, by the kernel's version.
//!
//! Only what is lost without a trace is decided here; what the kernel refuses is found out by asking it.

/// The three numbers `uname -r` begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32, pub u32);

impl Release {
    /// Of the running kernel; `None` where it does not begin with two numbers.
    pub fn running() -> Option<Self> {
        Self::parse(&rustix::system::uname().release().to_string_lossy())
    }

    /// Reads `6.8.0-45-generic`; a missing third number is 0.
    pub fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
        let mut numbers = text.get(..end)?.split('.').map(|number| number.parse().ok());
        let (major, minor) = (numbers.next()??, numbers.next()??);
        Some(Self(major, minor, numbers.next().flatten().unwrap_or(0)))
    }

    /// Datagrams of a nested tunnel (VXLAN, Geneve) that reach the node as a super-packet are dropped on delivery
    /// (Linux 3d010c8031e3, "udp: do not accept non-tunnel GSO skbs landing in a tunnel", in 6.8.5).
    pub fn drops_merged_tunnels(self) -> bool {
        self < Self(6, 8, 5)
    }

    /// Datagrams of one UDP flow are merged on receipt whatever their ECN marks, and the first one's is told of all (since 5.0;
    /// Linux 5babae777c61, "net: gro: add flush check in udp_gro_receive_segment", in 6.9 and later in older series).
    pub fn merges_marks(self) -> bool {
        self < Self(6, 9, 0)
    }

    /// A TUN device tells in which network namespace it is (since 5.2), also of one that ends: a reference too many to what is
    /// being freed (Linux ff960f9d3edb, "netns: Make get_net_ns() handle zero refcount net", in 6.10 and later in older series).
    pub fn tells_namespaces_of_devices(self) -> bool {
        self >= Self(6, 10, 0)
    }

    /// Drivers that segment in part (`NETIF_F_GSO_PARTIAL`) send damaged UDP headers: begun by Linux b10b446 in
    /// 7.0, ended by 78effd8 and 5f17ae0, which 7.1.5 has.
    pub fn mangles_udp_segments(self) -> bool {
        (Self(7, 0, 0)..Self(7, 1, 5)).contains(&self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_read_whatever_stands_behind_them() {
        for (text, release) in [
            ("6.8.0-45-generic", Some(Release(6, 8, 0))),
            ("6.18.44-fc-v657", Some(Release(6, 18, 44))),
            ("7.0.2-6-pve", Some(Release(7, 0, 2))),
            ("7.1-rc5", Some(Release(7, 1, 0))),
            ("7.1.", Some(Release(7, 1, 0))),
            ("5.14.0-427.el9.x86_64", Some(Release(5, 14, 0))),
            ("6", None),
            ("linux", None),
            ("", None),
            ("99999999999.1", None),
        ] {
            assert_eq!(Release::parse(text), release, "{text}");
        }
        assert!(Release::running().is_some());
    }

    #[test]
    fn faults_begin_and_end_with_their_versions() {
        assert!(
            Release(6, 6, 99).drops_merged_tunnels() && Release(6, 8, 4).drops_merged_tunnels()
        );
        assert!(
            !Release(6, 8, 5).drops_merged_tunnels() && !Release(7, 0, 0).drops_merged_tunnels()
        );
        assert!(Release(6, 8, 12).merges_marks() && !Release(6, 9, 0).merges_marks());
        assert!(Release(7, 0, 0).mangles_udp_segments() && Release(7, 1, 4).mangles_udp_segments());
        assert!(
            !Release(6, 19, 9).mangles_udp_segments() && !Release(7, 1, 5).mangles_udp_segments()
        );
    }
}
