#!/usr/bin/env bash
# Builds the CNI project's own command line runtime, the standard plugins that chain behind ours and those we are
# measured against, and prints the folder they are in. Their versions stand in ../versions.sh; the Go checksum database
# vouches for them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../versions.sh"

command -v go >/dev/null || die "Go is needed to build the CNI tools: apt-get install golang-go"
use_target_dir
# Fetches the Go version a module asks for where the installed one is older.
export GOTOOLCHAIN=auto
folder=$CARGO_TARGET_DIR/tools/cni-$cnitool_version-$cni_plugins_version

# Renamed when whole: another test may be looking.
install_one() {
    local name=$1 package=$2 scratch
    [ -x "$folder/$name" ] && return
    say "building $name"
    scratch=$(mktemp -d "$folder/.build.XXXXXX")
    CGO_ENABLED=0 GOBIN=$scratch go install -trimpath "$package" >&2 || die "building $package failed"
    mv "$scratch/$name" "$folder/$name"
    rmdir "$scratch"
}

mkdir -p "$folder"
install_one cnitool "github.com/containernetworking/cni/cnitool@v$cnitool_version"
for plugin in meta/portmap meta/bandwidth main/loopback main/bridge ipam/host-local; do
    install_one "$(basename "$plugin")" "github.com/containernetworking/plugins/plugins/$plugin@v$cni_plugins_version"
done
printf '%s\n' "$folder"
