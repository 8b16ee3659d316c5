//! Kernel settings below `/proc/sys`, of the calling thread's network namespace.
//!
//! `/proc/sys/net` shows the namespace of the task that opens it (`proc_sys` through `current->nsproxy`), so no mount
//! has to change.

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Where settings are read and written, unless [`set_root`] said otherwise.
const ROOT: &str = "/proc/sys";

static OTHER_ROOT: OnceLock<PathBuf> = OnceLock::new();

/// Another place of `/proc/sys`, for the life of the process: container runtimes mount theirs read-only. Once, before
/// anything is read; a second call changes nothing.
pub fn set_root(root: PathBuf) {
    OTHER_ROOT.get_or_init(|| root);
}

/// Reads `net/ipv4/ip_forward` and the like, without the trailing newline.
pub fn get(key: &str) -> io::Result<String> {
    let path = path(key)?;
    let text = std::fs::read_to_string(&path).map_err(|error| named(key, &error))?;
    Ok(text.trim_end().to_owned())
}

/// Sets a value; a value that stands already is not written again (read-only `/proc/sys` is fine then). `true`
/// when it changed.
pub fn set(key: &str, value: &str) -> io::Result<bool> {
    if get(key)? == value {
        return Ok(false);
    }
    std::fs::write(path(key)?, value).map_err(|error| named(key, &error))?;
    Ok(true)
}

/// Key of a per-interface setting: `for_interface("ipv4", "eth0.1", "rp_filter")`.
pub fn for_interface(family: &str, interface: &str, setting: &str) -> String {
    format!("net/{family}/conf/{interface}/{setting}")
}

/// Slashes separate, as in the file system: interface names may hold dots. Nothing leads outside.
fn path(key: &str) -> io::Result<PathBuf> {
    let odd = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
    if key.split('/').any(odd) {
        let text = format!("{key:?} is no kernel setting (write net/ipv4/ip_forward)");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(OTHER_ROOT.get().map_or_else(|| ROOT.into(), PathBuf::clone).join(key))
}

fn named(key: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("kernel setting {key}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_by_their_path() {
        assert!(matches!(get("net/ipv4/ip_forward").unwrap().as_str(), "0" | "1"));
        assert_eq!(for_interface("ipv6", "eth0.1", "accept_ra"), "net/ipv6/conf/eth0.1/accept_ra");
    }

    #[test]
    fn keys_cannot_leave_the_tree_of_settings() {
        for bad in ["../etc/passwd", "net/../../etc/passwd", "", "/etc/passwd", "net//ipv4"] {
            assert_eq!(get(bad).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad}");
        }
    }

    #[test]
    fn a_value_that_stands_is_not_written() {
        let value = get("net/ipv4/ip_forward").unwrap();
        assert!(!set("net/ipv4/ip_forward", &value).unwrap());
    }
}
