//! What ADD answers, in each version's words (CNI SPEC.md 1.1.0, "ADD Success").
//!
//! | version | difference |
//! |---|---|
//! | 0.3.1, 0.4.0 | `ips[].version` is "4" or "6"; no MTU |
//! | 1.0.0 | no `ips[].version` |
//! | 1.1.0 | `interfaces[].mtu`, and more fields of routes |

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::spec::version::Version;

/// A result, ours or an earlier plugin's; fields we do not know are passed on as they came.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct CniResult {
    #[serde(default, deserialize_with = "null_is_empty")]
    pub interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub ips: Vec<Ip>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub routes: Vec<Route>,
    #[serde(default)]
    pub dns: Option<Value>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ip {
    /// Address and prefix length; a plain prefix type would lose nothing, but a foreign plugin's host bits must stay.
    pub address: ipnet::IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Route {
    pub dst: ipnet::IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl CniResult {
    pub fn from_json(value: &Value) -> Result<Self, serde_json::Error> {
        // serde would read an array as the fields in their order.
        if !value.is_object() {
            return Err(serde::de::Error::custom("it is not an object"));
        }
        serde_json::from_value(value.clone())
    }

    /// Ours behind what earlier plugins made: indexes into `interfaces` move along.
    pub fn behind(self, earlier: Option<Self>) -> Self {
        let Some(mut all) = earlier else { return self };
        let offset = all.interfaces.len();
        all.interfaces.extend(self.interfaces);
        all.ips.extend(self.ips.into_iter().map(|mut ip| {
            ip.interface = ip.interface.map(|index| index.saturating_add(offset));
            ip
        }));
        all.routes.extend(self.routes);
        all.dns = all.dns.or(self.dns);
        all
    }

    /// Written as `version` wants it.
    pub fn to_json(&self, version: Version) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            cni_version: &'static str,
            interfaces: Vec<Interface>,
            ips: Vec<Ip>,
            routes: &'a [Route],
            dns: Value,
        }
        let wire = Wire {
            cni_version: version.as_str(),
            interfaces: self
                .interfaces
                .iter()
                .map(|interface| interface.for_version(version))
                .collect(),
            ips: self.ips.iter().map(|ip| ip.for_version(version)).collect(),
            routes: &self.routes,
            dns: self.dns.clone().unwrap_or_else(|| Value::Object(Map::new())),
        };
        to_json(&wire)
    }
}

impl Interface {
    fn for_version(&self, version: Version) -> Self {
        let mtu = self.mtu.filter(|_| version >= Version::V1_1_0);
        Self { mtu, ..self.clone() }
    }
}

impl Ip {
    fn for_version(&self, version: Version) -> Self {
        let mut ip = self.clone();
        ip.other.remove("version");
        if version < Version::V1_0_0 {
            let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
            ip.other.insert("version".to_owned(), family.into());
        }
        ip
    }
}

/// The answer to VERSION.
pub fn version_json() -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Wire {
        cni_version: &'static str,
        supported_versions: [&'static str; 4],
    }
    to_json(&Wire {
        cni_version: Version::NEWEST.as_str(),
        supported_versions: Version::ALL.map(Version::as_str),
    })
}

/// JSON with a line end. Only types of this crate come here; their serialisation cannot fail.
pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Go writes an empty list as `null`.
fn null_is_empty<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::<Vec<T>>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn foreign() -> CniResult {
        CniResult::from_json(&serde_json::json!({
            "cniVersion": "0.4.0",
            "interfaces": [{"name": "x0", "pciID": "0000:00:1f.6"}],
            "ips": [{"version": "4", "address": "192.0.2.7/24", "interface": 0}],
            "routes": null,
            "dns": {"nameservers": ["192.0.2.53"]},
        }))
        .unwrap()
    }

    #[test]
    fn what_earlier_plugins_made_is_passed_on_and_indexes_move() {
        let ours = CniResult {
            interfaces: vec![Interface { name: "eth0".into(), ..Interface::default() }],
            ips: vec![Ip {
                address: "10.244.1.5/32".parse().unwrap(),
                gateway: None,
                interface: Some(0),
                other: Map::new(),
            }],
            ..CniResult::default()
        };
        let both = ours.behind(Some(foreign()));
        let json: Value = serde_json::from_slice(&both.to_json(Version::V1_1_0)).unwrap();
        assert_eq!(json["interfaces"][0]["pciID"], "0000:00:1f.6");
        assert_eq!(json["ips"][0]["address"], "192.0.2.7/24");
        assert_eq!(json["ips"][0].get("version"), None);
        assert_eq!(json["ips"][1]["interface"], 1);
        assert_eq!(json["dns"]["nameservers"][0], "192.0.2.53");
    }

    #[test]
    fn the_family_of_an_address_is_written_for_old_versions_only() {
        for (version, expected) in
            [(Version::V0_3_1, Some("4")), (Version::V0_4_0, Some("4")), (Version::V1_0_0, None)]
        {
            let json: Value = serde_json::from_slice(&foreign().to_json(version)).unwrap();
            assert_eq!(
                json["ips"][0].get("version").and_then(Value::as_str),
                expected,
                "{version}"
            );
        }
    }
}
