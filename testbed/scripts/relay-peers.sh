#!/usr/bin/env bash
# Brings the relays of others that `testbed/bench relay` measures beside ours, each once and kept, and prints one line for
# each: its name, a tab, and where it is. One that cannot be had here has `!` and the reason instead of a place, and the
# others go on. Versions: Debian's coturn; derper's stands with its checksums in derp-load/go.mod.
#
#   relay-peers.sh [NAME...]     only these: coturn derper
#   relay-peers.sh --libraries   installs, as root, the libraries that coturn needs
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/../lib.sh"
. "$here/peers-lib.sh"
peers=(coturn derper)

# Unpacked, not installed: Debian's package would start a TURN server on this machine, now and at each boot. Only the
# libraries it needs are installed (--libraries).
coturn() {
    command -v apt-get >/dev/null || { printf '!only Debian packages it'; return; }
    local version folder
    version=$(apt-cache policy coturn 2>/dev/null | sed -n 's/^ *Candidate: *//p')
    case $version in
        '' | '(none)') apt-get update -qq >"$log" 2>&1 || true
            version=$(apt-cache policy coturn | sed -n 's/^ *Candidate: *//p') ;;
    esac
    case $version in '' | '(none)') printf '!Debian has no package coturn here'; return ;; esac
    folder=$tools/coturn-${version//[^a-zA-Z0-9.]/-}
    if [ ! -x "$folder/usr/bin/turnserver" ]; then
        begin "unpacking coturn $version"
        # apt's own user fetches, into a folder of its own.
        chmod 755 "$scratch"
        (cd "$scratch" && apt-get download -qq coturn && dpkg-deb -x coturn_*.deb unpacked) >"$log" 2>&1 ||
            { failed; return; }
        mv -T "$scratch/unpacked" "$folder"
        rm -rf "$scratch"
    fi
    if ldd "$folder/usr/bin/turnserver" | grep -q 'not found'; then
        printf '!its libraries are missing: %s --libraries installs them' "${0##*/}"
        return
    fi
    printf '%s' "$folder/usr/bin/turnserver"
}

# Installs what the package depends on, without what only its service needs. As root.
libraries() {
    apt-cache show coturn >/dev/null 2>&1 || apt-get update -qq >&2 || true
    local wanted
    wanted=$(apt-cache show coturn | sed -n 's/^Depends: *//p' | head -1 | tr ',' '\n' | grep '^ *lib' | paste -sd,)
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 satisfy -y -qq --no-install-recommends "$wanted" >&2
}

# The server, and the program of ours that drives it by its own client library.
derper() {
    command -v go >/dev/null || { printf '!Go is needed'; return; }
    cd "$here/derp-load"
    local version folder
    version=$(sed -n 's|^.*tailscale.com \(v[^ ]*\)$|\1|p' go.mod)
    folder=$tools/derper-$version-$(cat go.mod go.sum main.go | sha256sum | cut -c1-12)
    if [ ! -x "$folder/derper" ] || [ ! -x "$folder/derp-load" ]; then
        begin "building derper $version"
        # Go fetches the version of itself that the module asks for.
        (export GOTOOLCHAIN=auto CGO_ENABLED=0 GOFLAGS=-mod=readonly
            go build -trimpath -o "$scratch/derp-load" . &&
                go build -trimpath -o "$scratch/derper" tailscale.com/cmd/derper) >"$log" 2>&1 ||
            { failed; return; }
        keep "$folder" "$scratch/derp-load" "$scratch/derper"
    fi
    printf '%s' "$folder/derper"
}

place_of() { "$1"; }

case ${1:-} in
    --libraries) libraries ;;
    *) print_places "$@" ;;
esac
