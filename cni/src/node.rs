//! Reads what `meshd` left for us (see [`mesh_types::node_file`]).

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use mesh_types::limits::FILE_BYTES_MAX;
use mesh_types::node_file::NodeFile;

/// The node file, if it is good for this boot; otherwise what an operator should look at.
pub fn load(path: &Path, boot_id: &str) -> Result<NodeFile, String> {
    let shown = path.display();
    let bytes = read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            format!("{shown} does not exist: meshd has not been ready on this node yet")
        }
        _ => format!("{shown} cannot be read: {error}"),
    })?;
    let file: NodeFile = serde_json::from_slice(&bytes).map_err(|error| {
        format!("{shown} is damaged ({error}): meshd writes it anew when it starts")
    })?;
    let file = file.check().map_err(|error| format!("{shown}: {error}"))?;
    if file.boot_id != boot_id {
        return Err(format!(
            "{shown} is of an earlier boot: meshd has not been ready since the node started"
        ));
    }
    Ok(file)
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn refusal(content: &str, boot_id: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        fs::write(&path, content).unwrap();
        load(&path, boot_id).map(|_| String::new()).unwrap_or_else(|why| why)
    }

    const GOOD: &str = r#"{"version":1,"node":"n1","boot_id":"b1","cluster_prefixes":["10.244.0.0/16"],
        "pod_cidrs":["10.244.3.0/24"],"mtu":1380,"tun":"meshd0","table":5190}"#;

    #[test]
    fn a_file_of_this_boot_is_taken() {
        assert_eq!(refusal(GOOD, "b1"), "");
    }

    #[test]
    fn every_other_file_is_refused_with_its_reason() {
        let cases = [
            (GOOD.to_owned(), "b2", "earlier boot"),
            (String::new(), "b1", "damaged"),
            (GOOD.get(..100).unwrap().to_owned(), "b1", "damaged"),
            (GOOD.replace("\"version\":1", "\"version\":2"), "b1", "version 2"),
            (GOOD.replace("10.244.3.0/24", "10.9.3.0/24"), "b1", "outside the cluster"),
            (GOOD.replace("[\"10.244.3.0/24\"]", "[]"), "b1", "no pod CIDR"),
            (GOOD.replace("1380", "70000"), "b1", "MTU"),
        ];
        for (content, boot_id, expected) in cases {
            let why = refusal(&content, boot_id);
            assert!(why.contains(expected), "{why}");
        }
        let why = load(Path::new("/nonexistent/node.json"), "b1").unwrap_err();
        assert!(why.contains("has not been ready"), "{why}");
    }
}
