//! A program copied from the image to the host: the plugin, nft and its libraries.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;

use crate::files;

/// Largest program copied: ours has a few MiB, and something a hundred times that is a wrong path.
pub const BYTES_MAX: u64 = 256 << 20;

/// Makes `program` be in `dir` as `name`; true when it was not. Compared by content: a size alone would not show a torn
/// write of the same length.
pub fn keep(program: &Path, dir: &Path, name: &str) -> anyhow::Result<bool> {
    let wanted = files::read_up_to(program, BYTES_MAX)?
        .with_context(|| format!("{} is not in this image", program.display()))?;
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let path = dir.join(name);
    let runs = std::fs::metadata(&path).is_ok_and(|it| it.permissions().mode() & 0o111 == 0o111);
    if runs && files::read_up_to(&path, BYTES_MAX)?.as_ref() == Some(&wanted) {
        return Ok(false);
    }
    files::write_atomic(&path, &wanted, 0o755)?;
    Ok(true)
}
