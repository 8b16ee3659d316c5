//! The images of a cluster: made here, imported into every containerd.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cluster::Kube;
use super::image::ImagePlan;
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

    /// Writes the image files of every cluster; ours is made of the programs that lie beside this one.
    pub(super) fn make_images(&self) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("images");
        fs::create_dir_all(&dir)?;
        let programs = self.lab.programs();
        let one = |path: &str, program: PathBuf| vec![(path.to_owned(), program)];
        let meshd = [
            ("/usr/bin/meshd", programs.meshd.clone()),
            ("/usr/bin/meshd-cni", programs.cni.clone()),
            ("/usr/bin/keyrelay", programs.meshd.with_file_name("keyrelay")),
            ("/usr/sbin/nft", find_program("nft")?),
        ];
        let meshd = meshd.map(|(path, program)| (path.to_owned(), program)).to_vec();
        let tool = one("/tool", programs.testbed.clone());
        let images = [
            (settings::PAUSE_IMAGE, one("/pause", self.tool("pause")), vec!["/pause"]),
            (settings::DNS_IMAGE, one("/coredns", self.tool("coredns")), vec!["/coredns"]),
            (settings::TOOL_IMAGE, tool, vec!["/tool", "tool"]),
            (settings::MESHD_IMAGE, meshd, vec!["/usr/bin/meshd"]),
        ];
        let mut files = Vec::new();
        for (name, programs, entrypoint) in images {
            let plan = ImagePlan {
                name: name.to_owned(),
                programs,
                links: Vec::new(),
                entrypoint: entrypoint.into_iter().map(str::to_owned).collect(),
            };
            let file = dir.join(format!("{}.tar", name.replace(['/', ':'], "-")));
            plan.write(&file)?;
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

/// A program of this machine, where root's PATH would find it.
fn find_program(name: &str) -> Result<PathBuf> {
    let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let found = places.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file());
    found.with_context(|| format!("this machine has no {name}: install it"))
}
