//! What runtimes rely on because every plugin made with the CNI project's own library does it: which variables each verb
//! asks for, what is refused with which code, and that nothing but JSON ever stands on stdout.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "common/pretend.rs"]
mod pretend;

use std::io::{self, Read};

use pretend::Bench;
use serde_json::{Value, json};

const VARIABLES: [&str; 5] = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"];

/// Exit status, code (0 without one), message and details.
fn outcome(answer: &(u8, String)) -> (u8, u64, String, String) {
    let (status, stdout) = answer;
    if stdout.is_empty() {
        return (*status, 0, String::new(), String::new());
    }
    let json: Value = serde_json::from_str(stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"));
    let text = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
    (*status, json["code"].as_u64().unwrap_or(0), text("msg"), text("details"))
}

fn code(answer: &(u8, String)) -> u64 {
    let (status, code, ..) = outcome(answer);
    assert_eq!(status == 0, code == 0, "{answer:?}");
    code
}

/// A configuration each verb is content with once the pod is there.
fn config_for(bench: &Bench, verb: &str) -> Value {
    let mut config = bench.config("1.1.0");
    if verb == "CHECK" {
        let (_, added) = bench.call("ADD", &config.to_string());
        config["prevResult"] = serde_json::from_str(&added).unwrap();
    }
    config
}

#[test]
fn each_verb_asks_for_the_variables_of_the_reference_and_for_no_others() {
    let required: [(&str, &[&str]); 6] = [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
        ("GC", &["CNI_PATH"]),
        ("STATUS", &["CNI_PATH"]),
        ("VERSION", &[]),
    ];
    for (verb, required) in required {
        for variable in VARIABLES {
            let bench = Bench::new();
            let config = config_for(&bench, verb).to_string();
            let answer = bench.call_with(verb, &config, &[(variable, "")]);
            let (_, code, message, _) = outcome(&answer);
            if required.contains(&variable) {
                assert_eq!(code, 4, "{verb} without {variable}: {answer:?}");
                assert!(message.contains(&format!("[{variable}]")), "{message}");
            } else {
                assert_eq!(code, 0, "{verb} without {variable}: {answer:?}");
            }
        }
    }
}

#[test]
fn all_missing_variables_are_named_at_once_and_first() {
    let bench = Bench::new();
    let none = VARIABLES.map(|name| (name, ""));
    for verb in ["ADD", "CHECK"] {
        let (_, code, message, _) = outcome(&bench.call_with(verb, "not looked at", &none));
        assert_eq!(code, 4);
        assert!(
            message.contains("[CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_PATH]"),
            "{message}"
        );
    }
    let (status, code, message, _) = outcome(&bench.call("", ""));
    assert_eq!((status, code), (1, 4));
    assert!(message.contains("CNI_COMMAND"), "{message}");
    assert_eq!(code_of_verb(&bench, "NOPE"), 4);
}

fn code_of_verb(bench: &Bench, verb: &str) -> u64 {
    code(&bench.call(verb, &bench.config("1.1.0").to_string()))
}

#[test]
fn values_no_runtime_should_send_are_code_4_and_legal_ones_pass() {
    let long = "a".repeat(64);
    let cases = [
        ("CNI_CONTAINERID", "some-%%container-id", 4),
        ("CNI_CONTAINERID", "_leading", 4),
        ("CNI_CONTAINERID", "a/b", 4),
        ("CNI_CONTAINERID", "0A_b.c-d", 0),
        ("CNI_CONTAINERID", &long, 0),
        ("CNI_IFNAME", "1234567890123456", 4),
        ("CNI_IFNAME", ".", 4),
        ("CNI_IFNAME", "..", 4),
        ("CNI_IFNAME", "test/test", 4),
        ("CNI_IFNAME", "test:test", 4),
        ("CNI_IFNAME", "test test", 4),
        ("CNI_IFNAME", "123456789012345", 0),
        ("CNI_IFNAME", "net1.5@x-_", 0),
        ("CNI_ARGS", "some;extra;args", 0),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=web-0;K8S_POD_UID=1-2", 0),
    ];
    for (name, value, expected) in cases {
        let bench = Bench::new();
        let config = bench.config("1.1.0").to_string();
        for verb in ["ADD", "DEL"] {
            let answer = bench.call_with(verb, &config, &[(name, value)]);
            assert_eq!(code(&answer), expected, "{verb} {name}={value}: {answer:?}");
        }
    }
}

#[test]
fn a_version_we_do_not_speak_is_code_1_with_those_we_do() {
    let bench = Bench::new();
    for version in [
        json!("9.8.7"),
        json!("0.1.0"),
        json!("0.2.0"),
        json!("0.3.0"),
        json!("10.0.0"),
        json!(""),
        json!(null),
    ] {
        for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let mut config = bench.config("1.1.0");
            config["cniVersion"] = version.clone();
            let (_, code, message, details) = outcome(&bench.call(verb, &config.to_string()));
            assert_eq!(code, 1, "{verb} {version}");
            assert!(message.contains("is not supported"), "{message}");
            assert!(details.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{details}");
        }
    }
    let mut config = bench.config("1.1.0");
    config.as_object_mut().unwrap().remove("cniVersion");
    let (_, code, message, _) = outcome(&bench.call("ADD", &config.to_string()));
    assert_eq!(code, 1);
    assert!(message.contains("0.1.0"), "{message}");
}

#[test]
fn a_version_that_is_none_cannot_be_compared_with_the_first_that_has_the_verb() {
    let bench = Bench::new();
    for (verb, expected) in [("CHECK", 6), ("GC", 6), ("STATUS", 6), ("ADD", 1), ("DEL", 1)] {
        let config = bench.config("adsfsadf").to_string();
        assert_eq!(code(&bench.call(verb, &config)), expected, "{verb}");
        let bad_name = bench.config("0.4.0").to_string().replace("\"mesh\"", "\"te%%st\"");
        assert_eq!(code(&bench.call(verb, &bad_name)), 7, "{verb}");
    }
}

#[test]
fn verbs_came_with_versions() {
    let bench = Bench::new();
    for (verb, first) in [("CHECK", 1), ("GC", 3), ("STATUS", 3)] {
        for (at, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].into_iter().enumerate() {
            let mut config = config_for(&bench, "CHECK");
            config["cniVersion"] = version.into();
            let answer = bench.call(verb, &config.to_string());
            assert_eq!(code(&answer) == 1, at < first, "{verb} {version}: {answer:?}");
        }
    }
}

#[test]
fn a_stdin_that_cannot_be_read_is_code_5_and_version_never_reads_it() {
    struct Bad;
    impl Read for Bad {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("banana"))
        }
    }
    let bench = Bench::new();
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] {
        let mut stdout = Vec::new();
        let status = bench.raw(verb, &mut Bad, &[], &mut stdout);
        let answer = (status, String::from_utf8(stdout).unwrap());
        assert_eq!(code(&answer), if verb == "VERSION" { 0 } else { 5 }, "{answer:?}");
        assert_eq!(answer.1.contains("banana"), verb != "VERSION");
    }
}

#[test]
fn del_needs_a_name_and_a_version_and_nothing_else_of_a_configuration() {
    for (field, broken) in [
        ("prevResult", json!({"ips": 7})),
        ("prevResult", json!([])),
        ("prevResult", json!({"ips": [{"address": "10.244.3.2/32", "gateway": ""}]})),
        ("nodeFile", json!("relative")),
        ("cni.dev/attachments", json!("none")),
        ("dns", json!(7)),
        ("runtimeConfig", json!({"ips": ["10.244.3.9"]})),
        ("ipam", json!([])),
        ("type", json!(null)),
    ] {
        let bench = Bench::new();
        let config = bench.config("1.1.0");
        assert_eq!(code(&bench.call("ADD", &config.to_string())), 0);
        let mut odd = config;
        odd[field] = broken;
        let answer = bench.call("DEL", &odd.to_string());
        assert_eq!(answer, (0, String::new()), "{field}");
        assert_eq!(bench.records(), Vec::<String>::new(), "{field}");
    }
}

#[test]
fn a_container_that_lives_elsewhere_keeps_its_interface() {
    let bench = Bench::new();
    let config = bench.config("1.1.0").to_string();
    assert_eq!(code(&bench.call("ADD", &config)), 0);
    let moved = [("CNI_NETNS", "/run/netns/another")];
    let (_, code_now, message, _) = outcome(&bench.call_with("ADD", &config, &moved));
    assert_eq!(code_now, 102);
    assert!(message.contains("/run/netns/pod"), "{message}");
    assert_eq!(bench.kernel.pods.borrow().len(), 1);
    // A container that was started again in a new namespace after its old one went.
    bench.kernel.dead.borrow_mut().insert("/run/netns/pod".to_owned());
    let (_, again) = bench.call_with("ADD", &config, &moved);
    assert!(again.contains("10.244.3.2/32"), "{again}");
}

#[test]
fn a_node_that_is_uninstalled_meanwhile_gets_no_pod() {
    let bench = Bench::new();
    *bench.kernel.vanishes.borrow_mut() = Some(bench.dir.path().join("node.json"));
    let answer = bench.call("ADD", &bench.config("1.1.0").to_string());
    let (_, code, message, details) = outcome(&answer);
    assert_eq!(code, 11, "{message}: {details}");
    assert!(message.contains("any more") && details.contains("node.json"), "{message}: {details}");
    assert!(bench.kernel.pods.borrow().is_empty() && bench.records().is_empty());
}

#[test]
fn gc_without_a_list_frees_what_has_no_pod_and_nothing_else() {
    let bench = Bench::new();
    let config = bench.config("1.1.0").to_string();
    for id in ["gone", "alive"] {
        let netns = format!("/run/netns/{id}");
        let pod = [("CNI_CONTAINERID", id), ("CNI_NETNS", netns.as_str())];
        assert_eq!(code(&bench.call_with("ADD", &config, &pod)), 0);
    }
    assert_eq!(bench.call("GC", &config), (0, String::new()));
    assert_eq!(bench.records().len(), 2);
    bench.kernel.dead.borrow_mut().insert("/run/netns/gone".to_owned());
    bench.kernel.links.borrow_mut().retain(|name| {
        let pod = ipam::owner::Owner { container_id: "gone".into(), ifname: "eth0".into() };
        *name != ipam::owner::OwnerHash::new("mesh", &pod).host_ifname()
    });
    assert_eq!(bench.call("GC", &config), (0, String::new()));
    assert_eq!(bench.records().len(), 1);
}

#[test]
fn the_program_alone_says_what_it_is_and_a_bare_call_is_an_error_in_json() {
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_meshd-cni"));
        let output = command.env_clear().args(arguments).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (fine, said) = run(&["--version"]);
    assert!(fine);
    assert!(said.starts_with(concat!("meshd-cni ", env!("CARGO_PKG_VERSION"))), "{said}");
    assert!(said.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{said}");
    let (fine, said) = run(&[]);
    assert!(!fine);
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(json["code"], 4, "{said}");
    assert!(json["msg"].as_str().unwrap().contains("CNI_COMMAND"), "{said}");
}
