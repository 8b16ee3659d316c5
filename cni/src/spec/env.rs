//! What the runtime says in the environment (CNI SPEC.md 1.1.0, "Parameters").

use std::path::PathBuf;

use ipam::owner::Owner;

use crate::spec::error::{CniError, Code};

/// Longest interface name the kernel takes (`IFNAMSIZ` less its terminating zero).
const IFNAME_BYTES_MAX: usize = 15;

/// Longest container id: runtimes use 64 hex digits; it ends up in records and messages.
const CONTAINER_ID_BYTES_MAX: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

/// A request whose environment is complete and well formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `args` is `CNI_ARGS` as it came.
    Add {
        owner: Owner,
        netns: PathBuf,
        own_netns_allowed: bool,
        args: String,
    },
    Check {
        owner: Owner,
        netns: PathBuf,
    },
    /// The record and the host know all that is to go: a namespace is not needed.
    Del {
        owner: Owner,
    },
    Gc,
    Status,
    Version,
}

/// Reads the request with `get`, which returns `None` for a variable that is not set. Names every missing
/// variable at once.
pub fn parse(get: impl Fn(&str) -> Option<String>) -> Result<Request, CniError> {
    let get = |name: &str| get(name).filter(|value| !value.is_empty());
    let Some(command) = get("CNI_COMMAND") else {
        return Err(missing(&["CNI_COMMAND"]));
    };
    let command = match command.as_str() {
        "ADD" => Command::Add,
        "DEL" => Command::Del,
        "CHECK" => Command::Check,
        "GC" => Command::Gc,
        "STATUS" => Command::Status,
        "VERSION" => Command::Version,
        other => {
            let shown: String = other.chars().take(32).collect();
            return Err(invalid(format!(
                "unknown CNI_COMMAND {shown:?}: ADD, DEL, CHECK, GC, STATUS or VERSION"
            )));
        }
    };
    let absent: Vec<&str> =
        required(command).iter().copied().filter(|name| get(name).is_none()).collect();
    if !absent.is_empty() {
        return Err(missing(&absent));
    }
    let value = |name: &str| get(name).unwrap_or_default();
    let owner = || -> Result<Owner, CniError> {
        let owner = Owner { container_id: value("CNI_CONTAINERID"), ifname: value("CNI_IFNAME") };
        check_container_id(&owner.container_id)?;
        check_ifname(&owner.ifname)?;
        Ok(owner)
    };
    let netns = PathBuf::from(value("CNI_NETNS"));
    let own_netns_allowed =
        matches!(value("CNI_NETNS_OVERRIDE").to_ascii_uppercase().as_str(), "1" | "TRUE");
    Ok(match command {
        Command::Add => {
            Request::Add { owner: owner()?, netns, own_netns_allowed, args: value("CNI_ARGS") }
        }
        Command::Check => Request::Check { owner: owner()?, netns },
        Command::Del => Request::Del { owner: owner()? },
        Command::Gc => Request::Gc,
        Command::Status => Request::Status,
        Command::Version => Request::Version,
    })
}

/// `^[A-Za-z0-9][A-Za-z0-9_.-]*$`, for container ids and network names.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Container ids become part of records; whatever the runtime says, they must be plain.
pub fn check_container_id(id: &str) -> Result<(), CniError> {
    if id.len() > CONTAINER_ID_BYTES_MAX || !is_identifier(id) {
        let shown: String = id.chars().take(64).collect();
        return Err(invalid(format!(
            "CNI_CONTAINERID {shown:?} is not at most {CONTAINER_ID_BYTES_MAX} letters, digits, \
             '_', '.' and '-', beginning with a letter or digit"
        )));
    }
    Ok(())
}

/// What the kernel takes as an interface name (`dev_valid_name` in net/core/dev.c).
pub fn check_ifname(name: &str) -> Result<(), CniError> {
    let shown: String = name.chars().take(32).collect();
    let fault = if name.is_empty() || name.len() > IFNAME_BYTES_MAX {
        "is not 1 to 15 bytes long"
    } else if matches!(name, "." | "..") {
        "is no interface name"
    } else if name.contains(|c: char| {
        // The kernel takes a '%' for the beginning of a number of its own choice ("eth%d").
        matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control()
    }) {
        "holds a '/', ':', '%', control character or white space"
    } else if name == "lo" {
        "is the loopback interface of every pod"
    } else if matches!(name, "all" | "default") {
        "is a word of the kernel's for interfaces in general"
    } else {
        return Ok(());
    };
    Err(invalid(format!("CNI_IFNAME {shown:?} {fault}")))
}

fn required(command: Command) -> &'static [&'static str] {
    match command {
        Command::Add | Command::Check => {
            &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]
        }
        Command::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
        Command::Gc | Command::Status => &["CNI_PATH"],
        Command::Version => &[],
    }
}

fn missing(names: &[&str]) -> CniError {
    invalid(format!("required environment variables [{}] are missing", names.join(", ")))
        .with_details("meshd-cni is run by a container runtime; see CNI SPEC.md, Parameters")
}

fn invalid(message: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidEnvironment, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn run(pairs: &[(&str, &str)]) -> Result<Request, CniError> {
        let map: BTreeMap<&str, &str> = pairs.iter().copied().collect();
        parse(|name| map.get(name).map(|value| (*value).to_owned()))
    }

    const GOOD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "some-container"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ];

    fn with(name: &str, value: &str) -> Vec<(&'static str, String)> {
        GOOD.iter()
            .map(|(n, v)| (*n, if *n == name { value.to_owned() } else { (*v).to_owned() }))
            .collect()
    }

    fn code_of(pairs: &[(&str, String)]) -> u32 {
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(n, v)| (*n, v.as_str())).collect();
        run(&pairs).map_or_else(|error| error.code.number(), |_| 0)
    }

    #[test]
    fn every_missing_variable_is_named() {
        let error = run(&[("CNI_COMMAND", "ADD"), ("CNI_PATH", "/p")]).unwrap_err();
        assert_eq!(error.code, Code::InvalidEnvironment);
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            assert!(error.message.contains(name), "{}", error.message);
        }
        assert!(!error.message.contains("CNI_PATH"));
    }

    #[test]
    fn an_empty_variable_counts_as_missing() {
        for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"] {
            assert_eq!(code_of(&with(name, "")), 4, "{name}");
        }
    }

    #[test]
    fn each_verb_asks_only_for_what_it_needs() {
        assert_eq!(run(&[("CNI_COMMAND", "VERSION")]), Ok(Request::Version));
        assert_eq!(run(&[("CNI_COMMAND", "STATUS"), ("CNI_PATH", "/p")]), Ok(Request::Status));
        assert_eq!(run(&[("CNI_COMMAND", "GC"), ("CNI_PATH", "/p")]), Ok(Request::Gc));
        let del = run(&[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", "c"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/p"),
        ]);
        assert!(matches!(del, Ok(Request::Del { .. })), "{del:?}");
    }

    #[test]
    fn bad_values_are_code_4() {
        let too_long = "a".repeat(CONTAINER_ID_BYTES_MAX + 1);
        let cases: &[(&str, &[&str])] = &[
            ("CNI_COMMAND", &["add", "NOPE", "ADD ", "UPDATE"]),
            (
                "CNI_CONTAINERID",
                &["some-%%container", "../x", "-a", ".a", "_a", "a b", "ä", &too_long],
            ),
            (
                "CNI_IFNAME",
                &[
                    "1234567890123456",
                    ".",
                    "..",
                    "a/b",
                    "a:b",
                    "a b",
                    "a\tb",
                    "lo",
                    "all",
                    "default",
                    "a\u{85}",
                ],
            ),
        ];
        for (name, values) in cases {
            for value in *values {
                assert_eq!(code_of(&with(name, value)), 4, "{name}={value:?}");
            }
        }
    }

    #[test]
    fn good_values_pass() {
        for id in ["a", "0", "A_b.c-d", &"f".repeat(64)] {
            assert_eq!(code_of(&with("CNI_CONTAINERID", id)), 0, "{id}");
        }
        for name in ["e", "eth0", "123456789012345", "...", "net1.5"] {
            assert_eq!(code_of(&with("CNI_IFNAME", name)), 0, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_environment_panics(command in "(ADD|DEL|CHECK|GC|.*)", id in ".*", netns in ".*", ifname in ".*") {
            let _ = run(&[
                ("CNI_COMMAND", &command),
                ("CNI_CONTAINERID", &id),
                ("CNI_NETNS", &netns),
                ("CNI_IFNAME", &ifname),
                ("CNI_PATH", "/p"),
            ]);
        }
    }
}
