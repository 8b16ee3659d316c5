//! `meshd wg INTERFACE`: a WireGuard device in user space on our data plane, configured as wireguard-go is.
//!
//! ```text
//!  wg, wg-quick ──> IFNAME.sock ──> [uapi] ──> Controller ──> data plane (only while the interface is up)
//!  ip link set up/down/mtu ──> netlink ──────────┘
//!
//!  in the background:   this process: TUN, socket ──descriptors──> the same program, --foreground, without terminal
//! ```
//! No guard, no routes, no rules: a device, which ends with the program. The program ends when it is told to, when the
//! interface is deleted (with its network namespace, too), and when its socket is removed.

mod controller;
mod mesh;
mod socket;

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mesh_types::limits::TUN_QUEUES_PER_SHARD;
use mesh_types::status::Counter;
use netcfg::tun::{Tun, TunOptions};
use netcfg::watch::{LinkNews, LinkWatch};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

use crate::args::WgArgs;
use crate::config;
use crate::offload::Disabled;
use crate::signals::Signals;
use crate::uapi::Refusals;
use crate::uapi::server::{self, Service};
use controller::{Controller, Look};
pub use mesh::{MeshSocket, serve_mesh};
use socket::{Door, Socket};

/// What wireguard-go gives a device: WireGuard over IPv6 in Ethernet.
const MTU: u32 = 1420;

/// Set for the process that goes on in the background, to whether the socket it is given has a file of ours.
const DETACHED: &str = "MESHD_WG_DETACHED";

/// Where a descriptor is told by whoever starts us.
const TUN_FD: &str = "WG_TUN_FD";
const UAPI_FD: &str = "WG_UAPI_FD";
const WITH_FILE: &str = "with-file";
const WITHOUT_FILE: &str = "without-file";

/// How often the interface is looked at, whatever netlink says: a device moved into another network namespace
/// tells of itself there.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// After news: a busy router's come by thousands, and one look is for all of them. The kernel keeps them meanwhile.
const NEWS_PAUSE: Duration = Duration::from_millis(2);

/// After a look at the ways to all peers, of which each costs some microseconds: so many times as long as it took, and not
/// longer than that. Routes that change without end cost a twentieth of a core, or what one look in that time does.
const ROUTES_PAUSE: u32 = 20;
const ROUTES_PAUSE_MAX: Duration = Duration::from_millis(100);

/// `meshd wg`.
pub fn run(args: &WgArgs) -> anyhow::Result<()> {
    let dir = config::uapi_dir(&args.uapi)?.context("--uapi-dir may not be empty here")?;
    let tun = match descriptor(args.tun_fd(), TUN_FD) {
        Some(number) => {
            // The one of our own start has what its operator may have given it meanwhile.
            let mtu = std::env::var_os(DETACHED).is_none().then_some(MTU);
            let options = TunOptions { mtu, ..TunOptions::transient("") };
            Tun::inherit(number, &disabled(args).tun(options))?
        }
        None => Tun::open(&disabled(args).tun(TunOptions {
            mtu: Some(MTU),
            multi_queue: !args.disable_multi_queue,
            ..TunOptions::transient(&args.interface)
        }))?,
    };
    if args.foreground {
        return foreground(args, &dir, tun);
    }
    let (door, socket) = listen(args, &dir, tun.name())?;
    detach(args, &tun, door, &socket)
        .inspect_err(|_| socket.remove())
        .context("go on in the background")
}

/// Serves the device until it ends.
fn foreground(args: &WgArgs, dir: &Path, tun: Tun) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the reactor")?;
    // Before there is a socket: whoever sees it may tell us to end, and is to find it gone then.
    let signals = runtime.block_on(async { Signals::catch() })?;
    if std::env::var_os(DETACHED).is_some() {
        // Fails where we lead a session already, which is what we want.
        let _ = rustix::process::setsid();
    }
    wg_engine::forbid_core_dumps().context("cannot switch core dumps off")?;
    let queues = queues(args, &tun);
    let name = tun.name().to_owned();
    let tuns = tun.spread(queues, TUN_QUEUES_PER_SHARD)?;
    let (door, socket) = listen(args, dir, &name)?;
    let served = runtime.block_on(serve(tuns, args, door, &socket, signals));
    socket.remove();
    // A request to a data plane that hangs must not hold up the end.
    runtime.shutdown_background();
    served
}

/// A descriptor we were given. The command line is that of our first start, which has opened what it did not get.
fn descriptor(told: Option<i32>, name: &str) -> Option<i32> {
    if std::env::var_os(DETACHED).is_none() {
        return told;
    }
    std::env::var(name).ok()?.parse().ok()
}

/// What the device is configured by: what was passed on, or a new socket.
fn listen(args: &WgArgs, dir: &Path, device: &str) -> anyhow::Result<(Door, Socket)> {
    let uapi_fd = descriptor(args.uapi_fd(), UAPI_FD);
    let door = match uapi_fd {
        Some(number) => Door::inherit(number)?,
        None => Door::Listener(server::listen(dir, device)?),
    };
    let detached = std::env::var_os(DETACHED);
    let is_ours = uapi_fd.is_none() || detached.is_some_and(|it| it == WITH_FILE);
    let socket = door.file(server::path(dir, device), is_ours);
    Ok((door, socket))
}

fn disabled(args: &WgArgs) -> Disabled {
    Disabled::from(&*args.offloads.disable_offload)
}

fn wanted_shards(args: &WgArgs) -> usize {
    if args.disable_multi_queue { 1 } else { config::shards(args.shards) }
}

/// As many as shards are wanted; a device that somebody else made with a single queue has no more.
fn queues(args: &WgArgs, tun: &Tun) -> usize {
    let wanted = wanted_shards(args);
    if wanted <= 1 || tun.is_multi_queue() {
        return wanted;
    }
    if args.shards.shards.is_some() {
        tracing::warn!(
            device = tun.name(),
            "one shard only: whoever made the device gave it a single queue (ip tuntap add ... multi_queue)"
        );
    }
    1
}

/// Starts this program once more with what is open already, and waits for its first answer: whoever started us finds a
/// device that can be configured when we end.
fn detach(args: &WgArgs, tun: &Tun, door: Door, socket: &Socket) -> anyhow::Result<()> {
    let mut argv = std::env::args_os();
    let name = argv.next().unwrap_or_else(|| OsString::from("meshd"));
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.arg0(name).args(argv).current_dir("/").stdin(Stdio::null());
    let detached = if socket.had_file() { WITH_FILE } else { WITHOUT_FILE };
    command.env("WG_PROCESS_FOREGROUND", "1").env(DETACHED, detached);
    for (name, fd) in [(TUN_FD, tun.as_fd()), (UAPI_FD, door.as_fd())] {
        command.env(name, keep_open(fd)?.to_string());
    }
    match &args.log_file {
        Some(path) => command.stdout(Stdio::null()).stderr(log_file(path)?),
        None if args.filter().is_none_or(|filter| filter == "off") => {
            command.stdout(Stdio::null()).stderr(Stdio::null())
        }
        None => &mut command,
    };
    let mut child = command.spawn().context("start this program again")?;
    // With ours open, a question to one that has ended would wait for ever.
    drop(door);
    if !socket.had_file() {
        return Ok(());
    }
    server::wait_for_answer(socket.path()).or_else(|error| {
        let ended = child.try_wait().ok().flatten();
        let ended = ended.map_or_else(|| error.to_string(), |status| status.to_string());
        let _ = child.kill();
        bail!("it does not serve its socket ({ended}): start it with --foreground to see why")
    })
}

fn log_file(path: &Path) -> anyhow::Result<std::fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    options.open(path).with_context(|| format!("open the log file {}", path.display()))
}

/// Lets whom we start have the descriptor.
fn keep_open(fd: BorrowedFd<'_>) -> anyhow::Result<i32> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).context("pass a descriptor on")?;
    Ok(fd.as_raw_fd())
}

async fn serve(
    tuns: Vec<Tun>,
    args: &WgArgs,
    door: Door,
    socket: &Socket,
    signals: Signals,
) -> anyhow::Result<()> {
    let (version, shards) = (env!("CARGO_PKG_VERSION"), tuns.len());
    tracing::info!(version, device = tuns.first().map(Tun::name), shards, "device starts");
    let (news_in, news) = mpsc::channel(1);
    let (routes_in, routes) = mpsc::channel(1);
    watch_links(news_in.clone(), routes_in)?;
    let controller = Arc::new(Mutex::new(Controller::new(
        tuns,
        config::busy_poll(args.shards),
        disabled(args),
        news_in,
    )));
    let refusals = Arc::new(Refusals::default());
    let service = Service::new(Configured(Arc::clone(&controller)), Arc::clone(&refusals));
    let configured = tokio::spawn(door.serve(service));
    tokio::spawn(follow_routes(routes, Arc::clone(&controller)));
    tokio::select! {
        () = signals.wait() => {}
        () = deleted(news, &controller) => tracing::info!("the interface was deleted"),
        () = socket.removed() => tracing::info!("the configuration socket was removed"),
        ended = configured => {
            ended.context("serve the configuration socket")??;
            tracing::info!("whoever configured the device has closed the connection");
        }
    }
    controller.lock().unwrap_or_else(PoisonError::into_inner).stop();
    tracing::info!(refused_requests = counted(refusals.counters()), "the device ends");
    Ok(())
}

/// Tells of changes to links, and to ways out, from a thread that lives as long as the process; a full channel means that
/// a look is due anyway.
fn watch_links(links: mpsc::Sender<()>, ways: mpsc::Sender<()>) -> anyhow::Result<()> {
    let watch = LinkWatch::open().context("watch the links")?;
    let next = move || -> std::io::Result<LinkNews> {
        match poll(&mut [PollFd::new(&watch, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => watch.drain(),
            Err(errno) => Err(errno.into()),
        }
    };
    let watching = move || {
        while !links.is_closed() {
            let news = next().unwrap_or_else(|error| {
                tracing::warn!(%error, "watching links");
                std::thread::sleep(LOOK_INTERVAL);
                LinkNews { links: true, ways: true }
            });
            for (changed, tell) in [(news.links, &links), (news.ways, &ways)] {
                if changed {
                    let _ = tell.try_send(());
                }
            }
            std::thread::sleep(NEWS_PAUSE);
        }
    };
    std::thread::Builder::new()
        .name("link-watch".into())
        .spawn(watching)
        .context("start the link watch")?;
    Ok(())
}

/// Follows the interface until it is no more.
async fn deleted(mut news: mpsc::Receiver<()>, controller: &Mutex<Controller>) {
    loop {
        let look = controller.lock().unwrap_or_else(PoisonError::into_inner).look();
        if look == Look::Gone {
            return;
        }
        tokio::select! {
            _ = news.recv() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}

/// Has sources chosen anew where routes lead elsewhere.
async fn follow_routes(mut news: mpsc::Receiver<()>, controller: Arc<Mutex<Controller>>) {
    while news.recv().await.is_some() {
        let began = Instant::now();
        controller.lock().unwrap_or_else(PoisonError::into_inner).follow_routes();
        tokio::time::sleep(ROUTES_PAUSE_MAX.min(began.elapsed() * ROUTES_PAUSE)).await;
    }
}

/// What has happened, by reason, as a log tells it.
fn counted(counters: Vec<Counter>) -> String {
    let happened = counters.into_iter().filter(|it| it.count > 0);
    happened.map(|it| format!("{}={}", it.reason, it.count)).collect::<Vec<_>>().join(" ")
}

/// The controller behind the socket.
struct Configured(Arc<Mutex<Controller>>);

impl server::Handler for Configured {
    fn get(&self) -> Result<zeroize::Zeroizing<String>, crate::uapi::Refusal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get()
    }

    fn set(&self, lines: Vec<crate::uapi::line::Line>) -> Result<(), crate::uapi::Refusal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).set(&lines)
    }

    fn is_writable(&self) -> bool {
        true
    }
}
