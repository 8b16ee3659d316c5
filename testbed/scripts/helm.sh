#!/usr/bin/env bash
# Builds Helm, which renders, checks and installs our chart, and prints where it is. The version is pinned; the Go
# checksum database vouches for it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
. "$root_dir/testbed/versions.sh"

command -v go >/dev/null || die "Go is needed to build Helm: apt-get install golang-go"
use_target_dir
# Fetches the Go version a module asks for where the installed one is older.
export GOTOOLCHAIN=auto
# Where kubernetes.sh has it, too.
folder=$CARGO_TARGET_DIR/tools/helm-$helm_version
program=$folder/helm
if [ ! -x "$program" ]; then
    mkdir -p "$folder"
    say "building Helm $helm_version"
    scratch=$(mktemp -d "$folder/.build.XXXXXX")
    CGO_ENABLED=0 GOBIN=$scratch go install -trimpath "helm.sh/helm/v4/cmd/helm@v$helm_version" >&2 ||
        die "building Helm failed"
    # Renamed when whole: another test may be looking.
    mv "$scratch/helm" "$program"
    rmdir "$scratch"
fi
printf '%s\n' "$program"
