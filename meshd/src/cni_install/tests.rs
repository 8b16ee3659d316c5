use std::fs;

use super::*;

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let node = Self { dir: tempfile::tempdir().expect("scratch") };
        fs::write(node.path("image-plugin"), b"\x7fELF the program").expect("program");
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn wanted(&self, others: Others) -> Wanted {
        Wanted {
            program: Some(self.path("image-plugin")),
            nft: None,
            bin_dir: self.path("bin"),
            conf_dir: self.path("net.d"),
            conf_name: "10-meshd.conflist".into(),
            capabilities: vec![Capability::PortMappings],
            state_dir: "/var/lib/meshd".into(),
            others,
        }
    }

    fn other(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path("net.d")).expect("directory");
        fs::write(self.path("net.d").join(name), text).expect("other");
    }

    fn confs(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path("net.d"))
            .expect("directory")
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn choice(&self) -> Choice {
        choice(&self.path("net.d"), "10-meshd.conflist").expect("readable")
    }
}

const FLANNEL: &str = r#"{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel"}]}"#;

#[test]
fn a_second_install_changes_nothing() {
    let node = Node::new();
    let wanted = node.wanted(Others::Leave);
    assert_eq!(install(&wanted).expect("installed").made.len(), 2);
    assert_eq!(install(&wanted).expect("again"), Done::default());
    assert_eq!(node.choice(), Choice::Ours);
    assert_eq!(node.confs(), ["10-meshd.conflist"]);
}

#[test]
fn what_is_truncated_or_not_executable_is_repaired() {
    use std::os::unix::fs::PermissionsExt as _;
    let node = Node::new();
    let wanted = node.wanted(Others::Leave);
    install(&wanted).expect("installed");
    let (program, conf) = (node.path("bin/meshd-cni"), node.path("net.d/10-meshd.conflist"));
    let (whole, text) = (fs::read(&program).expect("there"), fs::read(&conf).expect("there"));
    fs::write(&program, &whole[..4]).expect("truncated");
    fs::write(&conf, b"").expect("truncated");
    assert!(matches!(node.choice(), Choice::Other(_)), "a runtime cannot use an empty file");
    assert_eq!(install(&wanted).expect("repaired").made.len(), 2);
    assert_eq!(
        (fs::read(&program).expect("there"), fs::read(&conf).expect("there")),
        (whole, text)
    );
    fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).expect("mode");
    assert_eq!(install(&wanted).expect("repaired").made.len(), 1);
    assert_eq!(fs::metadata(&program).expect("there").permissions().mode() & 0o777, 0o755);
}

#[test]
fn without_the_program_no_configuration_appears() {
    let node = Node::new();
    fs::remove_file(node.path("image-plugin")).expect("removed");
    let error = install(&node.wanted(Others::Leave)).expect_err("no program");
    assert!(format!("{error:#}").contains("image-plugin"), "{error:#}");
    assert!(!node.path("net.d").exists());
}

#[test]
fn the_winner_is_the_first_name_a_runtime_reads() {
    let node = Node::new();
    node.other("05-other.conflist.bak", FLANNEL);
    node.other("20-other.conflist", FLANNEL);
    install(&node.wanted(Others::Leave)).expect("installed");
    assert_eq!(node.choice(), Choice::Ours);
    node.other("05-other.conf", r#"{"name":"lo","type":"loopback"}"#);
    let Choice::Other(winner) = node.choice() else { panic!("somebody else wins") };
    assert_eq!(winner.file, "05-other.conf");
    assert_eq!(winner.describe(), r#"network "lo", plugin "loopback""#);
    node.other("00-broken.json", "{");
    let Choice::Other(winner) = node.choice() else { panic!("a broken file stops containerd") };
    assert_eq!(winner.file, "00-broken.json");
}

#[test]
fn a_strict_install_names_the_other_and_installs_nothing() {
    let node = Node::new();
    node.other("10-flannel.conflist", FLANNEL);
    let error = format!("{:#}", install(&node.wanted(Others::Refuse)).expect_err("refused"));
    assert!(error.contains("10-flannel.conflist") && error.contains("flannel"), "{error}");
    assert_eq!(node.confs(), ["10-flannel.conflist"]);
    assert!(!node.path("bin/meshd-cni").exists());
}

#[test]
fn others_are_renamed_only_when_told_and_come_back_at_the_end() {
    let node = Node::new();
    node.other("05-flannel.conflist", FLANNEL);
    install(&node.wanted(Others::Leave)).expect("installed");
    assert_eq!(node.confs(), ["05-flannel.conflist", "10-meshd.conflist"]);
    install(&node.wanted(Others::Disable)).expect("installed");
    assert_eq!(node.confs(), ["05-flannel.conflist.meshd-disabled", "10-meshd.conflist"]);
    assert_eq!(node.choice(), Choice::Ours);
    uninstall(&node.wanted(Others::Leave)).expect("uninstalled");
    assert_eq!(node.confs(), ["05-flannel.conflist"]);
    assert!(!node.path("bin/meshd-cni").exists());
    assert_eq!(uninstall(&node.wanted(Others::Leave)).expect("again"), Done::default());
}

#[test]
fn our_file_under_an_earlier_name_goes() {
    let node = Node::new();
    let earlier = Wanted {
        conf_name: "05-meshd.conflist".into(),
        capabilities: vec![Capability::Bandwidth],
        ..node.wanted(Others::Leave)
    };
    install(&earlier).expect("installed");
    install(&node.wanted(Others::Refuse)).expect("ours is no other");
    assert_eq!(node.confs(), ["10-meshd.conflist"]);
}

#[test]
fn what_an_operator_wrote_around_our_plugin_stays() {
    let node = Node::new();
    let own = r#"{"name":"meshd","cniVersion":"1.0.0","plugins":[{"type":"meshd-cni"},{"type":"tuning"}]}"#;
    node.other("05-own.conflist", own);
    for others in [Others::Leave, Others::Refuse, Others::Disable] {
        install(&node.wanted(others)).expect("installed");
        assert_eq!(node.confs(), ["05-own.conflist", "10-meshd.conflist"]);
    }
    assert_eq!(node.choice(), Choice::Ours);
}

#[test]
fn an_uninstall_takes_what_we_wrote_and_names_what_an_operator_wrote_around_our_plugin() {
    let node = Node::new();
    let own = r#"{"name":"meshd","cniVersion":"1.0.0","plugins":[{"type":"meshd-cni"},{"type":"tuning"}]}"#;
    node.other("05-own.conflist", own);
    install(&node.wanted(Others::Leave)).expect("installed");
    // Of an earlier state folder and name, and one that was cut short.
    node.other("20-earlier.conflist", &render(&[Capability::Bandwidth], Path::new("/srv/meshd")));
    node.other("10-meshd.conflist", "{\"name\": \"mes");
    assert_eq!(installed(&node.wanted(Others::Leave)).expect("readable").len(), 3);
    let done = uninstall(&node.wanted(Others::Leave)).expect("uninstalled");
    assert_eq!(node.confs(), ["05-own.conflist"]);
    assert!(done.kept.len() == 1 && done.kept[0].contains("05-own.conflist"), "{done:?}");
    assert!(installed(&node.wanted(Others::Leave)).expect("readable").is_empty());
    // Under our very name, where nobody has installed ours: the chart can leave the configuration to others.
    fs::rename(node.path("net.d/05-own.conflist"), node.path("net.d/10-meshd.conflist"))
        .expect("renamed");
    uninstall(&node.wanted(Others::Leave)).expect("again");
    assert_eq!(node.confs(), ["10-meshd.conflist"]);
}

#[test]
fn a_directory_is_no_configuration_whatever_its_name() {
    let node = Node::new();
    fs::create_dir_all(node.path("net.d/00-multus.conf")).expect("directory");
    install(&node.wanted(Others::Refuse)).expect("nobody else is there");
    assert_eq!(node.choice(), Choice::Ours);
}

#[test]
fn names_that_runtimes_would_not_read_are_refused() {
    let node = Node::new();
    for name in ["meshd", "a/b.conflist", "10-meshd.conf", ".conflist", ""] {
        let wanted = Wanted { conf_name: name.into(), ..node.wanted(Others::Leave) };
        let error = format!("{:#}", install(&wanted).expect_err(name));
        assert!(error.contains(".conflist"), "{error}");
    }
}

#[test]
fn the_configuration_is_the_one_of_the_guide() {
    let all = [Capability::Bandwidth, Capability::PortMappings, Capability::Bandwidth];
    let ours: serde_json::Value =
        serde_json::from_str(&render(&all, Path::new("/var/lib/meshd"))).expect("JSON");
    let guide = include_str!("../../../docs/guide/10-meshd.conflist");
    assert_eq!(ours, serde_json::from_str::<serde_json::Value>(guide).expect("JSON"));
    let moved = render(&[], Path::new("/srv/meshd"));
    assert!(moved.contains("/srv/meshd/node.json") && moved.contains("/srv/meshd/ipam"), "{moved}");
}
