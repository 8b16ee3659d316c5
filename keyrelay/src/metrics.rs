//! Every metric of the relay, in one place, and the page they are read from. Prefix `keyrelay_`, drops by reason.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::core::counters::{Event, Reason};
use crate::health::Doubt;
use crate::shared::Shared;

/// Connections served at once: a kubelet, a scraper and a few people; more wait.
const CONNECTIONS_MAX: usize = 32;

/// A client that sends no whole request in this time is let go, and one connected for so long.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);

/// Pause after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The answer to a scrape.
pub fn render(shared: &Shared) -> anyhow::Result<String> {
    let mut registry = Registry::with_prefix("keyrelay");
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: usize| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    gauge(&mut registry, "members", "Keys that may use the relay", shared.relay.members());
    let registered = "Addresses a member is registered at";
    gauge(&mut registry, "clients", registered, shared.relay.registered());
    gauge(&mut registry, "streams", "Connections over TLS", shared.streams.count());
    let refused = shared.refused_keys.load(Ordering::Relaxed);
    let refused = usize::try_from(refused).unwrap_or(usize::MAX);
    gauge(&mut registry, "refused_keys", "Annotations of Nodes that hold no key", refused);
    let trouble = shared.api_trouble.load(Ordering::Relaxed).into();
    gauge(&mut registry, "api_trouble", "Whether the API server is not to be asked", trouble);
    let doubts = Family::<[(&str, &str); 1], Gauge>::default();
    registry.register("not_ready", "Why the relay is not ready, by reason", doubts.clone());
    for doubt in Doubt::ALL {
        let stands = shared.health.stands(doubt).into();
        doubts.get_or_create_owned(&[("reason", doubt.label())]).set(stands);
    }
    for event in Event::ALL {
        total(&mut registry, event.name(), help(event), shared.events(event));
    }
    let drops = Family::<[(&str, &str); 1], Counter>::default();
    registry.register("dropped_datagrams", "Datagrams not passed on, by reason", drops.clone());
    for reason in Reason::ALL {
        let labels = [("reason", reason.label())];
        drops.get_or_create_owned(&labels).inc_by(shared.drops(reason));
    }
    total(&mut registry, "faults", "Bursts lost to a fault of the relay's", shared.panics());
    let (streams, udp) = (&shared.streams, shared.udp());
    for (name, help, value) in [
        ("streams_refused", "Connections refused for want of a place", streams.refused()),
        ("stream_lost_datagrams", "Datagrams a connection had no room for", streams.lost()),
        ("udp_received_bytes", "Bytes received", udp.rx_bytes),
        ("udp_sent_bytes", "Bytes sent", udp.tx_bytes),
        ("udp_receive_overflow", "Datagrams the kernel had no room for", udp.rx_overflow),
        ("udp_send_dropped", "Datagrams given up for want of buffer", udp.tx_dropped),
        ("udp_send_errors", "Datagrams the kernel refused to send", udp.tx_errors),
    ] {
        total(&mut registry, name, help, value);
    }
    let mut text = String::new();
    encode(&mut text, &registry).context("format metrics")?;
    Ok(text)
}

fn total(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

fn help(event: Event) -> &'static str {
    match event {
        Event::Handshakes => "Handshakes answered",
        Event::Cookies => "Handshakes answered by a cookie",
        Event::Registrations => "Members registered, or moved to another address",
        Event::Answers => "Addresses told",
        Event::ToldNotHere => "Senders told that their receiver is not registered",
        Event::ToldLeaving => "Members told that the relay stops",
        Event::CarriedDatagrams => "Datagrams carried from one member to another",
        Event::CarriedBytes => "Bytes of them, with their headers",
    }
}

/// Serves `/healthz` (it lives), `/readyz` (it is of use; the reasons where it is not) and `/metrics` until dropped.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let page = service_fn(|request: hyper::Request<_>| {
                let answer = page(request.uri().path(), &shared);
                std::future::ready(Ok::<_, Infallible>(answer))
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT);
            let connection = http.serve_connection(TokioIo::new(stream), page);
            // Whatever ended it concerns the client alone.
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(place);
        });
    }
}

fn page(path: &str, shared: &Shared) -> Response<Full<Bytes>> {
    let (status, text) = match path {
        "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => match shared.health.page() {
            Ok(text) => (StatusCode::OK, text),
            Err(text) => (StatusCode::SERVICE_UNAVAILABLE, text),
        },
        "/metrics" => match render(shared) {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")),
        },
        _ => (StatusCode::NOT_FOUND, "/healthz, /readyz or /metrics\n".to_owned()),
    };
    let kind = if path == "/metrics" { OPENMETRICS } else { "text/plain" };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
