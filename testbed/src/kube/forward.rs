//! The API server's port on the host's loopback: a process that listens here and connects inside the lab.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::net::TcpStream;

use crate::lab::{Namespace, ProcessRef, run_in_netns};

/// Connections at once: kubectl, Helm and tests open a handful.
const CONNECTIONS: usize = 256;

/// How long it may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it looks whether the namespace it leads to still stands.
const CHECK_EVERY: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, clap::Args)]
pub struct ForwardOptions {
    /// Port on 127.0.0.1
    #[arg(long)]
    port: u16,
    /// Address inside the namespace
    #[arg(long)]
    to: SocketAddr,
    /// Process whose network namespace that is, and when it began; we end with it
    #[arg(long)]
    pid: u32,
    #[arg(long)]
    start_ticks: u64,
}

/// Serves until the namespace's holder ends.
pub fn serve(options: &ForwardOptions) -> Result<()> {
    let holder = ProcessRef { pid: options.pid, start_ticks: options.start_ticks };
    let netns = PathBuf::from(format!("/proc/{}/ns/net", options.pid));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port))
        .with_context(|| format!("cannot listen on port {} of 127.0.0.1", options.port))?;
    listener.set_nonblocking(true)?;
    let to = options.to;
    // A listener stays in the network namespace it was made in; everything else happens in the lab's.
    run_in_netns(&netns, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tokio::select! {
                result = accept(&listener, to) => result,
                () = ended(holder) => Ok(()),
            }
        })
    })
}

async fn accept(listener: &tokio::net::TcpListener, to: SocketAddr) -> Result<()> {
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
    loop {
        let slot = std::sync::Arc::clone(&slots).acquire_owned().await?;
        let Ok((mut near, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await; // out of files, most likely
            continue;
        };
        tokio::spawn(async move {
            let _slot = slot;
            if let Ok(mut far) = TcpStream::connect(to).await {
                // Either side closing is the normal end.
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}

async fn ended(holder: ProcessRef) {
    while holder.is_alive() {
        tokio::time::sleep(CHECK_EVERY).await;
    }
}

/// Starts the process, on `port` or any free one; returns the port.
pub(super) fn start(
    testbed: &std::path::Path,
    namespace: &Namespace,
    to: SocketAddr,
    port: Option<u16>,
) -> Result<(u16, ProcessRef)> {
    let port = match port {
        Some(port) => port,
        // Free now; whoever takes it in between makes us fail with a clear text.
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port(),
    };
    let holder = ProcessRef::of(namespace.pid())?;
    let log = std::fs::File::create(namespace.dir().join("forward.log"))?;
    let mut command = Command::new(testbed);
    command.args(["forward", "--port", &port.to_string(), "--to", &to.to_string()]);
    command.args(["--pid", &holder.pid.to_string()]);
    command.args(["--start-ticks", &holder.start_ticks.to_string()]);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().context("cannot run the forwarder")?;
    let process = ProcessRef::of(child.id())?;
    let end = Instant::now() + START_TIMEOUT;
    while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        if let Some(status) = child.try_wait()? {
            let log = namespace.dir().join("forward.log");
            let text = std::fs::read_to_string(log).unwrap_or_default();
            bail!("the forwarder ended ({status}): {}", text.trim());
        }
        if Instant::now() > end {
            bail!("the forwarder does not listen on port {port}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok((port, process))
}
