# Shared by the scripts of this folder: become root, install what is missing, find cargo.
# Sourced, never run. Everything it says goes to stderr: stdout belongs to the programs.

root_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# become_root SCRIPT ARGS...: namespaces need root; run the script again through sudo where we are not.
become_root() {
    [ "$(id -u)" -eq 0 ] && return
    command -v sudo >/dev/null || die "this needs root and there is no sudo: run it as root"
    exec sudo --preserve-env=CI,MESHD_KUBE_LOGS,PATH,HOME,CARGO_HOME,RUSTUP_HOME,CARGO_TARGET_DIR "$@"
}

# need_packages NAME...: installs the Debian packages that are not there yet.
need_packages() {
    local missing=() name
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "please install: ${missing[*]}"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2 || die "apt-get update failed: is the network up?"
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 || die "could not install ${missing[*]}"
}

# need_rust: cargo of the version rust-toolchain.toml names or newer; by rustup (Debian's where it is packaged, else the
# Rust project's own installer) where there is none or only an older one.
need_rust() {
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    local channel
    channel=$(sed -n 's/^channel = "\(.*\)"$/\1/p' "$root_dir/rust-toolchain.toml")
    if ! command -v rustup >/dev/null && ! cargo_is_at_least "$channel"; then
        if ! command -v cargo >/dev/null && apt-cache show rustup >/dev/null 2>&1; then
            need_packages rustup
        else
            need_packages curl ca-certificates
            say "installing Rust by rustup"
            curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
                sh -s -- -y --no-modify-path --profile minimal --default-toolchain none >&2 || die "rustup failed"
        fi
    fi
    if command -v rustup >/dev/null; then
        rustup toolchain list | grep -q "^$channel-" ||
            rustup toolchain install "$channel" --profile minimal -c rustfmt -c clippy >&2 ||
            die "rustup could not install Rust $channel"
    fi
    cargo_is_at_least "$channel" || die "cargo $channel or newer is needed"
}

cargo_is_at_least() {
    local have
    have=$(cd "$root_dir" && cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$1" "$have" | sort -V | head -1)" = "$1" ]
}

# need_go: Go that fetches the version a module asks for by itself (1.21 or newer), for the peers our tests run against.
need_go() {
    go_fetches_toolchains || need_packages golang-go
    go_fetches_toolchains ||
        die "Go 1.21 or newer is needed (Debian 12 packages an older one: install a newer Go, or use Debian 13)"
}

go_fetches_toolchains() {
    local have
    have=$(go env GOVERSION 2>/dev/null) || return 1
    [ "$(printf '%s\n' go1.21 "${have%% *}" | sort -V | head -1)" = go1.21 ]
}

# Where builds go. CI runs in a fresh clone each time: there the build folder is kept beside it, so that a
# machine that has built before only builds what changed.
use_target_dir() {
    if [ -z "${CARGO_TARGET_DIR:-}" ]; then
        if [ "${CI:-}" = true ]; then
            CARGO_TARGET_DIR=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/meshd/target
        else
            CARGO_TARGET_DIR=$root_dir/target
        fi
    fi
    export CARGO_TARGET_DIR
}

# What building and the lab need.
base_packages=(gcc libc6-dev ca-certificates git iproute2 nftables procps)
