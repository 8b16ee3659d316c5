//! Keys of closed sessions stay in memory until it is used again (see the crate's documentation): no dump may show them.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Keeps private and session keys of this process out of core dumps. To be called before a key is read.
pub fn forbid_core_dumps() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    // The limit does not hold where dumps go into a program (core(5)).
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_keys_leaves_no_core_dump() {
        forbid_core_dumps().expect("switched off");
        let limit = rustix::process::getrlimit(Resource::Core);
        assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
        let dumpable = rustix::process::dumpable_behavior().expect("told");
        assert_eq!(dumpable, DumpableBehavior::NotDumpable);
    }
}
