//! The NAT laboratory: nodes behind every kind of NAT, and whether two of them reach each other directly.
//!
//! ```text
//!                                 internet (bridge 192.0.2.0/24, 2001:db8:f::/64)
//!      ┌──────────┬───────────────────┬─────────────────┬──────────────────┬─────────────────┐
//!   wan│      eth0│                wan│              wan│               wan│             eth0│
//!    router     node                carrier           router             router             host
//!   lan│        open              lan│100.64.0.1  lan-a┌┴┐lan-b     lan (bridge)          192.0.2.2, .3
//!      │192.168.1.1             wan│100.64.0.10    .1.1│ │.2.1          ┌┴┐               two addresses,
//!  eth0│.10                      router         .1.10│   │.2.10    .1.10│ │.1.11         two ports each
//!    node                      lan│             node a  node b     node a  node b
//!    the kinds below               node            hairpin             shared
//!                                 cgnat          no-hairpin
//! ```
//!
//! | site | mapping | filtering | built from |
//! |---|---|---|---|
//! | open | none | none | node on the internet, both families |
//! | full-cone | endpoint-independent | endpoint-independent | masquerade, and a map of external ports |
//! | address-restricted | endpoint-independent | address-dependent | masquerade, and a map of external ports with remote addresses |
//! | port-restricted | endpoint-independent | address- and port-dependent | masquerade |
//! | symmetric | address- and port-dependent, counting | address- and port-dependent | source translation to the next port |
//! | symmetric-random | address- and port-dependent, at random | address- and port-dependent | masquerade random |
//! | cgnat | endpoint-independent, port not preserved | address- and port-dependent | masquerade behind a carrier's block of ports |
//! | hairpin, no-hairpin | endpoint-independent | address- and port-dependent | two networks kept apart; traffic for the public address turned round, or not |
//! | shared | endpoint-independent | address- and port-dependent | two nodes in one network |
//! | udp-blocked | – | – | masquerade, no UDP forwarded |
//! | v6-only | none | address- and port-dependent | firewall, no IPv4 |
//! | short-mappings | endpoint-independent, for 20 s | address- and port-dependent | masquerade, connection tracking that forgets |
//!
//! The words are those of RFC 4787; "cone" and "restricted" are those of RFC 3489, which people still use. See [`rules`] for how
//! Linux is made to behave so. Every kind is built once for either side of a pair, with a NAT each; of hairpin, no-hairpin and shared
//! the two sides are behind one NAT. All homes use the same private addresses, as homes do.
//!
//! ```text
//! kind      what each is, in words of RFC 4787        rules     how Linux is made to be so
//! site      namespaces and wires                      wire      what is said to the host on the internet
//! host      reflector and relay there                 probe     measures what a site does (RFC 5780)
//! expected  direct or relayed, from two kinds         punch     tries it with plain sockets
//! daemons   connects it as users do                   pairs     all of them, by whatever connects them
//! page      the guide                             steps     what is timed, within which bounds, and what a run took
//! ```

mod daemons;
mod expected;
mod host;
mod kind;
mod page;
mod pair;
mod pairs;
mod probe;
mod punch;
mod rules;
mod site;
mod steps;
mod wire;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::lab::{self, Lab, Programs};
use crate::{interrupt, progress};

pub use daemons::Daemons;
pub use expected::{Expected, Reason, expected, reason};
pub use host::Host;
pub use kind::{Behaviour, Filtering, Kind, Lifetime, Mapping, Neighbours, Ports};
pub use pair::{Got, Outcome, Pair};
pub use pairs::{Connect, run as connect_pairs, wanted};
pub use probe::{measure, reaches_by_tcp};
pub use punch::Sockets;
pub use site::{NatLab, Side, Site};

/// Pairs connected at once: they wait, mostly.
pub const PARALLEL: usize = 8;

/// The same with daemons: each pair has two of them, and two relays.
pub const PARALLEL_DAEMONS: usize = 12;

/// What connects the pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum By {
    /// What users run: `meshd` and `keyrelay`
    Daemons,
    /// Hole punching by the laboratory itself, which shows what the sites allow
    Sockets,
}

#[derive(Debug, Clone, clap::Args)]
pub struct NatOptions {
    /// One JSON document on stdout instead of the table
    #[arg(long)]
    pub json: bool,
    /// One pair of kinds of site, or every pair with one kind
    #[arg(long, value_name = "A[,B]", value_delimiter = ',', value_enum)]
    pub only: Vec<Kind>,
    /// What connects the pairs
    #[arg(long, value_enum, default_value_t = By::Daemons)]
    pub by: By,
    /// Write the guide's page here with the figures of this run, when every pair is as expected; the one of the repository is of
    /// all pairs
    #[arg(long, value_name = "FILE")]
    pub page: Option<PathBuf>,
    /// Name of the lab, to run more than one
    #[arg(long, hide = true, default_value = "nat")]
    pub lab: String,
}

/// What a run found, as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub pairs: Vec<Pair>,
    pub duration_s: f64,
    /// Why the exit status is not 0; empty when it is.
    pub problems: Vec<String>,
}

/// Connects the pairs and prints what came of it. `Ok(false)` when a pair is not as expected.
pub fn run(options: &NatOptions) -> Result<bool> {
    ensure!(options.only.len() <= 2, "--only takes one kind of site or two, a pair");
    let may_write = options.page.is_none() || options.by == By::Daemons;
    ensure!(may_write, "--page is of what daemons do: leave out --by sockets");
    lab::require_root()?;
    let begin = Instant::now();
    let programs = Programs::beside(&std::env::current_exe()?)?;
    let signals = interrupt::Signals::listen()?;
    let lab = Lab::create(&options.lab, programs)?;
    signals.take_down(lab.stopper())?;
    let result = connect_all(lab, options);
    // The lab was taken from under us: whoever does it ends the program.
    interrupt::wait_if_interrupted();
    let pairs = result?;
    let problems = pairs.iter().filter(|pair| !pair.ok).map(page::problem).collect();
    let report = Report { pairs, duration_s: begin.elapsed().as_secs_f64(), problems };
    print(&report, options)?;
    Ok(report.problems.is_empty())
}

fn connect_all(lab: Lab, options: &NatOptions) -> Result<Vec<Pair>> {
    let wanted = wanted(&options.only);
    let (near, far): (Vec<Kind>, Vec<Kind>) = wanted.iter().copied().unzip();
    let used = |kind: &Kind| near.contains(kind) || far.contains(kind);
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(used).collect();
    progress(&format!("building {} kinds of site, one for either side", kinds.len()));
    let built = NatLab::build(lab, &kinds, &Side::BOTH)?;
    let said = |pair: &Pair| {
        if !pair.ok {
            progress(&page::problem(pair));
        }
    };
    let count = wanted.len();
    let pairs = match options.by {
        By::Sockets => {
            let host = Host::start(&built.host)?;
            progress(&format!("connecting {count} pairs by plain sockets"));
            let pairs = connect_pairs(&built, &Sockets, &wanted, PARALLEL, said);
            drop(host);
            pairs
        }
        By::Daemons => {
            let parallel = PARALLEL_DAEMONS.min(count);
            let daemons = Daemons::prepare(&built, parallel)?;
            progress(&format!("connecting {count} pairs by daemons, {parallel} at a time"));
            connect_pairs(&built, &daemons, &wanted, parallel, said)
        }
    };
    progress("taking the laboratory down");
    built.lab.down()?;
    Ok(pairs)
}

fn print(report: &Report, options: &NatOptions) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if options.json {
        serde_json::to_writer_pretty(&mut out, report)?;
        writeln!(out)?;
    } else {
        out.write_all(page::table(report).as_bytes())?;
    }
    if let Some(path) = &options.page
        && report.problems.is_empty()
    {
        fs::write(path, page::page(report))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    for problem in &report.problems {
        progress(&format!("FAILED: {problem}"));
    }
    Ok(())
}
