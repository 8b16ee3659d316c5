//! The way to the API server, shared by `meshd` and `keyrelay`: a client with bounds, the pauses between attempts, and errors in
//! an operator's words. What is asked, and what the answers mean, is each program's own.

pub mod words;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::runtime::watcher;
use kube::{Client, Config};
use secrecy::{ExposeSecret, SecretString};

/// A server that does not take a connection within this time is not there.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that takes connections and says nothing for so long is not there either. Watches are ended by the
/// server before it, see [`WATCH_PERIOD_S`].
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The server is asked to end a watch after so long, in seconds; the next one goes on where it ended.
const WATCH_PERIOD_S: u32 = 45;

/// Between a suspicious list and the one that confirms it: a server that has just started, or lost its
/// store, gets this long.
pub const CONFIRM_AFTER: Duration = Duration::from_secs(5);

/// Silence after an error that means the watch stands again: longer than the longest pause between attempts
/// and the time one takes to fail, also at a server that never answers.
pub const RECOVERED_AFTER: Duration = Duration::from_secs(80);

/// Pause between attempts to list and watch, shortest and longest. Half of it is random, so that a
/// thousand nodes do not come back to a server at once.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// With the kubeconfig, or the service account of the pod; `instead` says what to pass where there is neither. Asks no
/// server yet.
pub async fn client(kubeconfig: Option<&Path>, instead: &str) -> anyhow::Result<Client> {
    let mut config = config(kubeconfig, instead).await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.write_timeout = Some(READ_TIMEOUT);
    // A connection that idled in the pool begins its time with the request.
    config.reset_reader_on_write = true;
    Client::try_from(config).context("make a client of the Kubernetes API")
}

/// Watches end by themselves before a silent server is given up.
pub fn watched() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_PERIOD_S)
}

/// The kubeconfig's server, or the one the pod is told of.
pub async fn config(kubeconfig: Option<&Path>, instead: &str) -> anyhow::Result<Config> {
    match kubeconfig {
        Some(path) => {
            config_of(read_file(path)?, &path.display().to_string(), &KubeConfigOptions::default())
                .await
        }
        None => Config::incluster().with_context(|| {
            format!("no Kubernetes API server: not in a pod with a service account; {instead}")
        }),
    }
}

/// Half of it is random, so that a thousand nodes do not come back to a server at once.
pub fn jittered(pause: Duration) -> Duration {
    let half = pause / 2;
    half + half.mul_f64(rand::random::<f64>())
}

pub fn read_file(path: &Path) -> anyhow::Result<Kubeconfig> {
    let shown = path.display();
    match Kubeconfig::read_from(path) {
        Ok(file) => Ok(file),
        // The reader's own message shows the lines around the mistake, and a token may be in them.
        Err(KubeconfigError::Parse(error)) => match error.location() {
            Some(at) => bail!("kubeconfig {shown} is none: look at line {}", at.line()),
            None => bail!("kubeconfig {shown} is none"),
        },
        Err(error) => Err(error).with_context(|| format!("read kubeconfig {shown}")),
    }
}

pub async fn config_of(
    file: Kubeconfig,
    shown: &str,
    options: &KubeConfigOptions,
) -> anyhow::Result<Config> {
    let config = Config::from_custom_kubeconfig(file, options)
        .await
        .with_context(|| format!("use kubeconfig {shown}"))?;
    // The client panics over it.
    let printable =
        |token: &SecretString| token.expose_secret().bytes().all(|b| b.is_ascii_graphic());
    ensure!(
        config.auth_info.token.as_ref().is_none_or(printable),
        "kubeconfig {shown}: the token holds a line break or another character that no token has"
    );
    Ok(config)
}

/// Doubling pauses with a random half.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: RETRY_MIN }
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = jittered(self.next);
        self.next = self.next.saturating_mul(2).min(RETRY_MAX);
        Some(pause)
    }
}

impl kube::runtime::utils::Backoff for Backoff {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_their_bound_and_are_never_half_of_it_short() {
        let pauses: Vec<Duration> = Backoff::default().take(8).collect();
        assert!(pauses[0] >= RETRY_MIN / 2 && pauses[0] <= RETRY_MIN);
        assert!(pauses[7] >= RETRY_MAX / 2 && pauses[7] <= RETRY_MAX);
    }

    #[test]
    fn a_server_that_never_answers_is_an_error_before_silence_means_recovery() {
        assert!(RETRY_MAX + CONNECT_TIMEOUT + READ_TIMEOUT < RECOVERED_AFTER);
        assert!(Duration::from_secs(WATCH_PERIOD_S.into()) < READ_TIMEOUT);
    }

    #[tokio::test]
    async fn what_cannot_be_opened_says_what_to_do() {
        let told = async |path: Option<&Path>| {
            format!("{:#}", client(path, "pass --kubeconfig or --roster").await.err().unwrap())
        };
        assert!(
            told(Some(Path::new("/nonexistent/kubeconfig")))
                .await
                .contains("/nonexistent/kubeconfig")
        );
        assert!(told(None).await.contains("--kubeconfig or --roster"));
    }

    #[tokio::test]
    async fn a_bad_kubeconfig_is_told_without_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        let told = async |text: &str| {
            std::fs::write(&path, text).unwrap();
            format!("{:#}", client(Some(&path), "").await.err().unwrap())
        };
        for (text, hint) in [
            ("users:\n- name: u\n  user:\n    token: SECRET\n   bad: [\n", "line 5"),
            ("users:\n- name: u\n  user: SECRET\n", "line 3"),
            (
                "current-context: c\nclusters: [{name: k, cluster: {server: 'http://127.0.0.1:1'}}]\n\
                 contexts: [{name: c, context: {cluster: k, user: u}}]\n\
                 users: [{name: u, user: {token: \"SECRET\\n\"}}]\n",
                "line break",
            ),
        ] {
            let error = told(text).await;
            assert!(error.contains(hint) && !error.contains("SECRET"), "{error}");
        }
    }
}
