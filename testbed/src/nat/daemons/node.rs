//! One daemon of a pair: its key, its roster, and what it says of the other.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::roster::{ROSTER_VERSION, Roster, RosterNode};
use mesh_types::status::{PathKind, Status};
use serde_json::json;

use crate::lab::{CLUSTER_CIDRS, Daemon};
use crate::nat::site::Site;

/// Largest answer to the question for the status of a mesh of two.
const STATUS_BYTES_MAX: u64 = 1 << 20;

/// It answers in milliseconds, or its machine stands still.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

const SOCKET: &str = "/run/meshd/meshd.sock";

/// A node of a pair. Its names and prefixes are the site's, its key and port are its own.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) site: &'a Site,
    key: PrivateKey,
    port: u16,
    /// How often it was started: each start has a folder of its own.
    starts: u32,
    daemon: Option<Daemon>,
}

impl<'a> Node<'a> {
    pub(super) fn new(site: &'a Site) -> Result<Self> {
        let port = site.next_port()?;
        Ok(Self { site, key: wg_engine::generate_private_key(), port, starts: 0, daemon: None })
    }

    pub(super) fn public_key(&self) -> PublicKey {
        wg_engine::public_key(&self.key)
    }

    /// Its first overlay address, at which the other speaks to it.
    pub(super) fn overlay(&self) -> IpAddr {
        IpAddr::from([10, 244, self.site.number(), 1])
    }

    /// What a Node object would say of it.
    fn entry(&self, relays: &[PublicKey]) -> RosterNode {
        let number = self.site.number();
        let endpoints = self.site.addresses.iter().map(|own| SocketAddr::new(*own, self.port));
        RosterNode {
            name: self.site.node.name().to_owned(),
            public_key: Some(self.public_key().to_string()),
            pod_cidrs: vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")],
            endpoints: endpoints.map(|endpoint| endpoint.to_string()).collect(),
            endpoint: None,
            keyrelays: relays.iter().map(ToString::to_string).collect(),
            // Sites of their own, also behind one NAT: that they are near they have to find out.
            site: Some(self.site.node.name().to_owned()),
        }
    }

    /// Starts a daemon that remembers nothing, with another port than the last: nothing is left of that one in a NAT.
    pub(super) fn start(&mut self, meshd: &Path, roster: &str, relays: &[String]) -> Result<()> {
        ensure!(self.daemon.is_none(), "{} runs already", self.site.node.name());
        self.starts += 1;
        let node = &self.site.node;
        let state = format!("/var/lib/nat-{}-{}", self.port, self.starts);
        let key_file = format!("{state}/private-key.json");
        let key = json!({
            "version": 1, "node": node.name(), "machine_id": "",
            "private_key": self.key.to_base64().as_str(),
        });
        node.write(&key_file, key.to_string())?;
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(node.path(&state), mode(0o700))?;
        std::fs::set_permissions(node.path(&key_file), mode(0o600))?;
        let roster_file = format!("{state}/roster.yaml");
        node.write(&roster_file, roster)?;
        let mut command = node.command(meshd);
        command.args(["run", "--node-name", node.name(), "--roster", &roster_file]);
        command.args(["--cluster-cidr", &CLUSTER_CIDRS.join(","), "--state-dir", &state]);
        command.args(["--listen-port", &self.port.to_string(), "--keyrelay", &relays.join(",")]);
        // Many run at once here, and none is to be fast.
        command.args(["--shards", "1", "--busy-poll-us", "0"]);
        self.daemon = Some(node.spawn(command, &format!("meshd-{}-{}", self.port, self.starts))?);
        Ok(())
    }

    /// SIGKILL, and the next start has another port.
    pub(super) fn stop(&mut self) -> Result<()> {
        if let Some(daemon) = self.daemon.take() {
            daemon.kill()?;
        }
        self.port = self.site.next_port()?;
        Ok(())
    }

    /// What the daemon thinks.
    pub(super) fn status(&self) -> Result<Status> {
        let socket = self.site.node.path(SOCKET);
        let name = self.site.node.name();
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("{name}: nobody answers at {SOCKET}"))?;
        stream.set_read_timeout(Some(STATUS_TIMEOUT))?;
        stream.write_all(b"GET /status HTTP/1.1\r\nhost: meshd\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(STATUS_BYTES_MAX).read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no answer of HTTP")?;
        serde_json::from_str(body).with_context(|| format!("{name}: no status: {body:.200}"))
    }

    /// How it reaches the other; none while it does not say.
    pub(super) fn path(&self) -> PathKind {
        let path = self.status().ok().and_then(|status| Some(status.peers.first()?.path));
        path.unwrap_or(PathKind::None)
    }

    /// Whether it is registered at every relay it was told of.
    pub(super) fn is_registered(&self) -> bool {
        self.status().is_ok_and(|status| {
            !status.keyrelays.is_empty() && status.keyrelays.iter().all(|relay| relay.registered)
        })
    }

    /// The end of its log.
    pub(super) fn last_words(&self) -> String {
        self.daemon.as_ref().map_or_else(String::new, |daemon| format!("\n  {}", daemon.log()))
    }

    /// Lines of its logs at level ERROR: none is ever fine.
    pub(super) fn errors(&self) -> Option<String> {
        let log = self.daemon.as_ref()?.log();
        let bad = |line: &&str| line.contains(" ERROR ") || line.contains("panicked at");
        log.lines().find(bad).map(|line| format!("{}: {line}", self.site.node.name()))
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.kill(); // it has ended, or ends with the lab
        }
    }
}

/// The roster both read.
pub(super) fn roster(nodes: [&Node<'_>; 2], relays: &[PublicKey]) -> Result<String> {
    let nodes = nodes.map(|node| node.entry(relays)).into();
    // JSON is YAML.
    Ok(serde_json::to_string(&Roster { version: ROSTER_VERSION, nodes })?)
}
