//! The network configuration on stdin (CNI SPEC.md 1.1.0, "Configuration format").
//!
//! Unknown fields are ignored. What the specification or we define is checked, and every refusal names the field.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use ipam::owner::Owner;
use mesh_types::defaults;
use mesh_types::limits::{CNI_STDIN_BYTES_MAX, SHOWN_CHARS_MAX};
use serde_json::{Map, Value};

use crate::spec::env::is_identifier;
use crate::spec::error::{CniError, Code};
use crate::spec::result::CniResult;
use crate::spec::version::Version;

/// Longest network name: it ends up in records and messages.
const NETWORK_NAME_BYTES_MAX: usize = 256;

/// A configuration whose name and version are fine. The other fields are checked when a verb asks for them: what DEL
/// does not need must not keep it from removing a pod.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub version: Version,
    /// Network name.
    pub name: String,
    object: Map<String, Value>,
}

impl Config {
    /// Where `meshd` leaves what pods need to know (`nodeFile`).
    pub fn node_file(&self) -> Result<PathBuf, CniError> {
        path(&self.object, "nodeFile", defaults::NODE_FILE)
    }

    /// Where attachment records live (`stateDir`).
    pub fn state_dir(&self) -> Result<PathBuf, CniError> {
        path(&self.object, "stateDir", defaults::IPAM_DIR)
    }

    /// What earlier plugins of the chain, or our own ADD, answered.
    pub fn prev_result(&self) -> Result<Option<CniResult>, CniError> {
        prev_result(&self.object)
    }

    /// GC: what is to stay. `None` where the runtime did not say.
    pub fn valid_attachments(&self) -> Result<Option<BTreeSet<Owner>>, CniError> {
        valid_attachments(&self.object)
    }

    /// Name servers for the pod, handed through to the result as they are.
    pub fn dns(&self) -> Result<Option<Value>, CniError> {
        match field(&self.object, "dns") {
            Some(dns) if !dns.is_object() => {
                Err(CniError::new(Code::InvalidConfig, "dns is not an object"))
            }
            dns => Ok(dns.cloned()),
        }
    }

    /// An address or hardware address that the runtime asks for, in `CNI_ARGS`, `args` or `runtimeConfig`: we choose
    /// them ourselves, and a pod with another one than was asked for would be worse than none.
    pub fn refuse_wishes(&self, cni_args: &str) -> Result<(), CniError> {
        let refused = |key: &str, value: &str| {
            let shown: String = value.chars().take(SHOWN_CHARS_MAX).collect();
            let message = format!("{key}={shown} is not supported");
            Err(CniError::new(Code::UnsupportedField, message)
                .with_details("meshd-cni chooses a pod's addresses from the node's pod CIDRs"))
        };
        for (key, value) in cni_args.split(';').filter_map(|pair| pair.split_once('=')) {
            if matches!(key, "IP" | "MAC") && !value.is_empty() {
                return refused(&format!("CNI_ARGS {key}"), value);
            }
        }
        let object = Value::Object(self.object.clone());
        for parent in ["/runtimeConfig", "/args/cni"] {
            for name in ["ips", "mac"] {
                let pointer = format!("{parent}/{name}");
                let value = object.pointer(&pointer).map(Value::to_string).unwrap_or_default();
                if !matches!(value.as_str(), "" | "null" | "[]" | "\"\"") {
                    return refused(pointer[1..].replace('/', ".").as_str(), &value);
                }
            }
        }
        Ok(())
    }
}

/// Reads stdin up to its bound.
pub fn read_stdin(stdin: &mut dyn Read) -> Result<Vec<u8>, CniError> {
    let mut bytes = Vec::new();
    stdin
        .take(CNI_STDIN_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| CniError::new(Code::Io, format!("reading stdin: {error}")))?;
    if bytes.len() as u64 > CNI_STDIN_BYTES_MAX {
        return Err(CniError::new(
            Code::Decoding,
            format!("the configuration on stdin is larger than {CNI_STDIN_BYTES_MAX} bytes"),
        ));
    }
    Ok(bytes)
}

/// The version to answer in, also when the rest of the configuration is refused.
pub fn answer_version(stdin: &[u8]) -> Version {
    parse_object(stdin)
        .ok()
        .and_then(|object| Version::parse(object.get("cniVersion")?.as_str()?))
        .unwrap_or(Version::NEWEST)
}

/// Parses a configuration and checks its name and version.
pub fn parse(stdin: &[u8]) -> Result<Config, CniError> {
    let object = parse_object(stdin)?;
    let name = network_name(&object)?;
    let version = version(&object)?;
    Ok(Config { version, name, object })
}

/// For verbs that need a minimal version: a version that cannot be compared is code 6, one we do not speak code 1.
pub fn check_comparable(stdin: &[u8]) -> Result<(), CniError> {
    let object = parse_object(stdin)?;
    network_name(&object)?;
    match text(&object, "cniVersion")? {
        Some(asked) if !asked.is_empty() && !Version::is_one(asked) => Err(CniError::new(
            Code::Decoding,
            format!("cniVersion {:?} is no version", shorten(asked)),
        )),
        _ => Ok(()),
    }
}

fn parse_object(stdin: &[u8]) -> Result<Map<String, Value>, CniError> {
    match serde_json::from_slice(stdin) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => {
            Err(CniError::new(Code::Decoding, "the configuration on stdin is not a JSON object"))
        }
        Err(error) => Err(CniError::new(
            Code::Decoding,
            format!("the configuration on stdin is not JSON: {error}"),
        )),
    }
}

/// A field that is there and not `null`.
fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
}

fn text<'a>(object: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, CniError> {
    match field(object, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(CniError::new(Code::Decoding, format!("{name} is not a string"))),
    }
}

fn network_name(object: &Map<String, Value>) -> Result<String, CniError> {
    let name = text(object, "name")?.unwrap_or_default();
    if name.is_empty() {
        return Err(CniError::new(Code::InvalidConfig, "the configuration has no network name"));
    }
    if name.len() > NETWORK_NAME_BYTES_MAX || !is_identifier(name) {
        let shown = shorten(name);
        return Err(CniError::new(
            Code::InvalidConfig,
            format!(
                "network name {shown:?} is not at most {NETWORK_NAME_BYTES_MAX} letters, digits, \
                 '_', '.' and '-', beginning with a letter or digit"
            ),
        ));
    }
    Ok(name.to_owned())
}

fn version(object: &Map<String, Value>) -> Result<Version, CniError> {
    // The specification reads a missing version as 0.1.0.
    let asked = text(object, "cniVersion")?.filter(|text| !text.is_empty()).unwrap_or("0.1.0");
    Version::parse(asked).ok_or_else(|| {
        let spoken: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
        let message = format!("cniVersion {:?} is not supported", shorten(asked));
        CniError::new(Code::IncompatibleVersion, message)
            .with_details(format!("write one of {}", spoken.join(", ")))
    })
}

fn shorten(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}

fn path(object: &Map<String, Value>, name: &str, default: &str) -> Result<PathBuf, CniError> {
    let refused = |why: &str| CniError::new(Code::InvalidConfig, format!("{name} {why}"));
    match field(object, name) {
        None => Ok(Path::new(defaults::STATE_DIR).join(default)),
        Some(Value::String(text)) if text.contains('\0') => Err(refused("holds a zero byte")),
        Some(Value::String(text)) if Path::new(text).is_absolute() => Ok(PathBuf::from(text)),
        Some(_) => Err(refused("is not an absolute path")),
    }
}

fn prev_result(object: &Map<String, Value>) -> Result<Option<CniResult>, CniError> {
    field(object, "prevResult").map(CniResult::from_json).transpose().map_err(|error| {
        CniError::new(Code::Decoding, format!("prevResult cannot be read: {error}"))
    })
}

/// libcni sends the list under two names; what either of them holds stays.
fn valid_attachments(object: &Map<String, Value>) -> Result<Option<BTreeSet<Owner>>, CniError> {
    let mut owners = None;
    for name in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        // An empty list of Go is written as null: the key says that the runtime knows.
        let Some(value) = object.get(name) else { continue };
        let refused =
            || CniError::new(Code::InvalidConfig, format!("{name} is not a list of attachments"));
        let owners: &mut BTreeSet<Owner> = owners.get_or_insert_default();
        if value.is_null() {
            continue;
        }
        for attachment in value.as_array().ok_or_else(refused)? {
            let part =
                |key: &str| attachment.get(key).and_then(Value::as_str).filter(|s| !s.is_empty());
            let (Some(container_id), Some(ifname)) = (part("containerID"), part("ifname")) else {
                // Freeing a living pod's address because its entry is odd would be worse than stopping.
                return Err(CniError::new(
                    Code::InvalidConfig,
                    format!("{name} has an entry without containerID or ifname"),
                ));
            };
            owners
                .insert(Owner { container_id: container_id.to_owned(), ifname: ifname.to_owned() });
        }
    }
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every field looked at.
    fn parse_all(text: &[u8]) -> Result<Config, CniError> {
        let config = parse(text)?;
        config.node_file()?;
        config.state_dir()?;
        config.prev_result()?;
        config.valid_attachments()?;
        config.dns()?;
        config.refuse_wishes("")?;
        Ok(config)
    }

    fn code_of(text: &str) -> u32 {
        parse_all(text.as_bytes()).map_or_else(|error| error.code.number(), |_| 0)
    }

    #[test]
    fn defaults_and_unknown_fields_are_fine() {
        let config = parse(
            br#"{"cniVersion":"1.0.0","name":"mesh","type":"meshd-cni","ipam":{},"capabilities":{"portMappings":true},
                "runtimeConfig":{"portMappings":[]},"future":[1,2,3],"args":null}"#,
        )
        .unwrap();
        assert_eq!(config.version, Version::V1_0_0);
        assert_eq!(config.node_file().unwrap(), Path::new("/var/lib/meshd/node.json"));
        assert_eq!(config.state_dir().unwrap(), Path::new("/var/lib/meshd/ipam"));
        assert_eq!(config.valid_attachments().unwrap(), None);
        assert_eq!(config.prev_result().unwrap(), None);
    }

    #[test]
    fn bad_configurations_have_the_codes_of_the_specification() {
        let long = format!(r#"{{"cniVersion":"1.1.0","name":"{}"}}"#, "n".repeat(257));
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let cases = [
            (6, ""),
            (6, "{"),
            (6, "[]"),
            (6, "null"),
            (6, "garbage"),
            (6, "{\"name\": \"x\"} trailing"),
            (6, deep.as_str()),
            (6, r#"{"cniVersion":1,"name":"mesh"}"#),
            (6, r#"{"cniVersion":"1.1.0","name":7}"#),
            (7, r#"{"cniVersion":"1.1.0"}"#),
            (7, r#"{"cniVersion":"1.1.0","name":""}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"-mesh"}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh/../x"}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"me sh"}"#),
            (7, long.as_str()),
            (1, r#"{"name":"mesh"}"#),
            (1, r#"{"cniVersion":"","name":"mesh"}"#),
            (1, r#"{"cniVersion":"0.2.0","name":"mesh"}"#),
            (1, r#"{"cniVersion":"2.0.0","name":"mesh"}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","nodeFile":"relative"}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","nodeFile":""}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","stateDir":7}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","stateDir":"/a\u0000b"}"#),
            (6, r#"{"cniVersion":"1.1.0","name":"mesh","prevResult":[]}"#),
            (6, r#"{"cniVersion":"1.1.0","name":"mesh","prevResult":{"ips":7}}"#),
            (6, r#"{"cniVersion":"1.1.0","name":"mesh","prevResult":{"ips":[{"address":"x"}]}}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","cni.dev/attachments":{}}"#),
            (
                7,
                r#"{"cniVersion":"1.1.0","name":"mesh","cni.dev/attachments":[{"ifname":"eth0"}]}"#,
            ),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","cni.dev/valid-attachments":["x"]}"#),
            (7, r#"{"cniVersion":"1.1.0","name":"mesh","dns":["192.0.2.53"]}"#),
            (2, r#"{"cniVersion":"1.1.0","name":"mesh","runtimeConfig":{"ips":["10.244.3.9"]}}"#),
            (
                2,
                r#"{"cniVersion":"1.1.0","name":"mesh","args":{"cni":{"mac":"02:00:00:00:00:01"}}}"#,
            ),
            (
                0,
                r#"{"cniVersion":"1.1.0","name":"mesh","args":{"cni":{"ips":[]}},"runtimeConfig":{"mac":""}}"#,
            ),
        ];
        for (code, text) in cases {
            assert_eq!(code_of(text), code, "{:.80}", text);
        }
    }

    #[test]
    fn both_names_of_the_attachment_list_count() {
        let config = parse(
            br#"{"cniVersion":"1.1.0","name":"mesh",
                "cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],
                "cni.dev/attachments":[{"containerID":"b","ifname":"eth0"}]}"#,
        )
        .unwrap();
        let names: Vec<String> = config
            .valid_attachments()
            .unwrap()
            .unwrap()
            .into_iter()
            .map(|owner| owner.container_id)
            .collect();
        assert_eq!(names, ["a", "b"]);
        let empty =
            parse(br#"{"cniVersion":"1.1.0","name":"mesh","cni.dev/attachments":null}"#).unwrap();
        assert_eq!(empty.valid_attachments().unwrap(), Some(BTreeSet::new()));
    }

    #[test]
    fn an_address_asked_for_is_refused_by_key_and_value() {
        let config = parse(br#"{"cniVersion":"1.1.0","name":"mesh"}"#).unwrap();
        for fine in [
            "",
            "some;extra;args",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c",
            "IP=",
            "=;;=x",
        ] {
            assert_eq!(config.refuse_wishes(fine), Ok(()), "{fine}");
        }
        let error = config.refuse_wishes("IgnoreUnknown=1;IP=10.244.3.9").unwrap_err();
        assert_eq!(error.code, Code::UnsupportedField);
        assert!(error.message.contains("IP=10.244.3.9"), "{error}");
    }

    #[test]
    fn stdin_is_read_up_to_its_bound() {
        let mut endless = std::io::repeat(b' ');
        assert_eq!(read_stdin(&mut endless).unwrap_err().code, Code::Decoding);
    }

    proptest! {
        #[test]
        fn no_bytes_on_stdin_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse_all(&bytes);
            let _ = check_comparable(&bytes);
            let _ = answer_version(&bytes);
        }

        #[test]
        fn no_json_on_stdin_panics(
            version in "(0\\.3\\.1|0\\.4\\.0|1\\.0\\.0|1\\.1\\.0|.*)",
            name in "[a-z]{1,8}|.*",
            key in "(nodeFile|stateDir|prevResult|dns|cni.dev/attachments|cni.dev/valid-attachments)",
            value in json(),
        ) {
            let mut object = Map::new();
            object.insert("cniVersion".into(), version.into());
            object.insert("name".into(), name.into());
            object.insert(key, value);
            let _ = parse_all(&serde_json::to_vec(&object).unwrap());
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
            Just(Value::from("10.0.0.1/24")),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let key = "(interfaces|ips|routes|address|interface|gateway|dst|gw|containerID|ifname|name|mac|mtu|[a-z]{1,3})";
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key, inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }
}
