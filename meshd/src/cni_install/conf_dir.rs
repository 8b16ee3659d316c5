//! The directory runtimes read: who is in it, and whose file they take.
//!
//! libcni's `ConfFiles` lists files, no directories, whose names end in `.conf`, `.conflist` or `.json`; containerd and CRI-O
//! sort them and take the first. containerd fails on a first file it cannot read, so such a file counts as the choice.

use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use super::PLUGIN;
use crate::files;

/// Appended to the name of a file that is to be read by no runtime.
pub const DISABLED_SUFFIX: &str = ".meshd-disabled";

/// Files looked at: a directory of more is no configuration directory.
const FILES_MAX: usize = 1_024;

/// One configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conf {
    pub file: String,
    /// Name of the network, and the first plugin; why it cannot be read otherwise.
    pub content: Result<(String, String), String>,
}

impl Conf {
    /// In words, for people.
    pub fn describe(&self) -> String {
        match &self.content {
            Ok((network, plugin)) => format!("network {network:?}, plugin {plugin:?}"),
            Err(why) => format!("unreadable: {why}"),
        }
    }

    pub(super) fn plugin_is_ours(&self) -> bool {
        self.content.as_ref().is_ok_and(|(_, plugin)| plugin == PLUGIN)
    }

    /// By its name, whatever is in it (a truncated file of ours is ours), or by its plugin.
    pub(super) fn is_ours(&self, conf_name: &str) -> bool {
        self.file == conf_name || self.plugin_is_ours()
    }

    /// Written by us, to the letter, under a name we no longer use. What an operator wrote around our plugin is not ours to
    /// remove.
    pub(super) fn is_stale(&self, dir: &Path, wanted: &super::Wanted) -> bool {
        self.file != wanted.conf_name && self.is_rendered(dir)
    }

    /// Written by us, to the letter; under our name also what can be read by nobody, as a write of ours that was cut short.
    pub(super) fn is_our_text(&self, dir: &Path, conf_name: &str) -> bool {
        (self.file == conf_name && self.content.is_err()) || self.is_rendered(dir)
    }

    fn is_rendered(&self, dir: &Path) -> bool {
        let text = || files::read_bounded(&dir.join(&self.file)).ok().flatten();
        self.plugin_is_ours() && text().is_some_and(|text| super::conflist::is_rendered(&text))
    }
}

/// Which file a runtime takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    Ours,
    /// Somebody else's.
    Other(Conf),
    Nothing,
}

/// What a runtime would take from `dir`.
pub fn choice(dir: &Path, conf_name: &str) -> anyhow::Result<Choice> {
    Ok(match read(dir)?.into_iter().next() {
        None => Choice::Nothing,
        Some(first) if first.plugin_is_ours() => Choice::Ours,
        Some(first) if first.file == conf_name => Choice::Other(Conf {
            content: first.content.and(Err("not what we wrote".into())),
            ..first
        }),
        Some(first) => Choice::Other(first),
    })
}

/// Whether runtimes read a file of this name.
pub(super) fn is_read_by_runtimes(name: &str) -> bool {
    // As Go's filepath.Ext: a name that begins with its only dot has an ending, too.
    matches!(name.rsplit_once('.'), Some((_, "conf" | "conflist" | "json")))
}

/// All configurations, in the order runtimes look at them.
pub(super) fn read(dir: &Path) -> anyhow::Result<Vec<Conf>> {
    let names = names(dir)?;
    let confs = names.into_iter().filter(|name| is_read_by_runtimes(name));
    let mut confs: Vec<Conf> = confs
        .map(|file| {
            let content = content(&dir.join(&file));
            Conf { file, content }
        })
        .collect();
    confs.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(confs)
}

/// Renames so that no runtime reads it. Answers what was done.
pub(super) fn disable(dir: &Path, conf: &Conf) -> anyhow::Result<String> {
    let to = format!("{}{DISABLED_SUFFIX}", conf.file);
    rename(dir, &conf.file, &to)?;
    Ok(format!("renamed {} ({}) to {to}", conf.file, conf.describe()))
}

/// Brings back what [`disable`] renamed. A file that somebody has put in its place stays.
pub(super) fn enable_all(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut done = Vec::new();
    for name in names(dir)? {
        let Some(before) = name.strip_suffix(DISABLED_SUFFIX) else { continue };
        if !dir.join(before).exists() {
            rename(dir, &name, before)?;
            done.push(format!("renamed {name} back to {before}"));
        }
    }
    Ok(done)
}

fn rename(dir: &Path, from: &str, to: &str) -> anyhow::Result<()> {
    std::fs::rename(dir.join(from), dir.join(to))
        .with_context(|| format!("rename {} to {to}", dir.join(from).display()))
}

fn names(dir: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {}", dir.display())),
    };
    let mut names = Vec::new();
    for entry in entries.take(FILES_MAX) {
        let entry = entry.with_context(|| format!("read {}", dir.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        // A name that is not UTF-8 is not ours, and a runtime sorts it by bytes all the same.
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Name of the network and type of its first plugin.
fn content(path: &Path) -> Result<(String, String), String> {
    let bytes = match files::read_bounded(path) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err("it is gone".into()),
        Err(error) => return Err(format!("{error:#}")),
    };
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let text = |value: &Value, name: &str| {
        value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let first = value.get("plugins").and_then(|plugins| plugins.get(0)).unwrap_or(&value);
    Ok((text(&value, "name"), text(first, "type")))
}
