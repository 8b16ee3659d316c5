//! What the core must never pull in.

use std::process::Command;

#[test]
fn the_core_depends_on_no_runtime_socket_netlink_kubernetes_or_engine_crate() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let tree = Command::new(cargo)
        .args(["tree", "-p", "mesh-core", "-e", "normal", "--offline", "--prefix", "none"])
        .args(["--format", "{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8(tree.stdout).expect("text");
    let names: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"mesh-types"), "the tree was not read: {text}");
    let refused =
        ["boringtun", "tokio", "kube", "socket2", "rustix", "libc", "nix", "mio", "wg-engine"];
    for name in names {
        assert!(
            !refused.contains(&name) && !name.starts_with("netlink"),
            "mesh-core pulls in {name}"
        );
    }
}
