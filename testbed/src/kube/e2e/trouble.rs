//! A node that is not meshed says why: in its condition, in an Event, by not being ready. The others are not affected.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::faults::{all_meshed, exchange};
use super::suite::{FAMILIES, PodFacts, Suite, condition, text};
use super::{Test, test};

pub(super) const TESTS: &[Test] = &[
    test(
        "trouble",
        "a second CNI configuration keeps the daemon from being ready, an Event names it, and other nodes stay meshed",
        other_cni,
    ),
    test(
        "trouble",
        "without /dev/net/tun an Event and the pod say so, and other nodes stay meshed",
        no_tun,
    ),
];

const OTHER: &str = "/etc/cni/net.d/00-other.conflist";

fn other_cni(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let place = suite.kube.node(&node)?;
    forget_events(suite, &node)?;
    let list = r#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"other"}]}"#;
    place.write(OTHER, list)?;
    let told = suite
        .wait_daemon_ready(&node, false)
        .and_then(|()| wait_event(suite, &node, "00-other.conflist"))
        .and_then(|()| others_meshed(suite, &suite.pods("app=tool")?, &node));
    // A daemon that comes when the other is there already is not ready either.
    let anew = told.and_then(|()| {
        let uid = text(&suite.daemon_pod(&node)?, "/metadata/uid").to_owned();
        replace_daemon(suite, &node)?;
        suite.wait("a new daemon runs", |suite| {
            let pod = suite.daemon_pod(&node)?;
            ensure!(text(&pod, "/metadata/uid") != uid, "the old one is there");
            ensure!(text(&pod, "/status/phase") == "Running", "it does not run");
            Ok(())
        })?;
        std::thread::sleep(std::time::Duration::from_secs(6)); // more than a period of its probe
        let pod = suite.daemon_pod(&node)?;
        ensure!(!super::suite::is_ready(&pod), "ready beside another network plugin");
        Ok(())
    });
    std::fs::remove_file(place.path(OTHER))?;
    anew?;
    suite.wait_daemon_ready(&node, true)?;
    all_meshed(suite)?;
    Ok(String::new())
}

fn no_tun(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let place = suite.kube.node(&node)?;
    forget_events(suite, &node)?;
    place.shell("mount -t tmpfs none /dev/net")?;
    let told = (|| {
        replace_daemon(suite, &node)?;
        wait_event(suite, &node, "/dev/net/tun")?;
        suite.wait("the pod says so in one line", |suite| {
            let pod = suite.daemon_pod(&node)?;
            let state = "/status/containerStatuses/0";
            let last = ["state", "lastState"].map(|which| {
                text(&pod, &format!("{state}/{which}/terminated/message")).trim().to_owned()
            });
            ensure!(!super::suite::is_ready(&pod), "it is ready");
            let good = |line: &String| line.contains("/dev/net/tun") && !line.contains('\n');
            ensure!(last.iter().any(good), "it says {last:?}");
            Ok(())
        })?;
        others_meshed(suite, &suite.pods("app=tool")?, &node)
    })();
    place.shell("umount /dev/net")?;
    told?;
    // It was started and ended a few times: the next would come late.
    replace_daemon(suite, &node)?;
    suite.wait_daemon_ready(&node, true)?;
    suite.wait("the node says that its network stands", |suite| {
        let object = suite.json(&["get", "node", &node])?;
        let network = condition(&object, "NetworkUnavailable").map(|one| text(one, "/status"));
        ensure!(network == Some("False"), "it is {network:?}");
        Ok(())
    })?;
    all_meshed(suite)?;
    Ok(String::new())
}

/// Deletes the daemon's pod; its DaemonSet makes another.
fn replace_daemon(suite: &Suite<'_>, node: &str) -> Result<()> {
    let pod = text(&suite.daemon_pod(node)?, "/metadata/name").to_owned();
    let words = ["-n", crate::kube::chart::NAMESPACE, "delete", "pod", &pod, "--timeout=60s"];
    suite.kube.kubectl(&words).map(|_| ())
}

/// Those of earlier tests say the same.
pub(super) fn forget_events(suite: &Suite<'_>, node: &str) -> Result<()> {
    let of_node = format!("--field-selector=involvedObject.name={node}");
    suite.kube.kubectl(&["-n", "default", "delete", "events", &of_node]).map(|_| ())
}

/// Waits for a warning of ours about this Node with these words.
pub(super) fn wait_event(suite: &Suite<'_>, node: &str, words: &str) -> Result<()> {
    suite.wait(&format!("an Event of {node} names {words}"), |suite| {
        let field = format!("--field-selector=involvedObject.kind=Node,involvedObject.name={node}");
        let list = suite.json(&["-n", "default", "get", "events", &field])?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let warnings = items.iter().filter(|event| {
            text(event, "/type") == "Warning" && text(event, "/reportingComponent") == "meshd"
        });
        let notes: Vec<&str> = warnings.map(|event| text(event, "/message")).collect();
        ensure!(notes.iter().any(|note| note.contains(words)), "Events say {notes:?}");
        Ok(())
    })
}

/// Every pair of these pods talks that has nothing to do with this node.
pub(super) fn others_meshed(suite: &Suite<'_>, pods: &[PodFacts], without: &str) -> Result<()> {
    let others: Vec<_> =
        pods.iter().filter(|pod| pod.node != without).map(PodFacts::party).collect();
    ensure!(others.len() > 1, "there are no others");
    for from in &others {
        for to in others.iter().filter(|to| to.name != from.name) {
            for family in FAMILIES {
                exchange(suite, from, to, family)?;
            }
        }
    }
    Ok(())
}
