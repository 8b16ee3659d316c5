//! The plugin under containerd: a container gets its network from us and leaves nothing when it ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Node, PLUGIN, can_run};
use netcfg::netns::{self, Netns};

/// Starting a daemon and a container takes a second or two; a loaded CI machine is slower.
const PATIENCE: Duration = Duration::from_secs(60);

/// Folder of containerd, its shim, ctr and runc, built on first use.
fn tools() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testbed/scripts/containerd.sh");
    let output = Command::new(&script).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// A containerd of its own on the node; killed when dropped.
struct Containerd<'a> {
    node: &'a Node,
    tools: PathBuf,
    daemon: Child,
}

impl<'a> Containerd<'a> {
    fn start(node: &'a Node) -> Self {
        let tools = tools();
        let dir = node.dir.path();
        let text = format!(
            "version = 3\nroot = '{0}/root'\nstate = '{0}/state'\n\
             disabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', \
             'io.containerd.grpc.v1.cri', 'io.containerd.nri.v1.nri', \
             'io.containerd.internal.v1.opt', 'io.containerd.tracing.processor.v1.otlp']\n\
             [grpc]\naddress = '{0}/containerd.sock'\n[ttrpc]\naddress = '{0}/ttrpc.sock'\n",
            dir.display()
        );
        fs::write(dir.join("containerd.toml"), text).unwrap();
        let daemon = Self::spawn(node, &tools);
        let this = Self { node, tools, daemon };
        this.wait_ready();
        this
    }

    fn spawn(node: &Node, tools: &Path) -> Child {
        let dir = node.dir.path();
        let log = File::options().create(true).append(true).open(dir.join("containerd.log"));
        Self::command(node, tools, "containerd")
            .args(["--config".into(), dir.join("containerd.toml")])
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap()
    }

    fn wait_ready(&self) {
        self.until("containerd answers", || {
            self.ctr(&["version"]).output().unwrap().status.success()
        });
    }

    /// The daemon dies without a word and is started again; its containers go on.
    fn restart(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        self.daemon = Self::spawn(self.node, &self.tools);
        self.wait_ready();
    }

    fn command(node: &Node, tools: &Path, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .arg(format!("--net={}", node.netns().display()))
            .arg(tools.join(program))
            .env("PATH", format!("{}:{path}", tools.display()));
        command
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Self::command(self.node, &self.tools, "ctr");
        command.arg("--address").arg(self.node.dir.path().join("containerd.sock")).args(arguments);
        command
    }

    /// ctr calls the plugin itself, when a container starts and when one is killed, from the standard folders: they
    /// are ours in a mount namespace of its own.
    fn ctr_with_cni(&self, id: &str, arguments: &str) -> Client {
        let dir = self.node.dir.path();
        let script = format!(
            "mount -t tmpfs tmpfs /etc && mount -t tmpfs tmpfs /opt && \
             mkdir -p /etc/cni/net.d /opt/cni/bin && \
             cp {0}/10-meshd.conflist /etc/cni/net.d/ && cp {PLUGIN} /opt/cni/bin/ && \
             exec {1} --address {0}/containerd.sock {arguments}",
            dir.display(),
            self.tools.join("ctr").display(),
        );
        let log = dir.join(format!("ctr-{id}.log"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.node.netns().display()))
            .args(["unshare", "--mount", "sh", "-c", &script])
            .env("PATH", format!("{}:{path}", self.tools.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Client(child)
    }

    fn run(&self, id: &str, rootfs: &Path) -> Client {
        let root = rootfs.display();
        self.ctr_with_cni(id, &format!("run --rm --cni --rootfs {root} {id} /busybox sleep 600"))
    }

    fn task_ids(&self) -> Vec<String> {
        let output = self.ctr(&["tasks", "list", "--quiet"]).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        text.unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn pid_of(&self, id: &str) -> Option<u32> {
        let output = self.ctr(&["tasks", "list"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut words = text.lines().find(|line| line.starts_with(id))?.split_whitespace();
        words.nth(1)?.parse().ok()
    }

    /// Waits for something that happens elsewhere; shows the logs when it does not.
    fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            if Instant::now() > deadline {
                let logs: String = fs::read_dir(self.node.dir.path())
                    .unwrap()
                    .map(|entry| entry.unwrap().path())
                    .filter(|path| path.extension().is_some_and(|e| e == "log"))
                    .map(|path| fs::read_to_string(path).unwrap_or_default())
                    .collect();
                panic!("not within {PATIENCE:?}: {what}\n{logs}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A client process; killed when dropped, which is after a failed test only.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        // Containers outlive their daemon; after a failed test some may still run.
        for id in self.task_ids() {
            let _ = self.ctr(&["tasks", "delete", "--force", &id]).output();
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A root folder with one program and the libraries it is linked with.
fn rootfs(dir: &Path) -> PathBuf {
    let root = dir.join("rootfs");
    for folder in ["proc", "sys", "dev", "tmp", "etc"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let busybox = ["/usr/bin/busybox", "/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("busybox is needed: apt-get install busybox");
    fs::copy(busybox, root.join("busybox")).unwrap();
    fs::set_permissions(root.join("busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let libraries = Command::new("ldd").arg(busybox).output().unwrap();
    for word in String::from_utf8_lossy(&libraries.stdout).split_whitespace() {
        if word.starts_with('/') {
            let target = root.join(word.trim_start_matches('/'));
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(word, target).unwrap();
        }
    }
    root
}

/// A node whose containerd uses our plugin.
fn node_with_plugin() -> Node {
    let node = Node::new(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    let mut plugin = node.config();
    let fields = plugin.as_object_mut().unwrap();
    fields.remove("cniVersion");
    fields.remove("name");
    let list = serde_json::json!({"cniVersion": "1.1.0", "name": "mesh", "plugins": [plugin]});
    fs::write(node.dir.path().join("10-meshd.conflist"), list.to_string()).unwrap();
    node
}

fn inside(pid: u32) -> Netns {
    Netns::of_pid(pid).unwrap()
}

/// Connects from one container to an address of another; returns the source it saw.
fn connect(from: u32, to: u32, target: &str) -> String {
    let target = SocketAddr::new(target.parse().unwrap(), 0);
    let listener = netns::run_in(inside(to), || Ok(TcpListener::bind(target)?)).unwrap();
    let at = listener.local_addr().unwrap();
    netns::run_in(inside(from), || Ok(TcpStream::connect_timeout(&at, Duration::from_secs(5))?))
        .unwrap();
    listener.accept().unwrap().1.ip().to_string()
}

#[test]
fn containers_keep_their_network_while_containerd_is_killed_and_started_again() {
    if !can_run() {
        return;
    }
    let node = node_with_plugin();
    let root = rootfs(node.dir.path());
    let mut containerd = Containerd::start(&node);
    let ids = [format!("cnit{}-c", std::process::id()), format!("cnit{}-d", std::process::id())];
    let mut pids = Vec::new();
    for id in &ids {
        let words =
            format!("run --detach --cni --rootfs {} {id} /busybox sleep 600", root.display());
        let mut run = containerd.ctr_with_cni(id, &words);
        assert!(run.0.wait().unwrap().success(), "ctr run {id}");
        containerd.restart();
        pids.push(containerd.pid_of(id).unwrap());
    }
    for (target, source) in [("10.244.3.2", "10.244.3.3"), ("fd00:10:244:3::2", "fd00:10:244:3::3")]
    {
        assert_eq!(connect(pids[1], pids[0], target), source);
    }
    for id in &ids {
        let mut kill = containerd.ctr_with_cni(id, &format!("tasks kill -s KILL {id}"));
        assert!(kill.0.wait().unwrap().success(), "ctr tasks kill {id}");
    }
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn containers_of_containerd_reach_each_other_and_leave_nothing() {
    if !can_run() {
        return;
    }
    let node = node_with_plugin();
    let root = rootfs(node.dir.path());
    let containerd = Containerd::start(&node);

    let ids = [format!("cnit{}-a", std::process::id()), format!("cnit{}-b", std::process::id())];
    let mut clients: Vec<Client> = Vec::new();
    let mut pids = Vec::new();
    for (i, id) in ids.iter().enumerate() {
        clients.push(containerd.run(id, &root));
        containerd.until("the container runs with its network", || {
            node.records().len() == i + 1 && containerd.pid_of(id).is_some()
        });
        pids.push(containerd.pid_of(id).unwrap());
    }
    containerd.until("the second container has its route", || {
        netns::run_in(inside(pids[1]), || Ok(netcfg::route::list(254)?.len()))
            .is_ok_and(|routes| routes >= 3)
    });
    for target in ["10.244.3.2", "fd00:10:244:3::2"] {
        let seen = connect(pids[1], pids[0], target);
        assert!(["10.244.3.3", "fd00:10:244:3::3"].contains(&seen.as_str()), "{seen}");
    }
    for (id, client) in ids.iter().zip(&mut clients) {
        let mut kill = containerd.ctr_with_cni(id, &format!("tasks kill -s KILL {id}"));
        assert!(kill.0.wait().unwrap().success(), "ctr tasks kill {id}");
        containerd.until("ctr ends", || client.0.try_wait().unwrap().is_some());
    }
    assert_eq!(node.leftovers(), Vec::<String>::new());
}
