#!/usr/bin/env bash
# Builds containerd, its shim and client, and runc, and prints the folder they are in. Versions are pinned; the Go
# checksum database vouches for them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

containerd_version=v2.4.2
runc_version=v1.5.2

command -v go >/dev/null || die "Go is needed to build containerd: apt-get install golang-go"
use_target_dir
# Fetches the Go version a module asks for where the installed one is older.
export GOTOOLCHAIN=auto
folder=$CARGO_TARGET_DIR/tools/containerd-$containerd_version-runc-$runc_version

# install_one NAME PACKAGE ARGS...: renamed when whole, as another test may be looking.
install_one() {
    local name=$1 package=$2 scratch
    shift 2
    [ -x "$folder/$name" ] && return
    say "building $name"
    scratch=$(mktemp -d "$folder/.build.XXXXXX")
    GOBIN=$scratch go install -trimpath "$@" "$package" >&2 || die "building $package failed"
    mv "$scratch/$name" "$folder/$name"
    rmdir "$scratch"
}

mkdir -p "$folder"
for program in containerd containerd-shim-runc-v2 ctr; do
    CGO_ENABLED=0 install_one "$program" "github.com/containerd/containerd/v2/cmd/$program@$containerd_version" \
        -ldflags "-X github.com/containerd/containerd/v2/version.Version=$containerd_version"
done
# Without seccomp: the test's container asks for none, and the program then needs no C library.
CGO_ENABLED=1 install_one runc "github.com/opencontainers/runc@$runc_version" -tags "netgo osusergo" \
    -ldflags "-linkmode external -extldflags -static"
printf '%s\n' "$folder"
