//! The server: TLS, listeners, and the handle tests hold.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rand::RngExt as _;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::apply::Manager;
use super::auth::Identity;
use super::http::router;
use super::kubeconfig::kubeconfig;
use super::shared::{Fault, Shared};
use super::store::{StoreError, Write};

/// Where to listen and under which names.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// Port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
}

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct ApiServer {
    handle: ApiHandle,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// What a test does to the server behind its clients' backs.
#[derive(Debug, Clone)]
pub struct ApiHandle {
    shared: Arc<Shared>,
    ca_pem: String,
    addresses: Vec<SocketAddr>,
}

impl ApiServer {
    /// Binds and serves in the current tokio runtime and the current network namespace.
    pub async fn start(options: &ApiOptions) -> anyhow::Result<Self> {
        let mut names: Vec<String> = vec!["localhost".into()];
        names.extend(options.listen.iter().map(|address| address.ip().to_string()));
        let (acceptor, ca_pem) = certificate(names)?;
        let shared = Arc::<Shared>::default();
        let (mut addresses, mut tasks) = (Vec::new(), Vec::new());
        for address in &options.listen {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("API server cannot listen on {address}"))?;
            addresses.push(listener.local_addr()?);
            tasks.push(tokio::spawn(accept(listener, acceptor.clone(), shared.clone())));
        }
        Ok(Self { handle: ApiHandle { shared, ca_pem, addresses }, tasks })
    }

    pub fn handle(&self) -> ApiHandle {
        self.handle.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.handle.close_watches();
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    let app = router(shared);
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (acceptor, app) = (acceptor.clone(), app.clone());
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = TowerToHyperService::new(app);
            let served = Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "API connection ended");
            }
        });
    }
}

/// A fresh CA and a server certificate for `names`.
fn certificate(names: Vec<String>) -> anyhow::Result<(TlsAcceptor, String)> {
    let ca_key = rcgen::KeyPair::generate()?;
    let mut ca = rcgen::CertificateParams::new(Vec::new())?;
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "testbed CA");
    let ca_cert = ca.self_signed(&ca_key)?;
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate()?;
    let mut leaf = rcgen::CertificateParams::new(names)?;
    leaf.distinguished_name.push(rcgen::DnType::CommonName, "testbed API server");
    leaf.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let cert = leaf.signed_by(&key, &issuer)?;
    let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], private)?;
    Ok((TlsAcceptor::from(Arc::new(config)), ca_cert.pem()))
}

impl ApiHandle {
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A new token for `identity`.
    pub fn issue_token(&self, identity: Identity) -> String {
        let token = format!("testbed-{:032x}", rand::rng().random::<u128>());
        self.shared.tokens().insert(token.clone(), identity);
        token
    }

    /// A kubeconfig for a new token, pointing at the address `ip` listens on (the first by default).
    pub fn kubeconfig(&self, identity: Identity, ip: Option<IpAddr>) -> Value {
        let chosen = self.addresses.iter().find(|address| Some(address.ip()) == ip);
        let server = chosen
            .or_else(|| self.addresses.first())
            .map(|address| format!("https://{address}"))
            .unwrap_or_default();
        let user = identity.user();
        kubeconfig(&server, &self.ca_pem, &user, &self.issue_token(identity))
    }

    pub fn set_fault(&self, fault: Fault) {
        self.shared.set_fault(fault);
    }

    /// Returns once faults have refused `count` requests.
    pub async fn wait_refused(&self, count: u64) {
        self.shared.wait_refused(count).await;
    }

    /// Cuts every open watch.
    pub fn close_watches(&self) {
        self.shared.close_watches();
    }

    /// Forgets history: a watch that resumes from before is told 410 Gone.
    pub fn compact(&self) {
        self.shared.store().compact();
    }

    /// Creates a Node as an operator would.
    pub fn create_node(&self, node: &Value) -> Result<Value, StoreError> {
        let now = self.shared.timestamp();
        let created = self.shared.store().create(node, &operator(), &now, false)?;
        self.shared.notify();
        Ok(created.as_ref().clone())
    }

    /// Merge patch as an operator would; `status` through the subresource.
    pub fn patch_node(&self, name: &str, patch: &Value, status: bool) -> Result<Value, StoreError> {
        let mut manager = operator();
        manager.subresource = if status { "status" } else { "" };
        let after = self.shared.store().write(name, Write::MergePatch(patch), &manager, false)?;
        self.shared.notify();
        Ok(after.as_ref().clone())
    }

    pub fn delete_node(&self, name: &str) -> Result<(), StoreError> {
        self.shared.store().delete(name)?;
        self.shared.notify();
        Ok(())
    }

    pub fn node(&self, name: &str) -> Result<Value, StoreError> {
        Ok(self.shared.store().get(name)?.as_ref().clone())
    }

    pub fn nodes(&self) -> Vec<Value> {
        let snapshot = self.shared.store().snapshot();
        snapshot.objects.iter().map(|object| object.as_ref().clone()).collect()
    }

    /// Version of the last change: tests assert that nothing was written.
    pub fn version(&self) -> u64 {
        self.shared.store().version()
    }
}

fn operator() -> Manager {
    Manager { name: "operator".into(), apply: false, subresource: "" }
}
