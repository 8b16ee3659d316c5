//! Which super-packets the TUN is given: all that it takes, and for a while none of a kind that the kernel refuses.
//!
//! ```text
//!            refused REFUSALS_IN_A_ROW times, none taken between
//!  merging ─────────────────────────────────────────────────────> not merging
//!     ^                                                               │
//!     └──────────────────────── PAUSE later ──────────────────────────┘
//! ```
//! Each refused one costs a failed call and is written again packet by packet. A kernel that refuses some of a kind (Linux
//! 6.1.103, 6.6.44 and 6.10.3: TCP with a short tail) takes others in between: those are worth the failed calls.

use std::time::Duration;

use mesh_core::packet::{CoalesceOptions, GsoType};
use mesh_types::time::MonoTime;

/// More than chance, and still below a millisecond of failed calls.
const REFUSALS_IN_A_ROW: u32 = 8;

/// As long as segmented sends are left off for a destination that refused them: the kernel's mind changes with a module or
/// a device, rarely.
const PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Kind {
    in_a_row: u32,
    paused_until: Option<MonoTime>,
}

#[derive(Debug)]
pub(super) struct Merging {
    /// What device and operator allow.
    allowed: CoalesceOptions,
    tcp: Kind,
    udp: Kind,
}

impl Merging {
    pub(super) fn new(allowed: CoalesceOptions) -> Self {
        Self { allowed, tcp: Kind::default(), udp: Kind::default() }
    }

    /// Notes whether the kernel took a super-packet.
    pub(super) fn note(&mut self, gso: GsoType, taken: bool) {
        let kind = match gso {
            GsoType::None => return,
            GsoType::TcpV4 | GsoType::TcpV6 => &mut self.tcp,
            GsoType::UdpL4 => &mut self.udp,
        };
        kind.in_a_row = if taken { 0 } else { kind.in_a_row.saturating_add(1) };
    }

    /// Looks at what was noted: how many kinds are paused from now on, and whether [`Self::options`] are others.
    pub(super) fn look(&mut self, now: MonoTime) -> (u64, bool) {
        let (mut paused, mut changed) = (0, false);
        for kind in [&mut self.tcp, &mut self.udp] {
            if kind.paused_until.is_some_and(|until| until <= now) {
                *kind = Kind::default();
                changed = true;
            }
            if kind.in_a_row >= REFUSALS_IN_A_ROW && kind.paused_until.is_none() {
                kind.paused_until = Some(now + PAUSE);
                paused += 1;
                changed = true;
            }
        }
        (paused, changed)
    }

    pub(super) fn options(&self) -> CoalesceOptions {
        CoalesceOptions {
            tcp: self.allowed.tcp && self.tcp.paused_until.is_none(),
            udp: self.allowed.udp && self.udp.paused_until.is_none(),
            ..self.allowed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_secs(seconds)
    }

    fn merged(merging: &Merging) -> (bool, bool) {
        (merging.options().tcp, merging.options().udp)
    }

    #[test]
    fn a_kind_that_is_refused_again_and_again_is_left_off_for_a_minute_and_tried_again() {
        let mut merging = Merging::new(CoalesceOptions::default());
        for round in 0..3 {
            let now = at(100 * round);
            for _ in 1..REFUSALS_IN_A_ROW {
                merging.note(GsoType::TcpV6, false);
            }
            assert_eq!((merging.look(now), merged(&merging)), ((0, false), (true, true)));
            merging.note(GsoType::TcpV4, false);
            assert_eq!((merging.look(now), merged(&merging)), ((1, true), (false, true)));
            // What was merged before that and is refused still begins no new pause.
            merging.note(GsoType::TcpV4, false);
            assert_eq!(merging.look(at(100 * round + 59)), (0, false));
            assert_eq!(merging.look(at(100 * round + 60)), (0, true));
            assert_eq!(merged(&merging), (true, true));
        }
    }

    #[test]
    fn one_taken_between_refused_ones_keeps_merging_and_what_is_not_allowed_stays_off() {
        let allowed = CoalesceOptions { udp: false, ..CoalesceOptions::default() };
        let mut merging = Merging::new(allowed);
        for _ in 0..10 * REFUSALS_IN_A_ROW {
            merging.note(GsoType::TcpV4, false);
            merging.note(GsoType::None, false);
            merging.note(GsoType::TcpV4, true);
            assert_eq!(merging.look(at(1)), (0, false));
        }
        assert_eq!(merging.options(), allowed);
    }
}
