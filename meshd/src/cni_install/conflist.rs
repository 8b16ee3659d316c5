//! Our configuration as text (CNI SPEC.md 1.1.0, "Configuration format").

use std::path::Path;
use std::str::FromStr;

use mesh_types::defaults;
use serde_json::{Value, json};

use super::PLUGIN;

/// A standard plugin behind ours, called by the capability it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Capability {
    /// Host ports, by `portmap`.
    PortMappings,
    /// Rates, by `bandwidth`.
    Bandwidth,
}

impl FromStr for Capability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "portMappings" => Ok(Self::PortMappings),
            "bandwidth" => Ok(Self::Bandwidth),
            other => {
                Err(format!("{other:?} is no capability we chain: write portMappings or bandwidth"))
            }
        }
    }
}

impl Capability {
    fn plugin(self) -> Value {
        match self {
            Self::PortMappings => {
                json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true})
            }
            Self::Bandwidth => {
                json!({"type": "bandwidth", "capabilities": {"bandwidth": true}})
            }
        }
    }
}

/// The whole file. Paths are said only where they are not the plugin's own defaults.
pub fn render(capabilities: &[Capability], state_dir: &Path) -> String {
    let mut ours = json!({"type": PLUGIN});
    if state_dir != Path::new(defaults::STATE_DIR)
        && let Some(ours) = ours.as_object_mut()
    {
        let path = |name: &str| Value::from(state_dir.join(name).to_string_lossy());
        ours.insert("nodeFile".into(), path(defaults::NODE_FILE));
        ours.insert("stateDir".into(), path(defaults::IPAM_DIR));
    }
    let mut plugins = vec![ours];
    let mut chained = capabilities.to_vec();
    chained.sort_unstable();
    chained.dedup();
    plugins.extend(chained.into_iter().map(Capability::plugin));
    let list = json!({"cniVersion": "1.1.0", "name": "meshd", "plugins": plugins});
    format!("{list:#}\n")
}

/// Whether it is what [`render`] makes, of whatever capabilities and state folder.
pub(super) fn is_rendered(text: &[u8]) -> bool {
    use Capability::{Bandwidth, PortMappings};
    let Ok(list) = serde_json::from_slice::<Value>(text) else { return false };
    let node_file = list.pointer("/plugins/0/nodeFile").and_then(Value::as_str);
    let state_dir = node_file.and_then(|path| Path::new(path).parent());
    let state_dir = state_dir.unwrap_or(Path::new(defaults::STATE_DIR));
    let chains: [&[Capability]; 4] =
        [&[], &[PortMappings], &[Bandwidth], &[PortMappings, Bandwidth]];
    chains.iter().any(|chain| render(chain, state_dir).as_bytes() == text)
}
