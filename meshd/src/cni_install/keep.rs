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

fn look(wanted: &Wanted) -> Result<(), String> {
    match install(wanted) {
        Ok(done) => {
            for made in done.made {
                tracing::warn!(made, "the CNI configuration was not as it should be");
            }
        }
        Err(error) => return Err(format!("{error:#}")),
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
