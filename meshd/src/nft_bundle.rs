//! An nft program with everything it needs in one folder, so that a host needs none of its own and all of ours use one
//! version: two versions print the same rules differently, and each would take the other's for somebody's edit.
//!
//! ```text
//! image: /usr/sbin/nft ── PT_INTERP, what its loader lists ──> DIR/meshd-nft/{lib*.so*, ld.so, nft}     nft last
//! started as: DIR/meshd-nft/ld.so --library-path DIR/meshd-nft DIR/meshd-nft/nft
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::{files, program};

/// Libraries copied: nft has a dozen.
const LIBRARIES_MAX: usize = 64;

/// Makes the bundle of `nft` be in `dir`; true when something had to be written. `nft` itself comes last: who finds it,
/// finds all.
pub fn keep(nft: &Path, dir: &Path) -> anyhow::Result<bool> {
    let bytes = files::read_up_to(nft, program::BYTES_MAX)?
        .with_context(|| format!("there is no {}", nft.display()))?;
    let mut wrote = false;
    if let Some(loader) = interpreter(&bytes) {
        for (name, library) in libraries(&loader, nft)? {
            wrote |= program::keep(&library, dir, &name)?;
        }
        wrote |= program::keep(&loader, dir, netcfg::OWN_NFT_LOADER)?;
    }
    Ok(wrote | program::keep(nft, dir, "nft")?)
}

/// What the loader would load for `program`: the name it is asked for by, and where it is.
fn libraries(loader: &Path, program: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let output = Command::new(loader)
        .arg("--list")
        .arg(program)
        .output()
        .with_context(|| format!("start {}", loader.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{} lacks a library: {said}", program.display());
    Ok(listed(&said))
}

/// Lines like `libmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f…)`; others name the loader and the kernel's own.
fn listed(text: &str) -> Vec<(String, PathBuf)> {
    let library = |line: &str| {
        let (name, found) = line.trim().split_once(" => ")?;
        let (path, _) = found.rsplit_once(" (")?;
        let plain = !name.contains('/') && path.starts_with('/');
        plain.then(|| (name.to_owned(), PathBuf::from(path)))
    };
    text.lines().filter_map(library).take(LIBRARIES_MAX).collect()
}

/// The loader a dynamic program names, `PT_INTERP` of a little-endian 64-bit ELF (elf(5)); `None` for a static one.
fn interpreter(elf: &[u8]) -> Option<PathBuf> {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let raw = elf.get(at..at.checked_add(bytes)?)?;
        Some(raw.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(number(32, 8)?).ok()?;
    let (entry, count) = (number(54, 2)?, number(56, 2)?);
    (0..count).find_map(|index| {
        let at = table.checked_add(usize::try_from(index * entry).ok()?)?;
        if number(at, 4)? != u64::from(PT_INTERP) {
            return None;
        }
        let begin = usize::try_from(number(at.checked_add(8)?, 8)?).ok()?;
        let len = usize::try_from(number(at.checked_add(32)?, 8)?).ok()?;
        let text = elf.get(begin..begin.checked_add(len)?)?;
        let text = std::str::from_utf8(text).ok()?.trim_end_matches('\0');
        text.starts_with('/').then(|| PathBuf::from(text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read_and_what_it_does_not_load_left_out() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibmnl.so.0 => /lib/x/libmnl.so.0 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /lib64/ld-linux-x86-64.so.2 (0x7)\n\tlibgone.so => not found\n";
        assert_eq!(listed(text), [("libmnl.so.0".to_owned(), PathBuf::from("/lib/x/libmnl.so.0"))]);
    }

    #[test]
    fn what_is_no_program_names_no_loader_and_does_not_panic() {
        for bytes in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &[0xff; 200], b"\x7fELF\x02\x01"] {
            assert_eq!(interpreter(bytes), None);
        }
        let mut hostile = b"\x7fELF\x02\x01".to_vec();
        hostile.extend([0xff; 100]);
        assert_eq!(interpreter(&hostile), None);
    }

    #[test]
    fn a_bundle_runs_from_its_folder_alone_and_a_second_copy_writes_nothing() {
        let shell = Path::new("/bin/sh");
        let dir = tempfile::tempdir().expect("scratch");
        let bundle = dir.path().join("bundle");
        assert!(keep(shell, &bundle).expect("copied"));
        assert!(!keep(shell, &bundle).expect("again"));
        let loader = bundle.join(netcfg::OWN_NFT_LOADER);
        let output = Command::new(&loader)
            .arg("--library-path")
            .arg(&bundle)
            .arg(bundle.join("nft"))
            .args(["-c", "echo works"])
            .output()
            .expect("started");
        assert_eq!(output.stdout, b"works\n");
        std::fs::write(bundle.join("nft"), b"torn").expect("torn");
        assert!(keep(shell, &bundle).expect("repaired"));
    }
}
