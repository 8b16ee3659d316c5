//! What the daemon answers: health, readiness and metrics over TCP, the same and the status over a socket.
//!
//! ```text
//! TCP  127.0.0.1:15191    /healthz /readyz /metrics            nothing secret, anybody on the host
//! TCP  OVERLAY:--metrics-port                                  the same, for scrapers inside the mesh
//! unix RUN_DIR/meshd.sock the same, /status /netcheck          0600 in a 0700 directory, root only
//! unix --probe-socket     /healthz /readyz                     for probes of this very pod: no other daemon has it
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::config::Paths;
use crate::view::{Snapshot, View};
use crate::{files, metrics, netcheck, status};

/// Connections served at once on each listener: a kubelet, a scraper and a few people; more wait.
const CONNECTIONS_MAX: usize = 32;

/// A client that sends no whole request in this time, or none after its last, is let go.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// No connection lives longer: clients that read nothing must not keep a kubelet out. A scraper connects again.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);

/// How often the overlay addresses are looked at: they change with a node's pod CIDRs.
const OVERLAY_INTERVAL: Duration = Duration::from_secs(2);

/// Pause after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The reconciler turns at least every 30 s; four missed turns mean that it hangs.
const TURN_AGE_MAX: Duration = Duration::from_secs(120);

/// The data plane answers within milliseconds. A machine that stands still for a while is no reason to begin again
/// without sessions.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Both listeners, bound before anything else is touched so that a taken address is told early.
pub struct Admin {
    tcp: TcpListener,
    unix: UnixListener,
    probe: Option<UnixListener>,
}

impl Admin {
    /// Binds the TCP address and the socket. A socket left by a dead daemon is replaced, one that somebody answers at
    /// is not: the lock says nothing of a daemon with another state directory.
    pub async fn bind(
        address: SocketAddr,
        socket: &Path,
        probe: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let tcp = TcpListener::bind(address)
            .await
            .with_context(|| format!("listen on TCP {address}: choose another --admin-address"))?;
        if let Some(directory) = socket.parent() {
            files::private_directory(directory, Paths::is_ours)?;
        }
        ensure!(
            UnixStream::connect(socket).await.is_err(),
            "another meshd answers at {}: stop it first, or choose another --run-dir",
            socket.display()
        );
        let probe = probe.map(listen).transpose()?;
        Ok(Self { tcp, unix: listen(socket)?, probe })
    }

    /// Serves until dropped or aborted.
    pub async fn serve(self, view: Arc<View>) {
        let public = routes().with_state(Arc::clone(&view));
        let probed = probes().with_state(Arc::clone(&view));
        let private = routes()
            .route("/status", get(status_document))
            .route("/netcheck", get(netcheck_document))
            .with_state(view);
        let probe = async {
            if let Some(listener) = self.probe {
                serve_unix(listener, probed).await;
            }
        };
        tokio::join!(serve_tcp(self.tcp, public), serve_unix(self.unix, private), probe);
    }
}

/// Serves at the overlay addresses, which come and go with the pod CIDRs, for as long as the daemon runs.
pub async fn serve_overlay(port: u16, view: Arc<View>) {
    let mut serving: BTreeMap<IpAddr, tokio::task::JoinHandle<()>> = BTreeMap::new();
    let mut complained = BTreeSet::new();
    loop {
        let wanted = view.overlay_addresses();
        serving.retain(|address, task| {
            let keep = wanted.contains(address);
            if !keep {
                task.abort();
            }
            keep
        });
        for address in wanted {
            if serving.contains_key(&address) {
                continue;
            }
            match TcpListener::bind((address, port)).await {
                Ok(listener) => {
                    let router = routes().with_state(Arc::clone(&view));
                    serving.insert(address, tokio::spawn(serve_tcp(listener, router)));
                    tracing::info!(%address, port, "metrics are served inside the mesh");
                }
                // The address may not be on the device yet; only what lasts is told.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                Err(error) => {
                    if complained.insert(address) {
                        tracing::warn!(%address, port, %error, "metrics are not served: choose another --metrics-port");
                    }
                }
            }
        }
        tokio::time::sleep(OVERLAY_INTERVAL).await;
    }
}

/// A socket of ours; what a dead daemon left in its place is replaced.
fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::symlink_metadata(socket) {
        Ok(found) => {
            // A path is easily mistyped, and what is there may be anybody's.
            ensure!(
                found.file_type().is_socket(),
                "{} is there and is no socket: choose another path",
                socket.display()
            );
            std::fs::remove_file(socket).with_context(|| format!("remove {}", socket.display()))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("look at {}", socket.display())),
    }
    let listener =
        UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("set {} to mode 0600", socket.display()))?;
    Ok(listener)
}

fn probes() -> Router<Arc<View>> {
    Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz))
}

fn routes() -> Router<Arc<View>> {
    probes().route("/metrics", get(scrape))
}

async fn serve_tcp(listener: TcpListener, router: Router) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => serve_one(stream, router.clone(), permit),
            Err(error) => pause("TCP", &error).await,
        }
    }
}

async fn serve_unix(listener: UnixListener, router: Router) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            // The mode of socket and directory says the same; a bind mount of either must not open it.
            Ok((stream, _)) => match stream.peer_cred() {
                Ok(peer) if is_trusted(peer.uid()) => serve_one(stream, router.clone(), permit),
                Ok(peer) => tracing::warn!(uid = peer.uid(), "turned away from the status socket"),
                Err(error) => tracing::warn!(%error, "status socket: peer unknown, turned away"),
            },
            Err(error) => pause("status socket", &error).await,
        }
    }
}

/// Root, and whoever runs the daemon.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

async fn pause(listener: &str, error: &io::Error) {
    tracing::warn!(listener, %error, "accept failed");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

fn serve_one<S>(stream: S, router: Router, permit: tokio::sync::OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_TIMEOUT)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        match tokio::time::timeout(CONNECTION_TIMEOUT, served).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "admin connection ended"),
            Err(_) => tracing::debug!("admin connection ended after {CONNECTION_TIMEOUT:?}"),
        }
        drop(permit);
    });
}

/// Never waits, so that a probe's short patience says nothing: the answer of the data plane counts the next time.
async fn healthz(State(view): State<Arc<View>>) -> (StatusCode, String) {
    let asker = Arc::clone(&view);
    drop(tokio::task::spawn_blocking(move || asker.take_pulse()));
    health(view.since_turn(), view.silent_for())
}

fn health(since_turn: Duration, silent_for: Option<Duration>) -> (StatusCode, String) {
    let why = match silent_for {
        _ if since_turn > TURN_AGE_MAX => {
            format!("the reconciler has not turned for {} s\n", since_turn.as_secs())
        }
        Some(silent) if silent > SILENCE_MAX => {
            format!("the data plane has not answered for {} s\n", silent.as_secs())
        }
        _ => return (StatusCode::OK, "ok\n".to_owned()),
    };
    (StatusCode::SERVICE_UNAVAILABLE, why)
}

async fn readyz(State(view): State<Arc<View>>) -> (StatusCode, String) {
    let conditions = view.conditions();
    let ready = conditions.iter().all(|condition| condition.ok);
    let mut text = String::new();
    for condition in &conditions {
        let mark = if condition.ok { '+' } else { '-' };
        let message = if condition.message.is_empty() { "ok" } else { &condition.message };
        text.push_str(&format!("[{mark}] {}: {message}\n", condition.name));
    }
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

async fn scrape(State(view): State<Arc<View>>) -> Response {
    let rendered = match snapshot(view).await {
        Ok(snapshot) => metrics::render(&snapshot),
        Err(error) => Err(error),
    };
    match rendered {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => failed(&error),
    }
}

async fn status_document(State(view): State<Arc<View>>) -> Response {
    match snapshot(view).await {
        Ok(snapshot) => Json(status::build(&snapshot)).into_response(),
        Err(error) => failed(&error),
    }
}

/// Takes seconds: relays are asked.
async fn netcheck_document(State(view): State<Arc<View>>) -> Response {
    match netcheck::run(view).await {
        Ok(found) => Json(found).into_response(),
        Err(error) => failed(&error),
    }
}

/// Off the reactor: the data plane answers between two bursts of packets.
async fn snapshot(view: Arc<View>) -> anyhow::Result<Snapshot> {
    tokio::task::spawn_blocking(move || view.snapshot()).await.context("take a snapshot")
}

fn failed(error: &anyhow::Error) -> Response {
    tracing::warn!(error = format!("{error:#}"), "admin request failed");
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream as Client;

    use super::*;
    use crate::view::condition;
    use crate::view::tests::{Hanging, sample};

    struct Running {
        tcp: SocketAddr,
        socket: std::path::PathBuf,
        view: Arc<View>,
        _dir: tempfile::TempDir,
        _runtime: tokio::runtime::Runtime,
    }

    fn running() -> Running {
        let dir = tempfile::tempdir().expect("scratch");
        let socket = dir.path().join("run/meshd.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime");
        let view = Arc::new(sample());
        let admin = runtime
            .block_on(Admin::bind(
                "127.0.0.1:0".parse().expect("address"),
                &socket,
                Some(&dir.path().join("probe.sock")),
            ))
            .expect("bound");
        let tcp = admin.tcp.local_addr().expect("address");
        runtime.spawn(admin.serve(Arc::clone(&view)));
        Running { tcp, socket, view, _dir: dir, _runtime: runtime }
    }

    fn ask(mut stream: impl Read + Write, path: &str) -> String {
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        answer
    }

    #[test]
    fn readiness_names_every_condition_and_turns_with_the_last_one() {
        let running = running();
        let tcp = || TcpStream::connect(running.tcp).expect("connect");
        let answer = ask(tcp(), "/readyz");
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("[-] guard: not reached yet"), "{answer}");
        for name in condition::ALL {
            running.view.set_condition(name, Ok(()));
        }
        assert!(ask(tcp(), "/readyz").starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn health_fails_once_reconciler_or_data_plane_hang() {
        let running = running();
        let tcp = || TcpStream::connect(running.tcp).expect("connect");
        assert!(ask(tcp(), "/healthz").starts_with("HTTP/1.1 200"));
        running.view.beat();
        assert!(ask(tcp(), "/healthz").starts_with("HTTP/1.1 200"));
        let second = Duration::from_secs(1);
        assert_eq!(health(TURN_AGE_MAX, None).0, StatusCode::OK);
        assert_eq!(health(TURN_AGE_MAX + second, None).0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health(second, Some(SILENCE_MAX)).0, StatusCode::OK);
        let (code, why) = health(second, Some(SILENCE_MAX + second));
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
        assert!(why.contains("data plane"), "{why}");
    }

    #[test]
    fn a_question_about_health_finds_a_data_plane_that_hangs() {
        let running = running();
        running.view.set_data_source(Hanging);
        while running.view.silent_for().is_none() {
            ask(TcpStream::connect(running.tcp).expect("connect"), "/healthz");
        }
        let ready = ask(TcpStream::connect(running.tcp).expect("connect"), "/readyz");
        assert!(ready.contains("[-] data-plane: no answer"), "{ready}");
    }

    #[test]
    fn the_status_is_on_the_socket_and_not_on_tcp() {
        let running = running();
        let tcp = TcpStream::connect(running.tcp).expect("connect");
        assert!(ask(tcp, "/status").starts_with("HTTP/1.1 404"));
        let answer = ask(Client::connect(&running.socket).expect("connect"), "/status");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(r#""node":"node-1""#));
        let answer = ask(Client::connect(&running.socket).expect("connect"), "/metrics");
        assert!(answer.contains("meshd_build_info"), "{answer}");
    }

    #[test]
    fn the_probe_socket_answers_probes_and_nothing_else() {
        use crate::args::{ProbeArgs, Question};
        let running = running();
        let socket = running._dir.path().join("probe.sock");
        let probe = |question| crate::probe::run(&ProbeArgs { question, socket: socket.clone() });
        probe(Question::Live).expect("live");
        let told = format!("{:#}", probe(Question::Ready).expect_err("not ready"));
        assert!(told.contains("guard: not reached yet") && !told.contains('\n'), "{told}");
        for name in condition::ALL {
            running.view.set_condition(name, Ok(()));
        }
        probe(Question::Ready).expect("ready");
        for path in ["/status", "/metrics"] {
            let answer = ask(Client::connect(&socket).expect("connect"), path);
            assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
        }
        let gone = ProbeArgs { question: Question::Live, socket: "/nonexistent/probe".into() };
        assert!(
            format!("{:#}", crate::probe::run(&gone).expect_err("gone")).contains("has not run")
        );
    }

    #[test]
    fn socket_and_directory_are_the_owners_alone() {
        let running = running();
        let mode =
            |path: &Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&running.socket), 0o600);
        assert_eq!(mode(running.socket.parent().expect("parent")), 0o700);
    }

    #[test]
    fn a_taken_address_is_told_with_the_flag_to_change() {
        let running = running();
        let dir = tempfile::tempdir().expect("scratch");
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let error = runtime
            .block_on(Admin::bind(running.tcp, &dir.path().join("s"), None))
            .err()
            .expect("taken");
        assert!(format!("{error:#}").contains("--admin-address"), "{error:#}");
    }

    #[test]
    fn a_file_that_is_no_socket_is_not_replaced_by_one() {
        let dir = tempfile::tempdir().expect("scratch");
        let (socket, precious) = (dir.path().join("run/s"), dir.path().join("precious"));
        std::fs::write(&precious, "x").expect("write");
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let any = "127.0.0.1:0".parse().expect("address");
        let bound = runtime.block_on(Admin::bind(any, &socket, Some(&precious)));
        let error = format!("{:#}", bound.map(drop).expect_err("refused"));
        assert!(error.contains("no socket") && error.contains("precious"), "{error}");
        assert_eq!(std::fs::read_to_string(&precious).expect("still there"), "x");
    }

    #[test]
    fn the_socket_of_a_living_daemon_is_not_taken_and_that_of_a_dead_one_is() {
        let running = running();
        let socket = running.socket.clone();
        let any = "127.0.0.1:0".parse().expect("address");
        let bind = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("runtime").block_on(Admin::bind(any, &socket, None)).map(drop)
        };
        let error = bind().expect_err("taken");
        assert!(format!("{error:#}").contains("--run-dir"), "{error:#}");
        assert!(Client::connect(&socket).is_ok(), "it still answers");
        let dir = running._dir;
        drop(running._runtime);
        bind().expect("free");
        drop(dir);
    }
}
