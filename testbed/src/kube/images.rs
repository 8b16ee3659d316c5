//! The images of a cluster, imported into every containerd without a registry. Ours comes as a file; those of the tests
//! are made here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use image_builder::{Files, Image, Layout};

use super::cluster::Kube;
use super::settings;
use crate::lab::Namespace;

impl Kube {
    /// Imports image files on every node.
    pub fn load(&self, files: &[PathBuf]) -> Result<()> {
        std::thread::scope(|scope| {
            let mut jobs = Vec::new();
            for name in &self.record.nodes {
                jobs.push(scope.spawn(move || {
                    let node = self.node(name)?;
                    files.iter().try_for_each(|file| self.load_one(&node, file))
                }));
            }
            for job in jobs {
                job.join().map_err(|_| anyhow::anyhow!("loading an image panicked"))??;
            }
            Ok(())
        })
    }

    /// Fails where none of the image files held the image that the chart asks for.
    pub(super) fn check_own_image(&self) -> Result<()> {
        let name = self.record.nodes.first().context("a cluster without nodes")?;
        let ctr = self.tool("ctr").display().to_string();
        let filter = format!("name=={}", settings::MESHD_IMAGE);
        let found = self.node(name)?.run(&[
            &ctr,
            "--namespace=k8s.io",
            "images",
            "list",
            "--quiet",
            &filter,
        ])?;
        ensure!(
            found.lines().any(|line| line == settings::MESHD_IMAGE),
            "no --image holds {}, which our chart asks for: give the file that dist/image prints",
            settings::MESHD_IMAGE
        );
        Ok(())
    }

    /// Writes the image files of every cluster, ours apart: that one is made by dist/image.
    pub(super) fn make_images(&self) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("images");
        fs::create_dir_all(&dir)?;
        let images = [
            (settings::PAUSE_IMAGE, self.tool("pause"), vec!["/pause"]),
            (settings::DNS_IMAGE, self.tool("coredns"), vec!["/coredns"]),
            (settings::TOOL_IMAGE, self.lab.programs().testbed.clone(), vec!["/tool", "tool"]),
        ];
        let mut files = Vec::new();
        for (name, program, entrypoint) in images {
            let file = dir.join(format!("{}.tar", name.replace(['/', ':'], "-")));
            write_image(name, &program, &entrypoint, &file)
                .with_context(|| format!("cannot make the image {name}"))?;
            files.push(file);
        }
        Ok(files)
    }

    fn load_one(&self, node: &Namespace, file: &Path) -> Result<()> {
        let ctr = self.tool("ctr").display().to_string();
        self.wait(&format!("containerd of {} answers", node.name()), || {
            node.run(&[&ctr, "version"]).map(|_| ())
        })?;
        let path = fs::canonicalize(file)
            .with_context(|| format!("no image file {}", file.display()))?
            .display()
            .to_string();
        node.run(&[&ctr, "--namespace=k8s.io", "images", "import", "--digests=false", &path])
            .map(|_| ())
    }
}

/// Files are looked for before a cluster is made for them.
pub(super) fn check(files: &[PathBuf]) -> Result<()> {
    ensure!(
        !files.is_empty(),
        "--image is missing: the file of our image, as dist/image prints it; ./testbed/kube gives it"
    );
    for file in files {
        ensure!(file.is_file(), "there is no image file {}", file.display());
    }
    Ok(())
}

/// Writes the image of one program, with the libraries it needs at the paths they have on this machine. The first word of
/// `entrypoint` is where the program lies in the image.
fn write_image(name: &str, program: &Path, entrypoint: &[&str], to: &Path) -> Result<()> {
    let mut files = Files::default();
    let place = entrypoint.first().context("no program to start")?;
    files.add(place, 0o755, program)?;
    for library in libraries(program)? {
        files.add(&library.display().to_string(), 0o755, &library)?;
    }
    let mut layout = Layout::default();
    let image = Image {
        layers: vec![files.plain(0)?],
        entrypoint: entrypoint.iter().map(ToString::to_string).collect(),
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        ..Image::default()
    };
    layout.add(architecture(), image, 0)?;
    layout.write(name, to).map(|_| ())
}

/// The libraries and the loader a program needs; none where it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd(1)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{}: a library is missing: {}", program.display(), line.trim());
    }
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    let mut paths: Vec<_> = words.filter(|word| !word.ends_with(':')).map(PathBuf::from).collect();
    paths.sort();
    paths.dedup();
    Ok(paths)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_without_our_image_is_refused_before_it_is_made() {
        let error = check(&[]).unwrap_err().to_string();
        assert!(error.contains("--image is missing") && error.contains("dist/image"), "{error}");
        let error = check(&["/nonexistent/image.tar".into()]).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/image.tar"), "{error}");
    }

    #[test]
    fn an_image_of_a_dynamic_program_runs_from_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image.tar");
        write_image("example.com/true:1", Path::new("/bin/true"), &["/bin/true"], &file).unwrap();
        let unpack = |file: &Path, to: &str| {
            fs::create_dir(dir.path().join(to)).unwrap();
            let mut tar = Command::new("tar");
            let done = tar.arg("xf").arg(file).arg("-C").arg(dir.path().join(to)).status().unwrap();
            assert!(done.success());
            dir.path().join(to)
        };
        let image = unpack(&file, "image");
        let read = |path: &str| -> serde_json::Value {
            serde_json::from_slice(&fs::read(image.join(path)).unwrap()).unwrap()
        };
        let blob = |descriptor: &serde_json::Value| {
            format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"))
        };
        let manifest = read(&blob(&read("index.json")["manifests"][0]));
        assert_eq!(read(&blob(&manifest["config"]))["config"]["Entrypoint"][0], "/bin/true");
        let root = unpack(&image.join(blob(&manifest["layers"][0])), "root");
        let libraries = libraries(Path::new("/bin/true")).unwrap();
        assert!(!libraries.is_empty());
        let loader = libraries.iter().find(|path| path.to_string_lossy().contains("/ld-")).unwrap();
        let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap());
        // By the image's loader and with the image's libraries alone.
        let folders: Vec<String> = libraries
            .iter()
            .filter_map(|path| path.parent())
            .map(|folder| inside(folder).display().to_string())
            .collect();
        let done = Command::new(inside(loader))
            .args(["--inhibit-cache", "--library-path", &folders.join(":")])
            .arg(inside(Path::new("/bin/true")))
            .status()
            .unwrap();
        assert!(done.success());
    }
}
