#!/usr/bin/env bash
# Builds containerd, its shim and client, and runc, and prints the folder they are in. Their versions stand in
# ../versions.sh; the Go checksum database vouches for them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../versions.sh"

command -v go >/dev/null || die "Go is needed to build containerd: apt-get install golang-go"
use_target_dir
# Fetches the Go version a module asks for where the installed one is older.
export GOTOOLCHAIN=auto
folder=$CARGO_TARGET_DIR/tools/containerd-$containerd_version-runc-$runc_version-seccomp

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
    CGO_ENABLED=0 install_one "$program" "github.com/containerd/containerd/v2/cmd/$program@v$containerd_version" \
        -ldflags "-X github.com/containerd/containerd/v2/version.Version=v$containerd_version"
done
# With seccomp, which every pod of a kubelet asks for; static, so that it runs wherever its folder is mounted.
[ -x "$folder/runc" ] || need_packages gcc libc6-dev pkg-config libseccomp-dev
CGO_ENABLED=1 install_one runc "github.com/opencontainers/runc@v$runc_version" -tags "seccomp netgo osusergo" \
    -ldflags "-linkmode external -extldflags -static"
printf '%s\n' "$folder"
