//! Wakes the reconciler when somebody changes what we keep, or what we go by: a thread that waits for netlink news.

use std::time::Duration;

use anyhow::Context;
use mesh_types::defaults;
use netcfg::watch::{Changes, Interest, Watch};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

use crate::config::Kernel;

/// Pause after an error, so that a broken socket does not spin; the reconciler turns every 30 s without news.
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// Pause after news: a busy node's come by thousands, and one look is for all of them. The kernel keeps them meanwhile.
const NEWS_PAUSE: Duration = Duration::from_millis(5);

/// Where the news go; a full channel means that a turn is due anyway.
pub struct News {
    /// Something of ours is not as it was.
    pub ours: mpsc::Sender<()>,
    /// Something of others is not, that own endpoints or ways to peers may follow from.
    pub surroundings: mpsc::Sender<()>,
}

/// Starts the thread. It lives as long as the process.
pub fn start(kernel: &Kernel, news: News) -> anyhow::Result<()> {
    let mut watch = Watch::open(interest(kernel)).context("watch the kernel for changes")?;
    std::thread::Builder::new()
        .name("kernel-watch".into())
        .spawn(move || {
            loop {
                match next(&mut watch) {
                    Ok(changes) => {
                        if !(tell(&news.ours, changes.ours)
                            && tell(&news.surroundings, changes.surroundings))
                        {
                            return;
                        }
                        std::thread::sleep(NEWS_PAUSE);
                    }
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

fn interest(kernel: &Kernel) -> Interest {
    Interest {
        tun: kernel.tun.clone(),
        pod_link_prefix: defaults::POD_LINK_PREFIX.to_owned(),
        table: kernel.table,
        rule_priority: kernel.rule_priority,
        nft_tables: vec![defaults::NFT_TABLE.to_owned(), defaults::NFT_TABLE_CNI.to_owned()],
    }
}

fn next(watch: &mut Watch) -> anyhow::Result<Changes> {
    match poll(&mut [PollFd::new(&*watch, PollFlags::IN)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno).context("wait for netlink"),
    }
    watch.drain().context("read netlink")
}

/// False when nobody listens any more.
fn tell(news: &mpsc::Sender<()>, changed: bool) -> bool {
    !changed || !matches!(news.try_send(()), Err(mpsc::error::TrySendError::Closed(())))
}
