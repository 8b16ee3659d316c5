//! Traffic: iperf3 for throughput, ping, and request/response of our own.
//!
//! iperf3 because everybody knows it and can repeat a figure with it by hand, and because nothing of ours is then in
//! what is compared. It has no request/response test, so that one is here.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::parsed::{self, Pinged, Received};
use crate::lab::run_in_netns;

/// How long a client tries to reach a server that has just been started.
const PATIENCE: Duration = Duration::from_secs(5);

/// Beyond the time of a measurement, until it counts as stuck.
const GRACE: Duration = Duration::from_secs(20);

/// Between pings: a link that rests in between.
const PING_INTERVAL: &str = "0.05";

/// Bytes of a request and of its response.
const MESSAGE: usize = 64;

/// Where traffic starts or ends.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) netns: PathBuf,
    pub(super) v4: IpAddr,
    pub(super) v6: Option<IpAddr>,
}

/// One way and the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Forward,
    Reverse,
    Both,
}

/// What iperf3 is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stream {
    Tcp {
        streams: u8,
        way: Way,
        congestion: &'static str,
    },
    /// As fast as it goes where there is no bit rate.
    Udp {
        bytes: u32,
        bitrate: &'static str,
    },
}

/// A process that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command inside a network namespace.
pub(super) fn inside(netns: &Path, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg("--").arg(program);
    command
}

/// A socket goes on pacing when bbr, which paces, is taken off it again: where bbr is the system's default, no measurement
/// of another congestion control would be one. Reno is always allowed, and does not pace.
pub(super) fn begin_unpaced(netns: &Path) -> Result<()> {
    let mut command = inside(netns, "sysctl");
    command.args(["-qw", "net.ipv4.tcp_congestion_control=reno"]);
    let status = command.status().context("cannot start sysctl by nsenter")?;
    ensure!(status.success(), "cannot set the congestion control of {}", netns.display());
    Ok(())
}

/// Runs iperf3 between two places for so long.
pub(super) fn iperf3(
    [from, to]: [&Place; 2],
    address: IpAddr,
    stream: Stream,
    time: Duration,
) -> Result<Received> {
    let mut server = inside(&to.netns, "iperf3");
    server.args(["--server", "--one-off"]).stdin(Stdio::null());
    server.stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Running(server.spawn().context("cannot start iperf3 by nsenter")?);
    let mut client = inside(&from.netns, "iperf3");
    client.args(["--json", "--client"]).arg(address.to_string());
    client.args(["--time", &time.as_secs().to_string()]);
    match stream {
        Stream::Tcp { streams, way, congestion } => {
            client.args(["--parallel", &streams.to_string(), "--congestion", congestion]);
            match way {
                Way::Forward => {}
                Way::Reverse => drop(client.arg("--reverse")),
                Way::Both => drop(client.arg("--bidir")),
            }
        }
        Stream::Udp { bytes, bitrate } => {
            client.args(["--udp", "--bitrate", bitrate, "--length", &bytes.to_string()]);
        }
    }
    let end = Instant::now() + PATIENCE;
    loop {
        let text = output(&mut client, time + GRACE)?;
        match parsed::iperf3(&text) {
            Err(error) if Instant::now() < end && error.to_string().contains("refused") => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// The average round trip, and how many did not come back.
pub(super) fn ping(from: &Place, address: IpAddr, time: Duration) -> Result<Pinged> {
    let mut command = inside(&from.netns, "ping");
    command.args(["-q", "-i", PING_INTERVAL, "-w", &time.as_secs().to_string()]);
    command.arg(address.to_string());
    parsed::ping(&output(&mut command, time + GRACE)?)
}

/// Whether an address answers within `patience`.
pub(super) fn wait_for_answer(from: &Place, address: IpAddr, patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        let mut command = inside(&from.netns, "ping");
        command.args(["-q", "-c", "1", "-W", "1"]).arg(address.to_string());
        let text = output(&mut command, GRACE)?;
        match parsed::ping(&text) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("{address} does not answer")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// What a program printed; it is ended when it takes too long.
fn output(command: &mut Command, longest: Duration) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = Running(command.spawn().context("cannot start nsenter")?);
    let mut stdout = child.0.stdout.take().context("no stdout")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let end = Instant::now() + longest;
    while child.0.try_wait()?.is_none() {
        if Instant::now() > end {
            let words = command.get_args().skip_while(|word| *word != "--").skip(1);
            let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
            bail!("`{}` took longer than {} s", words.join(" "), longest.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(reader.join().map_err(|_| anyhow!("a thread panicked"))??)
}

/// One connection with one request of 64 bytes under way at a time; the times of all.
pub(super) fn request_response(
    [from, to]: [&Place; 2],
    address: IpAddr,
    time: Duration,
) -> Result<Vec<Duration>> {
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        let server = scope.spawn(move || run_in_netns(&to.netns, || serve(address, &tell)));
        let client = run_in_netns(&from.netns, move || {
            ask(told.recv().context("the server did not start")?, time)
        });
        server.join().map_err(|_| anyhow!("a thread panicked"))??;
        client
    })
}

fn serve(address: IpAddr, tell: &mpsc::Sender<SocketAddr>) -> Result<()> {
    let listener = TcpListener::bind((address, 0))?;
    let _ = tell.send(listener.local_addr()?); // the asker may be gone
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error).context("nobody connected"),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GRACE))?;
    let mut message = [0; MESSAGE];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message)?;
    }
    Ok(())
}

fn ask(server: SocketAddr, time: Duration) -> Result<Vec<Duration>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GRACE))?;
    let mut message = [0x5a; MESSAGE];
    let mut times = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < time {
        let asked = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        times.push(asked.elapsed());
    }
    ensure!(!times.is_empty(), "no request was answered");
    Ok(times)
}
