# Shared by the scripts of this folder: become root, install what is missing, find cargo.
# Sourced, never run. Everything it says goes to stderr: stdout belongs to the programs.

root_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# nft and its like live where the PATH of a plain user does not look.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# become_root SCRIPT ARGS...: namespaces need root; run the script again through sudo where we are not. sudo would
# replace PATH by its own, and with it lose the caller's cargo and go; and a network behind a proxy needs its name.
become_root() {
    [ "$(id -u)" -eq 0 ] && return
    command -v sudo >/dev/null || die "this needs root and there is no sudo: run it as root"
    local name kept=("PATH=$PATH")
    for name in CI MESHD_KUBE_LOGS MESHD_DIST_REVISION SOURCE_DATE_EPOCH CARGO_HOME RUSTUP_HOME CARGO_TARGET_DIR \
        GOPROXY GOSUMDB SSL_CERT_FILE \
        http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY; do
        [ -z "${!name:-}" ] || kept+=("$name=${!name}")
    done
    exec sudo -- env "${kept[@]}" bash "$@"
}

# choose_builder: who builds, after use_target_dir. What root builds in somebody's checkout, they could neither rebuild
# nor remove: so it is whoever called sudo, unless the build folder is not theirs to write.
choose_builder() {
    builder_home=
    [ "$(id -u)" -eq 0 ] && [ "${SUDO_UID:-0}" -ne 0 ] || return 0
    builder_home=$(getent passwd "$SUDO_UID" | cut -d: -f6) || true
    as_builder sh -c 'mkdir -p "$1" && [ -w "$1" ]' sh "$CARGO_TARGET_DIR" 2>/dev/null || builder_home=
}

# as_builder COMMAND ARGS...: runs it as whoever builds, with their home.
as_builder() {
    if [ -z "${builder_home:-}" ]; then
        "$@"
        return
    fi
    setpriv --reuid "$SUDO_UID" --regid "$SUDO_GID" --init-groups -- \
        env -u SUDO_UID -u SUDO_GID -u SUDO_USER -u SUDO_COMMAND \
        HOME="$builder_home" USER="${SUDO_USER:-}" LOGNAME="${SUDO_USER:-}" \
        PATH="${CARGO_HOME:-$builder_home/.cargo}/bin:$PATH" "$@"
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
    # The caller's locale may not exist yet.
    local -x DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
    # A repository of somebody else's that is broken must not keep us from Debian's own.
    apt-get update -qq >&2 || say "apt-get update failed; trying with the package lists that are there"
    # A machine that has just been set up may be upgrading itself: wait for it.
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        die "could not install ${missing[*]}: is the network up?"
}

# need_rust: cargo of the version rust-toolchain.toml names or newer, for who builds; by rustup (Debian's where it is
# packaged, else the Rust project's own installer) where there is none or only an older one.
need_rust() {
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    local channel
    channel=$(sed -n 's/^channel = "\(.*\)"$/\1/p' "$root_dir/rust-toolchain.toml")
    if ! has rustup && ! cargo_is_at_least "$channel"; then
        if ! has cargo && apt-cache show rustup >/dev/null 2>&1; then
            need_packages rustup
        else
            need_packages curl ca-certificates
            say "installing Rust by rustup"
            curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
                as_builder sh -s -- -y --no-modify-path --profile minimal --default-toolchain none >&2 ||
                die "rustup failed"
        fi
    fi
    if has rustup; then
        as_builder rustup toolchain list | grep "^$channel-" >/dev/null ||
            as_builder rustup toolchain install "$channel" --profile minimal -c rustfmt -c clippy >&2 ||
            die "rustup could not install Rust $channel"
    fi
    cargo_is_at_least "$channel" || die "cargo $channel or newer is needed"
}

# has PROGRAM: whether who builds finds it.
has() { as_builder sh -c 'command -v "$1" >/dev/null' sh "$1"; }

cargo_is_at_least() {
    local have
    have=$(cd "$root_dir" && as_builder cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
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
    have=$(as_builder go env GOVERSION 2>/dev/null) || return 1
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
    # cargo runs in the project's folder, the caller may have meant their own.
    case $CARGO_TARGET_DIR in /*) ;; *) CARGO_TARGET_DIR=$PWD/$CARGO_TARGET_DIR ;; esac
    export CARGO_TARGET_DIR
    forget_other_checkout
}

# A build folder that checkouts share: cargo tells their crates apart by nothing but the time of their files, so what was built
# from another checkout since these files were written would pass for built from them. It forgets our own crates, not the
# others, when the checkout is another than the last.
forget_other_checkout() {
    local record=$CARGO_TARGET_DIR/checkout names
    case $CARGO_TARGET_DIR/ in "$root_dir"/*) return 0 ;; esac
    # The scripts that this one calls need not look again.
    [ "${MESHD_CHECKOUT:-}" != "$root_dir" ] || return 0
    export MESHD_CHECKOUT=$root_dir
    [ -d "$CARGO_TARGET_DIR" ] && [ "$(cat "$record" 2>/dev/null)" != "$root_dir" ] || return 0
    names=$(find "$root_dir" -name target -prune -o -name Cargo.toml -exec sed -n 's/^name = "\(.*\)"$/\1/p' {} +) || return 1
    find "$CARGO_TARGET_DIR" -maxdepth 5 -type d -name .fingerprint | while read -r folder; do
        # The name, a dash and a hash of 16 digits.
        for name in $names; do rm -rf "$folder/$name"-????????????????; done
    done
    printf '%s\n' "$root_dir" >"$record.$$" && mv -f "$record.$$" "$record"
}

# What building and the lab need.
base_packages=(gcc libc6-dev ca-certificates git iproute2 nftables procps)
