//! Every log of a cluster in one folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::record;

/// A log is cut to its end beyond this: a cluster that failed for hours fills no disk.
const LOG_BYTES: u64 = 16 << 20;

/// Copies every log of a lab, whatever state it is in, into `to`: one folder per namespace, pods' logs with their
/// nodes, and what the API server knows where it still answers.
pub(super) fn collect(
    lab_dir: &Path,
    cluster_dir: &Path,
    tools: Option<&Path>,
    to: &Path,
) -> Result<()> {
    // Replaces logs of an earlier time, and nothing that is not ours.
    record::make_dir(to)?;
    for entry in fs::read_dir(lab_dir).into_iter().flatten().flatten() {
        let place = to.join(entry.file_name());
        for log in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            copy_end(&log.path(), &place.join(log.file_name()))?;
        }
        let pods = cluster_dir.join(entry.file_name()).join("log/pods");
        for pod in fs::read_dir(pods).into_iter().flatten().flatten() {
            for container in fs::read_dir(pod.path()).into_iter().flatten().flatten() {
                for log in fs::read_dir(container.path()).into_iter().flatten().flatten() {
                    let name = [pod.file_name(), container.file_name(), log.file_name()]
                        .map(|name| name.to_string_lossy().into_owned());
                    copy_end(&log.path(), &place.join("pods").join(name.join("_")))?;
                }
            }
        }
    }
    if let Some(tools) = tools {
        for (name, words) in [
            ("nodes.yaml", vec!["get", "nodes", "-o", "yaml"]),
            ("pods.txt", vec!["describe", "pods", "-A"]),
            ("events.txt", vec!["get", "events", "-A", "--sort-by=.metadata.creationTimestamp"]),
        ] {
            let mut command = std::process::Command::new(tools.join("kubectl"));
            command.arg("--kubeconfig").arg(cluster_dir.join("kubeconfig"));
            command.arg("--request-timeout=5s").args(words);
            if let Ok(output) = command.output() {
                let text = [output.stdout, output.stderr].concat();
                fs::write(to.join(name), text)?;
            }
        }
    }
    Ok(())
}

fn copy_end(from: &Path, to: &Path) -> Result<()> {
    use std::io::{Seek as _, SeekFrom};
    if !from.is_file() {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut source = fs::File::open(from)?;
    let length = source.metadata()?.len();
    source.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
    std::io::copy(&mut std::io::Read::take(source, LOG_BYTES), &mut fs::File::create(to)?)
        .with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}
