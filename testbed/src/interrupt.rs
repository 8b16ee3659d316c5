//! Ctrl-C, a closed terminal and SIGTERM end the lab before the program.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::lab::Stopper;
use crate::progress;

/// Set once a signal has come: from then on its thread ends the program.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Signals noted since [`Signals::listen`], acted upon from [`Signals::take_down`] on.
#[derive(Debug)]
pub(crate) struct Signals {
    runtime: Runtime,
    hangup: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
}

impl Signals {
    /// Called before there is anything to take down, so that nothing can slip between.
    pub(crate) fn listen() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let inside = runtime.enter();
        let (hangup, interrupt) = (signal(SignalKind::hangup())?, signal(SignalKind::interrupt())?);
        let (quit, terminate) = (signal(SignalKind::quit())?, signal(SignalKind::terminate())?);
        drop(inside);
        Ok(Self { runtime, hangup, interrupt, quit, terminate })
    }

    /// From now on a signal ends the lab and the program, with 128 and its number as the exit status.
    pub(crate) fn take_down(mut self, stopper: Stopper) -> Result<()> {
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let kind = self.runtime.block_on(async {
                tokio::select! {
                    _ = self.hangup.recv() => SignalKind::hangup(),
                    _ = self.interrupt.recv() => SignalKind::interrupt(),
                    _ = self.quit.recv() => SignalKind::quit(),
                    _ = self.terminate.recv() => SignalKind::terminate(),
                }
            });
            INTERRUPTED.store(true, Ordering::SeqCst);
            progress("interrupted: taking the cluster down");
            if let Err(error) = stopper.down() {
                progress(&format!("{error:#}"));
            }
            std::process::exit(128 + kind.as_raw_value());
        })?;
        Ok(())
    }
}

/// Does not return once a signal has come: what the caller sees since then is a lab falling apart.
pub(crate) fn wait_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}
