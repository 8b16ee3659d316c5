#!/usr/bin/env bash
# Builds the WireGuard project's own Go implementation, the peer our interoperation tests talk to, and prints where
# it is. The version is pinned, with checksums, in wireguard-go/go.mod beside this script.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

command -v go >/dev/null || die "Go is needed to build wireguard-go: apt-get install golang-go"
use_target_dir
module=golang.zx2c4.com/wireguard
cd "$root_dir/testbed/scripts/wireguard-go"
version=$(sed -n "s|^.*$module \(v[^ ]*\).*$|\1|p" go.mod)
[ -n "$version" ] || die "go.mod names no version of $module"
program=$CARGO_TARGET_DIR/tools/wireguard-go-$version
if [ ! -x "$program" ]; then
    mkdir -p "$(dirname "$program")"
    say "building wireguard-go $version"
    # Renamed when whole: another test may be looking.
    CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -o "$program.$$" "$module" >&2 || die "go build failed"
    mv "$program.$$" "$program"
fi
printf '%s\n' "$program"
