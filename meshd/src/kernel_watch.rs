//! Wakes the reconciler when somebody changes what we keep: a thread that waits for netlink news.

use std::time::Duration;

use anyhow::Context;
use mesh_types::defaults;
use netcfg::watch::{Changes, Watch};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

/// Pause after an error, so that a broken socket does not spin; the reconciler turns every 30 s without news.
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// Starts the thread. It lives as long as the process.
pub fn start(news: mpsc::Sender<()>) -> anyhow::Result<()> {
    let mut watch = Watch::open().context("watch the kernel for changes")?;
    std::thread::Builder::new()
        .name("kernel-watch".into())
        .spawn(move || {
            loop {
                match next(&mut watch) {
                    // A full channel means that a turn is due anyway.
                    Ok(changes) if concerns_us(&changes) => {
                        if let Err(mpsc::error::TrySendError::Closed(())) = news.try_send(()) {
                            return;
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(error = format!("{error:#}"), "kernel watch");
                        std::thread::sleep(ERROR_PAUSE);
                    }
                }
            }
        })
        .context("start the kernel watch")?;
    Ok(())
}

fn next(watch: &mut Watch) -> anyhow::Result<Changes> {
    poll(&mut [PollFd::new(&*watch, PollFlags::IN)], None).context("wait for netlink")?;
    watch.drain().context("read netlink")
}

fn concerns_us(changes: &Changes) -> bool {
    changes.links
        || changes.addresses
        || changes.routes
        || changes.rules
        || changes.touches_table(defaults::NFT_TABLE)
        || changes.touches_table(defaults::NFT_TABLE_CNI)
}
