//! What the test image runs in pods: a server that says who asked, and clients that ask it.
//!
//! ```text
//! testbed tool serve --port 8080          TCP and UDP: answers with one line, "<host name> <address of the client>"
//! testbed tool ask ADDRESS:PORT [--udp]   prints that line; names are resolved; exit status 1 where nobody answers
//! testbed tool wait                       does nothing until it is told to end: for exec
//! ```

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The longest answer: a host name and an address.
const ANSWER: usize = 512;

/// How long a client of the server may take to close its connection.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Between attempts where nobody answers.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, clap::Args)]
pub struct ToolOptions {
    #[command(subcommand)]
    command: ToolCommand,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum ToolCommand {
    /// Answer every question with our host name and the asker's address
    Serve {
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
    /// Ask a server and print its answer
    Ask {
        /// ADDRESS:PORT or NAME:PORT
        target: String,
        #[arg(long)]
        udp: bool,
        /// Ask this often, one line each
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Milliseconds for one attempt
        #[arg(long, default_value_t = 1000)]
        timeout_ms: u64,
        /// Milliseconds to go on asking where nobody answers
        #[arg(long, default_value_t = 5000)]
        patience_ms: u64,
    },
    /// Do nothing until SIGTERM
    Wait,
}

/// Runs one of the tools.
pub fn run(options: &ToolOptions) -> Result<()> {
    match &options.command {
        ToolCommand::Serve { port } => {
            end_on_signal()?;
            serve(*port)
        }
        ToolCommand::Ask { target, udp, count, timeout_ms, patience_ms } => {
            let patience = Duration::from_millis(*patience_ms);
            for _ in 0..*count {
                let answer = ask(target, *udp, Duration::from_millis(*timeout_ms), patience)?;
                writeln!(std::io::stdout(), "{answer}")?;
            }
            Ok(())
        }
        ToolCommand::Wait => {
            end_on_signal()?;
            loop {
                std::thread::park();
            }
        }
    }
}

/// PID 1 of a container ignores signals it does not handle: without this, every end takes the grace period.
fn end_on_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
        });
        std::process::exit(0);
    });
    Ok(())
}

fn serve(port: u16) -> Result<()> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned();
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
        .with_context(|| format!("cannot bind UDP port {port}"))?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .with_context(|| format!("cannot bind TCP port {port}"))?;
    let own_name = name.clone();
    std::thread::spawn(move || {
        let mut buffer = [0_u8; ANSWER];
        loop {
            if let Ok((_, client)) = socket.recv_from(&mut buffer) {
                // An asker that is gone is no concern of ours.
                let _ = socket.send_to(answer(&own_name, client).as_bytes(), client);
            }
        }
    });
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else {
            std::thread::sleep(PAUSE); // out of files, most likely
            continue;
        };
        let Ok(client) = stream.peer_addr() else { continue };
        let _ = stream.set_read_timeout(Some(CLIENT_TIMEOUT));
        let _ = stream.write_all(answer(&name, client).as_bytes());
        let _ = stream.shutdown(Shutdown::Write);
    }
    Ok(())
}

fn answer(name: &str, client: SocketAddr) -> String {
    format!("{name} {}\n", client.ip().to_canonical())
}

/// Asks until there is an answer or `patience` is over; `timeout` is for one attempt.
pub(crate) fn ask(
    target: &str,
    udp: bool,
    timeout: Duration,
    patience: Duration,
) -> Result<String> {
    let end = Instant::now() + patience;
    loop {
        match ask_once(target, udp, timeout) {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("no answer from {target}")));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn ask_once(target: &str, udp: bool, timeout: Duration) -> Result<String> {
    let mut addresses =
        target.to_socket_addrs().with_context(|| format!("cannot resolve {target}"))?;
    let address = addresses.next().with_context(|| format!("{target} has no address"))?;
    let mut text = Vec::new();
    if udp {
        let any: SocketAddr = if address.is_ipv6() {
            (Ipv6Addr::UNSPECIFIED, 0).into()
        } else {
            (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(address)?;
        socket.set_read_timeout(Some(timeout))?;
        socket.send(b"?")?;
        text.resize(ANSWER, 0);
        let length = socket.recv(&mut text)?;
        text.truncate(length);
    } else {
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.take(ANSWER as u64).read_to_end(&mut text)?;
    }
    if text.is_empty() {
        bail!("{target} closed the connection without an answer");
    }
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn both_protocols_say_who_asked() {
        let port = TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port();
        std::thread::spawn(move || serve(port).unwrap());
        let (timeout, patience) = (Duration::from_secs(5), Duration::from_secs(20));
        for udp in [false, true] {
            for host in ["127.0.0.1", "[::1]"] {
                let answer = ask(&format!("{host}:{port}"), udp, timeout, patience).unwrap();
                let (_, seen) = answer.rsplit_once(' ').unwrap();
                assert_eq!(seen, host.trim_matches(['[', ']']), "{answer}");
            }
        }
    }

    #[test]
    fn nobody_is_an_error_that_names_the_target() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = ask(&format!("127.0.0.1:{port}"), false, PAUSE, PAUSE).unwrap_err();
        assert!(format!("{error:#}").contains(&port.to_string()), "{error:#}");
    }
}
