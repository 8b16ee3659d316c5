//! nftables through its own program: one text, one transaction (nft(8)).
//!
//! `nft -f -` is the stable interface; the netlink one is not documented for others. The program works in the
//! network namespace of the calling thread.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, anyhow, bail};
use ipnet::IpNet;
use serde_json::Value;

/// Where `nft` may be besides `$PATH`: container runtimes call plugins with a short one.
const PLACES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Folder beside a program of ours on a host with the nft it uses: hosts need none of their own, and all of ours use the
/// same. A dynamic one has its loader and libraries there, too.
pub const OWN_NFT: &str = "meshd-nft";

/// Name of the loader in that folder.
pub const OWN_NFT_LOADER: &str = "ld.so";

/// The `nft` program: ours, beside this program; in the directories of `path` (the text of `$PATH`); where systems keep it.
pub fn find_program(path: &OsStr) -> Option<PathBuf> {
    let own = std::env::current_exe()
        .ok()
        .and_then(|program| find_in(std::iter::once(program.with_file_name(OWN_NFT))));
    own.or_else(|| find_in(std::env::split_paths(path).chain(PLACES.map(PathBuf::from))))
}

/// How to start it: through the loader beside it, where there is one.
fn command(program: &Path) -> Command {
    let folder = program.parent().unwrap_or(Path::new("/"));
    let loader = folder.join(OWN_NFT_LOADER);
    if !folder.ends_with(OWN_NFT) || !loader.is_file() {
        return Command::new(program);
    }
    let mut command = Command::new(loader);
    command.arg("--library-path").arg(folder).arg(program);
    command
}

/// Carries out a script, all of it or nothing.
pub(crate) fn run_script(script: &str) -> anyhow::Result<()> {
    run(&["-f", "-"], Some(script)).map(|_| ())
}

/// Runs `nft` with arguments and returns what it printed.
pub(crate) fn query(arguments: &[&str]) -> anyhow::Result<String> {
    run(arguments, None)
}

/// Deletes an `inet` table; `false` when there was none.
pub(crate) fn remove_table(table: &str) -> anyhow::Result<bool> {
    check_word(table)?;
    match run_script(&format!("delete table inet {table}\n")) {
        Ok(()) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Chains that drop what is forwarded unless one of their rules accepts it, as "family table chain": a firewall of the
/// system's, or Docker's. An accepting rule of ours cannot overrule one.
pub fn forwarding_closed() -> anyhow::Result<Vec<String>> {
    closed_chains(&query(&["-j", "list", "chains"]).context("list nftables chains")?)
}

fn closed_chains(text: &str) -> anyhow::Result<Vec<String>> {
    let document: Value = serde_json::from_str(text).context("read nft's JSON")?;
    let objects = document.get("nftables").and_then(Value::as_array);
    let closed = objects.into_iter().flatten().filter_map(|object| {
        let chain = object.get("chain")?;
        let field = |name: &str| chain.get(name).and_then(Value::as_str);
        let closed = field("hook")? == "forward"
            && field("policy")? == "drop"
            && matches!(field("family")?, "ip" | "ip6" | "inet");
        closed.then_some(format!("{} {} {}", field("family")?, field("table")?, field("name")?))
    });
    Ok(closed.collect())
}

/// Whether an error of this module says that the table, chain or set does not exist.
pub(crate) fn is_missing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<Missing>().is_some())
}

/// Elements of an interval set, or nothing for an empty one (which nft's grammar does not allow).
pub(crate) fn elements<'a>(prefixes: impl Iterator<Item = &'a IpNet>) -> String {
    let list: Vec<String> = prefixes.map(ToString::to_string).collect();
    if list.is_empty() { String::new() } else { format!(" elements = {{ {} }};", list.join(", ")) }
}

/// A name that goes into a script: nothing but what interface and table names of ours hold.
pub(crate) fn check_word(word: &str) -> anyhow::Result<()> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if word.is_empty() || !word.bytes().all(fine) {
        bail!("{word:?} cannot stand in an nftables rule: use letters, digits, '-', '_' and '.'");
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("nftables: no such table, chain or set")]
struct Missing;

fn run(arguments: &[&str], input: Option<&str>) -> anyhow::Result<String> {
    let program = find_program(&std::env::var_os("PATH").unwrap_or_default())
        .context("there is no nft program: install nftables (apt install nftables)")?;
    let child = command(&program)
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("LC_ALL", "C")
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    finish(child, arguments, input)
}

fn find_in(directories: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    let runs = |file: &PathBuf| {
        file.metadata().is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
    };
    // A relative directory would run what lies in the working directory.
    directories.filter(|it| it.is_absolute()).map(|it| it.join("nft")).find(runs)
}

fn finish(
    mut child: std::process::Child,
    arguments: &[&str],
    input: Option<&str>,
) -> anyhow::Result<String> {
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        // nft reads everything before it answers, so this cannot block on its output. One that gave up before it had
        // read all says why on its standard error: a broken pipe is no news, and the child has to be waited for always.
        if let Err(error) = stdin.write_all(text.as_bytes())
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            drop(stdin);
            let _ = child.wait();
            return Err(error).context("hand the script to nft");
        }
    }
    let output = child.wait_with_output().context("wait for nft")?;
    if output.status.success() {
        return String::from_utf8(output.stdout).context("read what nft printed");
    }
    let message = String::from_utf8_lossy(&output.stderr);
    // One that a signal ended says nothing itself.
    let first = match message.lines().next().map(str::trim) {
        Some(line) if !line.is_empty() => line.to_owned(),
        _ => output.status.to_string(),
    };
    Err(refused(&arguments.join(" "), input, &first))
}

/// What a refusal means. "No such file" has two meanings: what was asked for is not there, or, where something is
/// to be made, the kernel lacks what it is made of.
fn refused(arguments: &str, input: Option<&str>, first: &str) -> anyhow::Error {
    let missing = first.contains("No such file or directory");
    if missing && !input.is_some_and(makes_something) {
        return anyhow!(Missing).context(format!("nft {arguments}: {first}"));
    }
    if missing {
        return anyhow!(
            "nft {arguments} failed: {first} (kernel modules may be missing: modprobe nf_tables nft_nat nft_masq)"
        );
    }
    if first.contains("Operation not permitted") {
        return anyhow!("nft may not change the ruleset: run as root or with CAP_NET_ADMIN");
    }
    anyhow!("nft {arguments} failed: {first}")
}

/// Whether a script makes tables, chains or rules. Elements are only put into sets that are there.
fn makes_something(script: &str) -> bool {
    script.lines().any(|line| {
        ["add table", "add chain", "add set", "table "].iter().any(|word| line.starts_with(word))
    })
}

/// A stable 64-bit hash of text (FNV-1a with a finishing mix, splitmix64's): names objects, protects nothing.
pub(crate) fn hash(text: &str) -> u64 {
    hash_bytes(text.as_bytes())
}

/// As [`hash`], of bytes.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    /// A program in nft's place.
    fn stand_in(script: &str, input: &str) -> anyhow::Result<String> {
        let child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        finish(child, &["-f", "-"], Some(input))
    }

    #[test]
    fn what_an_nft_says_that_gave_up_early_is_told_instead_of_a_broken_pipe() {
        // More than a pipe holds.
        let script = "add table inet x\n".repeat(1 << 18);
        let error = stand_in("exec 0<&-; echo 'Error: out of order' >&2; exit 1", &script);
        assert!(format!("{:#}", error.unwrap_err()).contains("Error: out of order"));
    }

    #[test]
    fn what_ended_an_nft_that_says_nothing_is_told() {
        let error = stand_in("cat >/dev/null; kill -SEGV $$", "add table inet x\n").unwrap_err();
        assert!(format!("{error:#}").contains("failed: signal: 11 (SIGSEGV)"), "{error:#}");
        let error = stand_in("cat >/dev/null; exit 3", "add table inet x\n").unwrap_err();
        assert!(format!("{error:#}").contains("failed: exit status: 3"), "{error:#}");
    }

    #[test]
    fn chains_that_close_forwarding_are_named_whatever_else_is_listed() {
        let text = r#"{"nftables":[{"metainfo":{}},
            {"chain":{"family":"ip","table":"filter","name":"FORWARD","hook":"forward","policy":"drop"}},
            {"chain":{"family":"ip6","table":"filter","name":"FORWARD","hook":"forward","policy":"accept"}},
            {"chain":{"family":"inet","table":"fw","name":"in","hook":"input","policy":"drop"}},
            {"chain":{"family":"bridge","table":"b","name":"f","hook":"forward","policy":"drop"}},
            {"chain":{"family":"ip","table":"filter","name":"X"}},{"chain":7},"odd"]}"#;
        assert_eq!(closed_chains(text).unwrap(), ["ip filter FORWARD"]);
        assert_eq!(closed_chains("{}").unwrap(), [""; 0]);
        assert!(closed_chains("nonsense").is_err());
    }

    #[test]
    fn no_such_file_means_missing_only_where_nothing_is_made() {
        let first = "Error: Could not process rule: No such file or directory";
        assert!(is_missing(&refused("-j list set inet x y", None, first)));
        assert!(is_missing(&refused("-f -", Some("delete table inet x\n"), first)));
        assert!(is_missing(&refused("-f -", Some("add element inet x y { 1 }\n"), first)));
        let error = refused("-f -", Some("add table inet x\ntable inet x {\n}\n"), first);
        assert!(!is_missing(&error));
        assert!(error.to_string().contains("nft_masq"), "{error}");
    }

    #[test]
    fn a_program_is_found_where_it_can_be_run_and_not_in_a_relative_directory() {
        let name = format!("netcfg-nft-{}", std::process::id());
        let (dir, other) = (std::env::temp_dir().join(&name), PathBuf::from("."));
        fs::create_dir(&dir).unwrap();
        let file = dir.join("nft");
        let found = || find_in([other.clone(), dir.clone()].into_iter());
        let nothing = found();
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        let not_to_be_run = found();
        fs::set_permissions(&file, Permissions::from_mode(0o755)).unwrap();
        let there = found();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!((nothing, not_to_be_run, there), (None, None, Some(file)));
    }
}
