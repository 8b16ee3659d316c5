//! Images as the OCI image layout stores them (image-spec v1.1), in one tar file that container tools load and push.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tar::{Builder, EntryType};

use crate::containerfile::{Action, Step};
use crate::digest;
use crate::layer::{self, Layer};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// The image of one platform.
#[derive(Debug, Default)]
pub struct Image {
    /// From the bottom up.
    pub layers: Vec<Layer>,
    /// Program and arguments a container starts with.
    pub entrypoint: Vec<String>,
    /// Its environment, as NAME=VALUE.
    pub env: Vec<String>,
    /// As numbers, `UID:GID`; root where there is none.
    pub user: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// Entries of the configuration's `history`; may be empty.
    pub history: Vec<Value>,
}

impl Image {
    /// Makes the image of a Containerfile. `context` holds what it copies; `epoch` is its time, in seconds since 1970.
    pub fn of_steps(steps: &[Step], context: &Path, epoch: u64) -> anyhow::Result<Self> {
        let mut image = Self::default();
        for step in steps {
            let mut line = json!({"created": rfc3339(epoch), "created_by": step.text});
            if !matches!(step.action, Action::Copy { .. }) {
                set(&mut line, "empty_layer", json!(true));
            }
            image.history.push(line);
            match &step.action {
                Action::Nothing => {}
                Action::Copy { sources, target, mode } => {
                    let files = layer::copy(context, sources, target, *mode)?;
                    image.layers.push(files.compressed(epoch)?);
                }
                Action::Label(pairs) => image.labels.extend(pairs.iter().cloned()),
                Action::Env(pairs) => {
                    image.env.extend(pairs.iter().map(|(name, value)| format!("{name}={value}")));
                }
                Action::User(user) => image.user = Some(user.clone()),
                Action::Entrypoint(words) => image.entrypoint.clone_from(words),
            }
        }
        Ok(image)
    }
}

/// Blobs by digest, and the manifests of the platforms.
#[derive(Debug, Default)]
pub struct Layout {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: Vec<Value>,
}

impl Layout {
    /// Adds the image of one platform. `architecture` as container images name it; `epoch` is the image's time of
    /// creation, in seconds since 1970. Fails where it has no files.
    pub fn add(&mut self, architecture: &str, image: Image, epoch: u64) -> anyhow::Result<()> {
        ensure!(!image.layers.is_empty(), "an image without a file");
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for layer in image.layers {
            diff_ids.push(layer.diff_id);
            layers.push(self.store(layer.media_type, layer.bytes));
        }
        let mut config =
            json!({"Entrypoint": image.entrypoint, "Env": image.env, "Labels": image.labels});
        if let Some(user) = image.user {
            set(&mut config, "User", json!(user));
        }
        let document = json!({
            "architecture": architecture, "os": "linux", "created": rfc3339(epoch), "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": image.history,
        });
        let config = self.store(CONFIG, serde_json::to_vec(&document)?);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
            "annotations": image.labels,
        });
        let mut entry = self.store(MANIFEST, serde_json::to_vec(&manifest)?);
        set(&mut entry, "platform", json!({"architecture": architecture, "os": "linux"}));
        self.manifests.push(entry);
        Ok(())
    }

    /// Writes the tar file, replaced in one step. `name` is the image's, with a host and a tag. Returns the digest an
    /// image reference can be pinned to.
    pub fn write(self, name: &str, file: &Path) -> anyhow::Result<String> {
        let (bytes, digest) = self.finish(name)?;
        // Renamed when whole: whoever looks meanwhile sees the old file or the new one.
        let part = file.with_extension("part");
        fs::write(&part, bytes)
            .and_then(|()| fs::rename(&part, file))
            .with_context(|| format!("write {}", file.display()))?;
        Ok(digest)
    }

    /// The tar file, and the digest an image reference can be pinned to: of the manifest, or of the index over them
    /// where there are several.
    fn finish(mut self, name: &str) -> anyhow::Result<(Vec<u8>, String)> {
        let (host, _) = name.split_once('/').unwrap_or_default();
        let tag = name.rsplit_once(':').map(|(_, tag)| tag).filter(|tag| !tag.contains('/'));
        ensure!(
            host.contains(['.', ':']) && tag.is_some_and(|tag| !tag.is_empty()),
            "an image's name has a host and a tag, as in example.com/meshd:1: {name:?}"
        );
        let mut top = match &*self.manifests {
            [only] => only.clone(),
            several => {
                let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": several});
                self.store(INDEX, serde_json::to_vec(&index)?)
            }
        };
        let digest = top.get("digest").and_then(Value::as_str).unwrap_or("").to_owned();
        set(
            &mut top,
            "annotations",
            json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag}),
        );
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [top]});
        let mut tar = Builder::new(Vec::new());
        let mut file = |path: &str, bytes: &[u8]| {
            layer::append(&mut tar, path, EntryType::Regular, 0o644, 0, bytes)
        };
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        file("index.json", &serde_json::to_vec(&index)?)?;
        for (digest, bytes) in &self.blobs {
            file(&format!("blobs/{}", digest.replace(':', "/")), bytes)?;
        }
        Ok((tar.into_inner()?, digest))
    }

    fn store(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = digest(&bytes);
        let entry = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.blobs.insert(digest, bytes);
        entry
    }
}

fn set(object: &mut Value, name: &str, value: Value) {
    if let Value::Object(fields) = object {
        fields.insert(name.to_owned(), value);
    }
}

/// A time in UTC, as in `2026-11-25T08:00:00Z`.
fn rfc3339(epoch: u64) -> String {
    let (days, second) = (epoch / 86_400, epoch % 86_400);
    // Years from March on, so that the odd day is a year's last: eras of 400 years have 146 097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::containerfile;

    /// The files of a tar, by path.
    fn unpack(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        let read = |mut entry: tar::Entry<'_, _>| {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path().unwrap().display().to_string(), bytes)
        };
        archive.entries().unwrap().map(|entry| read(entry.unwrap())).collect()
    }

    fn image(platforms: &[&str]) -> (Vec<u8>, String) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"hello").unwrap();
        let text = "FROM scratch\nCOPY --chmod=0755 a /bin/\nLABEL x=\"y z\"\nENV PATH=/bin\n\
                    USER 0:0\nENTRYPOINT [\"/bin/a\"]";
        let steps = containerfile::parse(text, &BTreeMap::new()).unwrap();
        let mut layout = Layout::default();
        for platform in platforms {
            let image = Image::of_steps(&steps, dir.path(), 1_764_057_600).unwrap();
            layout.add(platform, image, 1_764_057_600).unwrap();
        }
        layout.finish("example.com/a:1").unwrap()
    }

    #[test]
    fn every_descriptor_leads_to_its_blob() {
        let (bytes, pinned) = image(&["amd64", "arm64"]);
        let files = unpack(&bytes);
        let blob = |entry: &Value| {
            let digest = entry["digest"].as_str().unwrap();
            let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(crate::digest(bytes), digest);
            assert_eq!(entry["size"], bytes.len());
            bytes.clone()
        };
        let json = |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes).unwrap();
        let top = json(files["index.json"].clone());
        assert_eq!(top["manifests"][0]["digest"], pinned);
        assert_eq!(
            top["manifests"][0]["annotations"]["io.containerd.image.name"],
            "example.com/a:1"
        );
        let index = json(blob(&top["manifests"][0]));
        let platforms = index["manifests"].as_array().unwrap();
        assert_eq!(platforms.len(), 2);
        for (entry, architecture) in platforms.iter().zip(["amd64", "arm64"]) {
            assert_eq!(entry["platform"]["architecture"], architecture);
            let manifest = json(blob(entry));
            let config = json(blob(&manifest["config"]));
            assert_eq!(config["architecture"], architecture);
            assert_eq!(config["created"], "2025-11-25T08:00:00Z");
            assert_eq!(config["config"]["Entrypoint"], json!(["/bin/a"]));
            assert_eq!(config["config"]["Env"], json!(["PATH=/bin"]));
            assert_eq!(config["config"]["Labels"], json!({"x": "y z"}));
            assert_eq!(config["config"]["User"], "0:0");
            let real =
                config["history"].as_array().unwrap().iter().filter(|it| it["empty_layer"] != true);
            assert_eq!(real.count(), manifest["layers"].as_array().unwrap().len());
            let mut tar = Vec::new();
            let packed = blob(&manifest["layers"][0]);
            flate2::read::GzDecoder::new(&*packed).read_to_end(&mut tar).unwrap();
            assert_eq!(config["rootfs"]["diff_ids"][0], crate::digest(&tar));
            assert_eq!(unpack(&tar)["bin/a"], b"hello");
        }
    }

    #[test]
    fn one_platform_needs_no_index_of_its_own() {
        let (bytes, pinned) = image(&["arm64"]);
        let files = unpack(&bytes);
        let manifest: Value =
            serde_json::from_slice(&files[&format!("blobs/{}", pinned.replace(':', "/"))]).unwrap();
        assert_eq!(manifest["mediaType"], MANIFEST);
        assert_eq!(files.len(), 5, "{:?}", files.keys());
        assert_eq!(image(&["arm64"]).0, bytes);
    }

    #[test]
    fn a_plain_layer_is_the_tar_itself_and_a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::write(&program, b"hello").unwrap();
        let image = || {
            let mut files = layer::Files::default();
            files.add("/bin/a", 0o755, &program).unwrap();
            assert!(files.add("bin/a", 0o755, &program).is_err());
            Image { layers: vec![files.plain(0).unwrap()], ..Image::default() }
        };
        let layout = || {
            let mut layout = Layout::default();
            layout.add("amd64", image(), 0).unwrap();
            layout
        };
        let file = dir.path().join("image.tar");
        let pinned = layout().write("example.com/a:1", &file).unwrap();
        let files = unpack(&std::fs::read(&file).unwrap());
        let manifest: Value =
            serde_json::from_slice(&files[&format!("blobs/{}", pinned.replace(':', "/"))]).unwrap();
        let layer = &manifest["layers"][0];
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar");
        let digest = layer["digest"].as_str().unwrap().replace(':', "/");
        assert_eq!(unpack(&files[&format!("blobs/{digest}")])["bin/a"], b"hello");
        layout().write("no-host", &dir.path().join("other.tar")).unwrap_err();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_name_needs_a_host_and_a_tag() {
        for name in [
            "meshd:1",
            "local/meshd:1",
            "example.com/meshd",
            "example.com:5000/meshd",
            "example.com/meshd:",
        ] {
            let error = Layout::default().finish(name).expect_err(name);
            assert!(error.to_string().contains("host and a tag"), "{name}: {error}");
        }
    }

    #[test]
    fn times_are_written_as_the_calendar_has_them() {
        for (epoch, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(epoch), text);
        }
    }
}
