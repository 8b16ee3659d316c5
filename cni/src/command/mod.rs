//! The verbs.
//!
//! ```text
//! ADD     node file, guard ─> reserve ─> attach ─> answer         undone in reverse when a step fails
//! DEL     wait for ADD ─> detach ─> release                       what is gone is fine
//! CHECK   record, prevResult and kernel agree
//! GC      detach and release what is not in the runtime's list, without one what has no pod any more
//! STATUS  would ADD work?
//! VERSION what we speak
//! ```

mod add;
mod check;
mod del;
mod gc;
mod status;

use std::io::{Read, Write};
use std::path::Path;

use ipam::disk::RealDisk;
use ipam::store::{Pods, StoreError};
use mesh_types::attachment::Attachment;

use crate::kernel::Kernel;
use crate::spec::config::{self, Config};
use crate::spec::env::{self, Request};
use crate::spec::error::{CniError, Code};
use crate::spec::result::version_json;
use crate::spec::version::Version;

/// The three streams of a process.
pub struct Streams<'a> {
    pub stdin: &'a mut dyn Read,
    pub stdout: &'a mut dyn Write,
    pub stderr: &'a mut dyn Write,
}

/// Runs one verb; returns the exit status.
pub fn run(
    get_env: impl Fn(&str) -> Option<String>,
    streams: &mut Streams<'_>,
    kernel: &impl Kernel,
) -> u8 {
    let mut version = Version::NEWEST;
    match dispatch(get_env, streams, kernel, &mut version) {
        Ok(()) => 0,
        Err(error) => {
            // Nobody is left to tell when these two fail.
            let _ = writeln!(streams.stderr, "meshd-cni: {error}");
            let _ = streams.stdout.write_all(&error.to_json(version));
            1
        }
    }
}

/// What this program is, in two lines.
pub fn about() -> String {
    let versions: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
    format!(
        "meshd-cni {}\nCNI versions supported: {}; run by a container runtime (CNI SPEC.md)",
        env!("CARGO_PKG_VERSION"),
        versions.join(", ")
    )
}

fn dispatch(
    get_env: impl Fn(&str) -> Option<String>,
    streams: &mut Streams<'_>,
    kernel: &impl Kernel,
    version: &mut Version,
) -> Result<(), CniError> {
    let request = env::parse(get_env)?;
    if request == Request::Version {
        return answer(streams.stdout, &version_json());
    }
    let stdin = config::read_stdin(streams.stdin)?;
    *version = config::answer_version(&stdin);
    if matches!(request, Request::Check { .. } | Request::Gc | Request::Status) {
        config::check_comparable(&stdin)?;
    }
    let config = config::parse(&stdin)?;
    let context = Context { config, kernel };
    match request {
        Request::Add { owner, netns, own_netns_allowed, args } => {
            context.config.refuse_wishes(&args)?;
            add::run(&context, &owner, &netns, own_netns_allowed, streams)
        }
        Request::Del { owner } => del::run(&context, &owner),
        Request::Check { owner, netns } => {
            context.needs(Version::V0_4_0, "CHECK")?;
            check::run(&context, &owner, &netns)
        }
        Request::Gc => {
            context.needs(Version::V1_1_0, "GC")?;
            gc::run(&context, streams)
        }
        Request::Status => {
            context.needs(Version::V1_1_0, "STATUS")?;
            status::run(&context)
        }
        Request::Version => Ok(()),
    }
}

/// What every verb works with.
struct Context<'a, K> {
    config: Config,
    kernel: &'a K,
}

impl<K: Kernel> Context<'_, K> {
    fn needs(&self, version: Version, verb: &str) -> Result<(), CniError> {
        if self.config.version < version {
            return Err(CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "cniVersion {} has no {verb}: write {version} or newer",
                    self.config.version
                ),
            ));
        }
        Ok(())
    }

    fn boot_id(&self) -> Result<String, CniError> {
        self.kernel.boot_id().map_err(|error| {
            CniError::caused(Code::Kernel, "the boot id cannot be read: is /proc mounted?", &error)
        })
    }

    /// The store's directory; `None` where there is none yet.
    fn existing_disk(&self) -> Result<Option<RealDisk>, CniError> {
        let dir = self.config.state_dir()?;
        RealDisk::existing(&dir).map_err(|error| state_dir_error(&dir, &error))
    }

    /// The store's directory, made where there is none yet.
    fn disk(&self) -> Result<RealDisk, CniError> {
        let dir = self.config.state_dir()?;
        RealDisk::create(&dir).map_err(|error| state_dir_error(&dir, &error))
    }
}

fn state_dir_error(dir: &Path, error: &std::io::Error) -> CniError {
    CniError::new(Code::Io, format!("state directory {}: {error}", dir.display()))
}

/// A pod is gone when neither its namespace nor the host side of its link is left.
struct PodsInKernel<'a, K>(&'a K);

impl<K: Kernel> Pods for PodsInKernel<'_, K> {
    fn is_gone(&self, attachment: &Attachment) -> bool {
        // Whatever cannot be looked at is taken to live.
        let netns = self.0.netns_inode(attachment.netns.as_ref());
        let netns_gone = netns.is_ok_and(|inode| inode != Some(attachment.netns_inode));
        netns_gone && self.0.link_exists(&attachment.host_ifname).is_ok_and(|there| !there)
    }

    fn clean(&self, attachment: &Attachment) -> anyhow::Result<()> {
        self.0.detach(attachment)
    }
}

fn answer(stdout: &mut dyn Write, bytes: &[u8]) -> Result<(), CniError> {
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| CniError::new(Code::Io, format!("writing the result: {error}")))
}

fn store_error(error: &StoreError) -> CniError {
    let code = match error {
        StoreError::Io { .. } => Code::Io,
        StoreError::Exhausted { .. } => Code::RangeExhausted,
        StoreError::Busy | StoreError::LinkClash(_) => Code::TryAgainLater,
    };
    CniError::new(code, error.to_string())
}
