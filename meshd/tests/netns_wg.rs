//! `meshd wg` with descriptors that whoever starts it has opened, in a network namespace of its own.
#![allow(clippy::expect_used, reason = "helpers of tests fail as tests do")]

#[path = "support/privilege.rs"]
mod privilege;

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use netcfg::netns::{self, Netns};
use privilege::root;
use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, kill_process};

/// Bounds a wait that should be milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// A namespace and a folder of sockets; deleted with the value.
struct Place {
    netns: PathBuf,
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all("/run/netns").expect("a folder");
        let netns = PathBuf::from(format!("/run/netns/wg-{}-{count}", std::process::id()));
        Netns::create(&netns).expect("a namespace");
        Self { netns, dir: tempfile::tempdir().expect("scratch") }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("wg0.sock")
    }

    /// `meshd wg` that is given `fd` to be configured at.
    fn start(&self, fd: impl AsFd) -> Device {
        rustix::io::fcntl_setfd(&fd, FdFlags::empty()).expect("to be passed on");
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.netns.display()))
            .args(["--", env!("CARGO_BIN_EXE_meshd"), "wg", "-f", "--tun-fd=-1", "-v", "info"])
            .arg(format!("--uapi-dir={}", self.dir.path().display()))
            .arg("wg0")
            .env("WG_UAPI_FD", fd.as_fd().as_raw_fd().to_string())
            .env("LOG_LEVEL", "silent")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("meshd starts");
        rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC).expect("ours again");
        Device(child)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = netns::delete(&self.netns);
    }
}

struct Device(Child);

impl Device {
    fn end(&self, signal: Signal) {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process id"), signal).expect("told");
    }

    /// How it ended, and what it said.
    fn ended(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.0.try_wait().expect("a child") {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut said = String::new();
        self.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        (status, said)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks what the device is, and hears all of the answer.
fn ask(stream: &mut UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(b"get=1\n\n").expect("asked");
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"errno=0\n\n");
}

#[test]
fn a_connection_that_was_given_is_served_and_its_end_is_the_end() {
    if !root() {
        return;
    }
    let place = Place::new();
    let (near, mut far) = UnixStream::pair().expect("a pair");
    let device = place.start(&near);
    drop(near);
    ask(&mut far);
    far.write_all(b"nonsense\n").expect("said");
    far.read_exact(&mut [0; 11]).expect("what it says to that");
    ask(&mut far);
    assert!(!place.socket().exists());
    drop(far);
    let (status, said) = device.ended();
    assert!(status.success(), "{said}");
    assert!(said.contains("refused_requests=\"no_line=1\""), "{said}");
}

#[test]
fn without_descriptors_said_to_be_none_it_goes_on_in_the_background() {
    if !root() {
        return;
    }
    let place = Place::new();
    // As boringtun-cli is started by those who pass all its options.
    let started = Command::new("nsenter")
        .arg(format!("--net={}", place.netns.display()))
        .args(["--", env!("CARGO_BIN_EXE_meshd"), "wg", "--tun-fd", "-1", "--uapi-fd", "-1"])
        .arg(format!("--uapi-dir={}", place.dir.path().display()))
        .args(["--", "wg0"])
        .env_remove("LOG_LEVEL")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .expect("meshd starts");
    assert!(started.success(), "{started}");
    let mut configured = UnixStream::connect(place.socket()).expect("it listens");
    ask(&mut configured);
    std::fs::remove_file(place.socket()).expect("removed, which ends it");
    configured.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    assert_eq!(configured.read(&mut [0]).ok(), Some(0), "it is still there");
}

#[test]
fn the_socket_of_another_program_is_left_alone() {
    if !root() {
        return;
    }
    let place = Place::new();
    let elsewhere = place.dir.path().join("control");
    let given = UnixListener::bind(&elsewhere).expect("a socket");
    // Of a device in another namespace, which is called so, too.
    let _another = UnixListener::bind(place.socket()).expect("a socket");
    let device = place.start(&given);
    ask(&mut UnixStream::connect(&elsewhere).expect("it listens"));
    // Nor is its end the end of this one.
    std::fs::rename(place.socket(), place.dir.path().join("aside")).expect("renamed");
    std::fs::rename(place.dir.path().join("aside"), place.socket()).expect("renamed");
    ask(&mut UnixStream::connect(&elsewhere).expect("it listens"));
    device.end(Signal::TERM);
    let (status, said) = device.ended();
    assert!(status.success(), "{said}");
    assert!(place.socket().exists() && elsewhere.exists());
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused_at_once() {
    if !root() {
        return;
    }
    let file = std::fs::File::open(Path::new("/dev/null")).expect("a file");
    let (status, said) = Place::new().start(&file).ended();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("no stream socket") && said.contains("--uapi-fd"), "{said}");
}
