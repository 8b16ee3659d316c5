//! Images without a registry: one layer in an OCI layout, as a tar file that containerd imports.
//!
//! A program that is not static brings the libraries it is linked with, at the paths they have on this machine.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// The longest name a plain tar header holds, and the longest folder before it (POSIX ustar).
const NAME_LENGTH: usize = 100;
const PREFIX_LENGTH: usize = 155;

const BLOCK: usize = 512;

/// An image to be made. Its name needs a host part: `meshd.dev/tool:1`, or Kubernetes looks for it elsewhere.
#[derive(Debug, Clone)]
pub struct ImagePlan {
    pub name: String,
    /// Path in the image, file on this machine; all become executable.
    pub programs: Vec<(String, PathBuf)>,
    /// Path in the image and what it points to.
    pub links: Vec<(String, String)>,
    pub entrypoint: Vec<String>,
}

impl ImagePlan {
    /// Writes the image's tar file.
    pub fn write(&self, file: &Path) -> Result<()> {
        ensure!(
            self.name.split('/').next().is_some_and(|host| host.contains('.')),
            "an image's name begins with a host, as in example.com/{}",
            self.name
        );
        let layer = self.layer()?;
        let config = serde_json::to_vec(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
        }))?;
        let mut top = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        if let Value::Object(fields) = &mut top {
            fields.insert("annotations".into(), json!({"io.containerd.image.name": self.name}));
        }
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [top],
        }))?;
        let mut tar = Tar::default();
        tar.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        tar.file("index.json", &index, 0o644)?;
        for blob in [&config, &manifest, &layer] {
            tar.file(&format!("blobs/{}", digest(blob).replace(':', "/")), blob, 0o644)?;
        }
        let name = file.with_extension("new");
        fs::File::create(&name)
            .and_then(|mut out| out.write_all(&tar.end()))
            .and_then(|()| fs::rename(&name, file))
            .with_context(|| format!("cannot write {}", file.display()))
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut files: Vec<(String, PathBuf)> = Vec::new();
        for (path, program) in &self.programs {
            files.push((path.clone(), program.clone()));
            for library in libraries(program)? {
                let path = library.display().to_string();
                if !files.iter().any(|(there, _)| *there == path) {
                    files.push((path, library));
                }
            }
        }
        let mut tar = Tar::default();
        for (path, source) in files {
            let contents =
                fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
            tar.file(path.trim_start_matches('/'), &contents, 0o755)?;
        }
        for (path, target) in &self.links {
            tar.link(path.trim_start_matches('/'), target)?;
        }
        Ok(tar.end())
    }
}

/// The libraries and the loader a program needs; none where it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd(1)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{}: a library is missing: {}", program.display(), line.trim());
    }
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.filter(|word| !word.ends_with(':')).map(PathBuf::from).collect())
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(bytes: &[u8]) -> String {
    let hash = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut text = String::from("sha256:");
    for byte in hash.as_ref() {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

/// A tar file in memory, the same bytes for the same contents: no times, no owners.
#[derive(Debug, Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn file(&mut self, path: &str, contents: &[u8], mode: u32) -> Result<()> {
        self.header(path, contents.len(), mode, b'0', "")?;
        self.0.extend_from_slice(contents);
        self.pad();
        Ok(())
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.header(path, 0, 0o777, b'2', target)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 2 * BLOCK]);
        self.0
    }

    fn pad(&mut self) {
        let rest = self.0.len() % BLOCK;
        if rest > 0 {
            self.0.resize(self.0.len() + BLOCK - rest, 0);
        }
    }

    fn header(&mut self, path: &str, size: usize, mode: u32, kind: u8, target: &str) -> Result<()> {
        let (prefix, name) = split(path)?;
        ensure!(target.len() <= NAME_LENGTH, "the link target {target:?} is too long for a tar");
        let mut block = [0_u8; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| {
            block.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0000000");
        put(116, b"0000000");
        put(124, format!("{size:011o}").as_bytes());
        put(136, b"00000000000");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        put(345, prefix.as_bytes());
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let text = format!("{sum:06o}\0 ");
        block.iter_mut().skip(148).zip(text.as_bytes()).for_each(|(to, from)| *to = *from);
        self.0.extend_from_slice(&block);
        Ok(())
    }
}

/// A path as the two fields of a header.
fn split(path: &str) -> Result<(&str, &str)> {
    if path.len() <= NAME_LENGTH {
        return Ok(("", path));
    }
    path.char_indices()
        .filter(|(_, letter)| *letter == '/')
        .map(|(at, _)| (&path[..at], &path[at + 1..]))
        .find(|(prefix, name)| prefix.len() <= PREFIX_LENGTH && name.len() <= NAME_LENGTH)
        .with_context(|| format!("the path {path:?} is too long for a tar"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_what_we_write() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}/{}/file", "d".repeat(90), "e".repeat(60));
        let mut tar = Tar::default();
        tar.file("hello", b"world", 0o755).unwrap();
        tar.file(&long, b"deep", 0o644).unwrap();
        tar.link("bin/sh", "/busybox").unwrap();
        assert!(tar.file(&"n".repeat(101), b"", 0o644).is_err());
        fs::write(dir.path().join("a.tar"), tar.end()).unwrap();
        let done =
            Command::new("tar").args(["xf", "a.tar"]).current_dir(dir.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(fs::read(dir.path().join("hello")).unwrap(), b"world");
        assert_eq!(fs::read(dir.path().join(long)).unwrap(), b"deep");
        assert_eq!(fs::read_link(dir.path().join("bin/sh")).unwrap(), Path::new("/busybox"));
    }

    #[test]
    fn an_image_of_a_dynamic_program_runs_from_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let plan = ImagePlan {
            name: "example.com/true:1".into(),
            programs: vec![("/bin/true".into(), "/bin/true".into())],
            links: Vec::new(),
            entrypoint: vec!["/bin/true".into()],
        };
        let file = dir.path().join("image.tar");
        plan.write(&file).unwrap();
        let unpack = |file: &Path, to: &str| {
            fs::create_dir(dir.path().join(to)).unwrap();
            let mut tar = Command::new("tar");
            let done = tar.arg("xf").arg(file).arg("-C").arg(dir.path().join(to)).status().unwrap();
            assert!(done.success());
        };
        unpack(&file, "image");
        let read = |path: &str| fs::read(dir.path().join("image").join(path)).unwrap();
        let index: Value = serde_json::from_slice(&read("index.json")).unwrap();
        let blob = |descriptor: &Value| {
            format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"))
        };
        let manifest: Value = serde_json::from_slice(&read(&blob(&index["manifests"][0]))).unwrap();
        let layer = dir.path().join("image").join(blob(&manifest["layers"][0]));
        assert_eq!(digest(&fs::read(&layer).unwrap()), manifest["layers"][0]["digest"]);
        unpack(&layer, "root");
        let root = dir.path().join("root");
        assert!(root.join("bin/true").exists());
        let libraries = libraries(Path::new("/bin/true")).unwrap();
        assert!(libraries.iter().all(|path| root.join(path.strip_prefix("/").unwrap()).exists()));
    }

    #[test]
    fn a_name_without_a_host_is_refused() {
        let plan = ImagePlan {
            name: "tool:1".into(),
            programs: Vec::new(),
            links: Vec::new(),
            entrypoint: Vec::new(),
        };
        assert!(plan.write(Path::new("/nowhere/image.tar")).is_err());
    }
}
