//! One layer: files as a tar file. The same files give the same bytes: sorted by name, owned by root, with the modes and
//! the time that were asked for.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

use crate::digest;

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Mode of folders that are made on the way to a target.
const FOLDER_MODE: u32 = 0o755;

/// A layer as the image refers to it.
#[derive(Debug)]
pub struct Layer {
    pub(crate) media_type: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// Digest of the tar file, not compressed, with its algorithm.
    pub(crate) diff_id: String,
}

/// The files of a layer, by their path in the image without the first slash.
#[derive(Debug, Default)]
pub struct Files(BTreeMap<String, Entry>);

#[derive(Debug)]
enum Entry {
    Folder(u32),
    File(u32, PathBuf),
}

/// The files that one COPY brings. Sources lie in `context`.
pub(crate) fn copy(
    context: &Path,
    sources: &[String],
    target: &str,
    mode: u32,
) -> anyhow::Result<Files> {
    let mut files = Files::default();
    for source in sources {
        // A leading slash means the top of the context.
        let path = context.join(source.trim_matches('/'));
        let found = kind(&path)?;
        if found.is_dir() {
            files.add_folder(&path, target.trim_matches('/'), mode)?;
        } else {
            let name = path.file_name().and_then(|name| name.to_str()).context("no file name")?;
            let to =
                if target.ends_with('/') { format!("{target}{name}") } else { target.to_owned() };
            files.add(&to, mode, &path)?;
        }
    }
    Ok(files)
}

/// What a path is; only files and folders are known, as a link could lead out of the context.
fn kind(path: &Path) -> anyhow::Result<fs::Metadata> {
    let found =
        fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
    let known = found.is_file() || found.is_dir();
    ensure!(known, "{} is neither a file nor a folder", path.display());
    Ok(found)
}

impl Files {
    /// Adds a file and the folders it is in. `to` is its path in the image, `mode` as chmod(2) takes it; `source` is read
    /// when the layer is made. Fails where the path is taken.
    pub fn add(&mut self, to: &str, mode: u32, source: &Path) -> anyhow::Result<()> {
        self.insert(to.trim_matches('/'), Entry::File(mode, source.to_owned()))
    }

    /// The contents of a folder, as COPY takes them.
    fn add_folder(&mut self, folder: &Path, to: &str, mode: u32) -> anyhow::Result<()> {
        for item in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
            let path = item.with_context(|| format!("list {}", folder.display()))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.with_context(|| format!("{} is not UTF-8", path.display()))?;
            let to = if to.is_empty() { name.to_owned() } else { format!("{to}/{name}") };
            if kind(&path)?.is_dir() {
                self.insert(&to, Entry::Folder(mode))?;
                self.add_folder(&path, &to, mode)?;
            } else {
                self.insert(&to, Entry::File(mode, path))?;
            }
        }
        Ok(())
    }

    /// Adds an entry and the folders it is in.
    fn insert(&mut self, path: &str, entry: Entry) -> anyhow::Result<()> {
        ensure!(!path.is_empty(), "a file cannot be copied to /");
        for (at, _) in path.match_indices('/') {
            let parent = path.get(..at).unwrap_or("");
            let parent = self.0.entry(parent.to_owned()).or_insert(Entry::Folder(FOLDER_MODE));
            ensure!(
                matches!(parent, Entry::Folder(_)),
                "{path}: a file stands where a folder has to be"
            );
        }
        if let Some(before) = self.0.insert(path.to_owned(), entry) {
            let folders =
                matches!((&before, self.0.get(path)), (Entry::Folder(_), Some(Entry::Folder(_))));
            ensure!(folders, "{path} would be copied twice");
        }
        Ok(())
    }

    /// The layer as it is: quickest to make and to unpack. `epoch` is the time of every file, in seconds since 1970.
    pub fn plain(&self, epoch: u64) -> anyhow::Result<Layer> {
        let bytes = self.tar(epoch)?;
        Ok(Layer { media_type: PLAIN, diff_id: digest(&bytes), bytes })
    }

    /// The layer as small as it gets. `epoch` is the time of every file, in seconds since 1970.
    pub fn compressed(&self, epoch: u64) -> anyhow::Result<Layer> {
        let bytes = self.tar(epoch)?;
        let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
        gzip.write_all(&bytes)?;
        Ok(Layer { media_type: GZIP, diff_id: digest(&bytes), bytes: gzip.finish()? })
    }

    fn tar(&self, epoch: u64) -> anyhow::Result<Vec<u8>> {
        if self.0.is_empty() {
            bail!("there is nothing to copy");
        }
        let mut tar = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            match entry {
                Entry::Folder(mode) => {
                    append(&mut tar, path, EntryType::Directory, *mode, epoch, &[])?;
                }
                Entry::File(mode, file) => {
                    let bytes =
                        fs::read(file).with_context(|| format!("read {}", file.display()))?;
                    append(&mut tar, path, EntryType::Regular, *mode, epoch, &bytes)?;
                }
            }
        }
        Ok(tar.into_inner()?)
    }
}

/// One entry of a tar file, owned by root.
pub(crate) fn append(
    tar: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    epoch: u64,
    bytes: &[u8],
) -> anyhow::Result<()> {
    let mut header = Header::new_ustar();
    let slash = if kind == EntryType::Directory { "/" } else { "" };
    header.set_path(format!("{path}{slash}")).with_context(|| format!("the path {path}"))?;
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(epoch);
    header.set_size(u64::try_from(bytes.len())?);
    header.set_cksum();
    tar.append(&header, bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn listing(layer: &Layer) -> Vec<String> {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&*layer.bytes));
        let describe = |entry: tar::Entry<'_, _>| {
            let header = entry.header();
            let path = entry.path().unwrap().display().to_string();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            format!("{:04o} {} {path}", header.mode().unwrap(), header.mtime().unwrap())
        };
        archive.entries().unwrap().map(|entry| describe(entry.unwrap())).collect()
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn folders_bring_their_contents_and_files_go_where_the_slash_says() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("tree/usr/lib")).unwrap();
        fs::write(dir.path().join("tree/usr/lib/x.so"), b"x").unwrap();
        fs::write(dir.path().join("program"), b"p").unwrap();
        fs::set_permissions(dir.path().join("program"), fs::Permissions::from_mode(0o600)).unwrap();
        let layer = |sources: &[&str], target: &str| {
            copy(dir.path(), &strings(sources), target, 0o555)?.compressed(7)
        };
        let tree = listing(&layer(&["tree/"], "/").unwrap());
        assert_eq!(tree, ["0555 7 usr/", "0555 7 usr/lib/", "0555 7 usr/lib/x.so"]);
        let file = listing(&layer(&["program"], "/bin/").unwrap());
        assert_eq!(file, ["0755 7 bin/", "0555 7 bin/program"]);
        let named = listing(&layer(&["/program"], "/bin/other").unwrap());
        assert_eq!(named, ["0755 7 bin/", "0555 7 bin/other"]);
        for (sources, target) in [
            (vec!["program"], "/x/program/"),
            (vec!["nothing"], "/x"),
            (vec!["program", "program"], "/x/"),
        ] {
            let outcome = layer(&sources, target);
            assert_eq!(outcome.is_ok(), target == "/x/program/", "{sources:?} {target}");
        }
    }

    #[test]
    fn a_link_and_an_empty_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/etc/passwd", dir.path().join("link")).unwrap();
        let error = copy(dir.path(), &strings(&["link"]), "/x", 0o755).unwrap_err();
        assert!(error.to_string().contains("neither a file nor a folder"), "{error}");
        let error = copy(dir.path(), &strings(&["/"]), "/x/", 0o755).unwrap_err();
        assert!(error.to_string().contains("neither a file nor a folder"), "{error}");
        fs::remove_file(dir.path().join("link")).unwrap();
        let empty = copy(dir.path(), &strings(&["/"]), "/x/", 0o755).unwrap();
        let error = empty.compressed(0).unwrap_err();
        assert!(error.to_string().contains("nothing to copy"), "{error}");
    }

    #[test]
    fn the_same_files_elsewhere_give_the_same_bytes() {
        let make = |umask_mode: u32, order: [&str; 2]| {
            let dir = tempfile::tempdir().unwrap();
            for name in order {
                let file = dir.path().join(name);
                fs::write(&file, name).unwrap();
                fs::set_permissions(&file, fs::Permissions::from_mode(umask_mode)).unwrap();
            }
            copy(dir.path(), &strings(&["."]), "/x/", 0o755).unwrap().compressed(1).unwrap().bytes
        };
        assert_eq!(make(0o600, ["a", "b"]), make(0o755, ["b", "a"]));
    }
}
