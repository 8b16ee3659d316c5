//! The two relays of a pair: no other pair notices when they are killed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use mesh_types::defaults::KEYRELAY_PORT;
use mesh_types::key::PublicKey;

use crate::lab::{Daemon, Namespace};

const KEY: &str = "/run/keyrelay-key";
const MEMBERS: &str = "/run/keyrelay-members";

/// Where a relay runs, one after the other.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) namespace: Namespace,
    /// The nodes' name for it, with an address of each family.
    pub(super) name: String,
}

#[derive(Debug)]
pub(super) struct Relay<'a> {
    place: &'a Place,
    key: PublicKey,
    daemon: Option<Daemon>,
}

impl<'a> Relay<'a> {
    /// With a key of its own, for the pair that is named.
    pub(super) fn new(place: &'a Place, members: [PublicKey; 2]) -> Result<Self> {
        let key = wg_engine::generate_private_key();
        place.namespace.write(KEY, format!("{}\n", *key.to_base64()))?;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(place.namespace.path(KEY), private)?;
        place.namespace.write(MEMBERS, members.map(|key| format!("{key}\n")).concat())?;
        Ok(Self { place, key: wg_engine::public_key(&key), daemon: None })
    }

    pub(super) fn key(&self) -> PublicKey {
        self.key
    }

    /// As daemons are told.
    pub(super) fn told(&self) -> String {
        format!("{}@{}:{KEYRELAY_PORT}", self.key, self.place.name)
    }

    pub(super) fn start(&mut self, keyrelay: &Path) -> Result<()> {
        let mut command = self.place.namespace.command(keyrelay);
        command.args(["run", "--keys-file", MEMBERS, "--private-key-file", KEY]);
        command.args(["--tls-listen", "[::]:443", "--threads", "1"]);
        self.daemon = Some(self.place.namespace.spawn(command, "keyrelay")?);
        Ok(())
    }

    /// The end of its log.
    pub(super) fn last_words(&self) -> String {
        self.daemon.as_ref().map_or_else(String::new, |daemon| format!("\n  {}", daemon.log()))
    }

    /// SIGKILL: nobody is told.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("the relay does not run")?.kill()
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.kill(); // it has ended, or ends with the lab
        }
    }
}
