//! The server as a process of its own, for a lab that outlives the command that made it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

use super::{ApiOptions, ApiServer, Identity};

/// What `testbed apiserver` is told.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeOptions {
    #[arg(long, required = true)]
    pub listen: Vec<SocketAddr>,
    #[arg(long)]
    /// JSON array of Node objects to begin with; one token each.
    pub nodes_path: PathBuf,
    #[arg(long)]
    /// Where kubeconfigs go: `admin.kubeconfig`, `node-NAME.kubeconfig`, and last `ready`.
    pub output_dir: PathBuf,
}

/// Serves until SIGTERM or SIGINT. The file `ready` appears once every kubeconfig stands and the port answers.
pub fn serve(options: &ServeOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let text = fs::read(&options.nodes_path)
            .with_context(|| format!("cannot read {}", options.nodes_path.display()))?;
        let nodes: Vec<Value> = serde_json::from_slice(&text)
            .with_context(|| format!("{} is no JSON array", options.nodes_path.display()))?;
        let server = ApiServer::start(&ApiOptions { listen: options.listen.clone() }).await?;
        let handle = server.handle();
        write(&options.output_dir, "admin", &handle.kubeconfig(Identity::Admin, None))?;
        for node in &nodes {
            let created = handle.create_node(node)?;
            let name = super::store::text(&created, "/metadata/name").unwrap_or_default();
            let file = handle.kubeconfig(Identity::Node(name.to_owned()), None);
            write(&options.output_dir, &format!("node-{name}"), &file)?;
        }
        fs::write(options.output_dir.join("ready"), b"")?;
        stopped().await
    })
}

async fn stopped() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Tokens are secrets, also in a testbed: 0600.
fn write(dir: &Path, name: &str, kubeconfig: &Value) -> anyhow::Result<()> {
    use std::io::Write as _;
    let path = dir.join(format!("{name}.kubeconfig"));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(kubeconfig.to_string().as_bytes())?;
    Ok(())
}
