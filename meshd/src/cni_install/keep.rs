//! The daemon's eye on the configuration: put back what is gone or damaged, and say who wins.

use std::sync::Arc;
use std::time::Duration;

use super::{Choice, Wanted, choice, install};
use crate::folder::Changes;
use crate::view::{View, condition};

/// A writer that is not atomic gets this long to finish.
const SETTLE: Duration = Duration::from_millis(100);

/// Between two looks: somebody who rewrites our file all the time costs no core.
const INTERVAL: Duration = Duration::from_secs(1);

/// Looks now and after every change, for as long as the daemon runs.
pub async fn keep(wanted: Wanted, view: Arc<View>) {
    let mut changes = Changes::of(&wanted.conf_dir);
    loop {
        let looked = tokio::task::spawn_blocking({
            let wanted = wanted.clone();
            move || look(&wanted)
        });
        let outcome = looked.await.unwrap_or_else(|error| Err(error.to_string()));
        view.set_condition(condition::CNI, outcome);
        tokio::time::sleep(INTERVAL).await;
        changes.next().await;
        tokio::time::sleep(SETTLE).await;
    }
}

/// A folder that belongs to another user is written by the step that installs, which may; the daemon has no right to.
fn why(error: &anyhow::Error) -> String {
    let denied = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::PermissionDenied;
    let hint = match error.chain().any(|cause| cause.downcast_ref().is_some_and(denied)) {
        true => {
            ": the folder belongs to another user, and only the installing step of a start may write there: delete this \
                 node's meshd pod, so that another one puts it right"
        }
        false => "",
    };
    format!("{error:#}{hint}")
}

fn look(wanted: &Wanted) -> Result<(), String> {
    match install(wanted) {
        Ok(done) => {
            for made in done.made {
                tracing::warn!(made, "the CNI configuration was not as it should be");
            }
        }
        Err(error) => return Err(why(&error)),
    }
    match choice(&wanted.conf_dir, &wanted.conf_name) {
        Ok(Choice::Ours) => Ok(()),
        Ok(Choice::Nothing) => Err(format!("{} holds no configuration", wanted.conf_dir.display())),
        Ok(Choice::Other(other)) => Err(format!(
            "container runtimes take {} before {} ({}): remove it from the folder of CNI configurations, or give ours an earlier \
             name (value cni.confName)",
            other.file,
            wanted.conf_name,
            other.describe()
        )),
        Err(error) => Err(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

    use super::super::{Others, PLUGIN};
    use super::*;

    #[test]
    fn a_folder_of_another_user_is_the_installing_steps_to_mend_and_the_words_say_so() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "this test needs root, and CI must run it");
            return;
        }
        let dir = tempfile::tempdir().expect("scratch");
        let program = dir.path().join("program");
        std::fs::write(&program, b"\x7fELF").expect("program");
        let wanted = Wanted {
            program: Some(program),
            nft: None,
            bin_dir: dir.path().join("bin"),
            conf_dir: dir.path().join("net.d"),
            conf_name: "10-meshd.conflist".into(),
            capabilities: Vec::new(),
            state_dir: "/var/lib/meshd".into(),
            others: Others::Leave,
        };
        install(&wanted).expect("installed");
        assert!(wanted.bin_dir.join(PLUGIN).exists());
        chown(&wanted.conf_dir, Some(4_711), Some(4_711)).expect("another's");
        std::fs::remove_file(wanted.conf_dir.join(&wanted.conf_name)).expect("removed");
        // Capabilities are a thread's own.
        let looked = std::thread::spawn({
            let wanted = wanted.clone();
            move || {
                let mut sets = capabilities(None).expect("readable");
                sets.effective.remove(CapabilitySet::DAC_OVERRIDE);
                set_capabilities(None, sets).expect("fewer");
                look(&wanted)
            }
        });
        let why = looked.join().expect("looked").expect_err("it may not write");
        assert!(
            why.contains("10-meshd.conflist") && why.contains("delete this node's meshd pod"),
            "{why}"
        );
        assert_eq!(look(&wanted), Ok(()), "with the right it is mended");
    }
}
