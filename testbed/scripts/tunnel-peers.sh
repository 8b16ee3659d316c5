#!/usr/bin/env bash
# Builds the programs of others that `testbed/bench tunnel` measures beside ours, each once and kept, and prints one line
# for each: its name, a tab, and where it is. One that cannot be built here has `!` and the reason instead of a place,
# and the others go on. Versions stand in ../versions.sh; checksums of Go's modules and crates.io vouch for them.
#
#   tunnel-peers.sh [NAME...]     only these: wireguard-go boringtun gotatun nebula
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/../lib.sh"
. "$here/../versions.sh"
use_target_dir
tools=$CARGO_TARGET_DIR/tools
log=$(mktemp)
scratch=
trap 'rm -rf "$log" ${scratch:+"$scratch"}' EXIT

# The last thing a failed build said.
why() { printf '!%s' "$(grep -v '^ *$' "$log" | tail -1 | tr '\t' ' ')"; }

# One crate's program: CRATE VERSION PROGRAM. Renamed when whole: another run may be looking.
crate() {
    local folder=$tools/$1-$2
    if [ ! -x "$folder/$3" ]; then
        command -v cargo >/dev/null || { printf '!cargo is needed'; return; }
        mkdir -p "$tools"
        scratch=$(mktemp -d "$tools/.build.XXXXXX")
        say "building $1 $2"
        CARGO_TARGET_DIR=$scratch/target cargo install --quiet --locked --no-track --root "$scratch" "$1@$2" \
            >"$log" 2>&1 || { rm -rf "$scratch"; why; return; }
        mkdir -p "$folder"
        mv "$scratch/bin/$3" "$folder/$3"
        rm -rf "$scratch"
    fi
    printf '%s' "$folder/$3"
}

nebula() {
    local folder=$tools/nebula-$nebula_version module=github.com/slackhq/nebula/cmd program
    if [ ! -x "$folder/nebula" ] || [ ! -x "$folder/nebula-cert" ]; then
        command -v go >/dev/null || { printf '!Go is needed'; return; }
        mkdir -p "$tools"
        scratch=$(mktemp -d "$tools/.build.XXXXXX")
        say "building nebula $nebula_version"
        # The project's own folder has a go.mod: what is installed by version must not see it.
        (cd / && GOTOOLCHAIN=auto CGO_ENABLED=0 GOBIN=$scratch go install -trimpath \
            "$module/nebula@v$nebula_version" "$module/nebula-cert@v$nebula_version") >"$log" 2>&1 ||
            { rm -rf "$scratch"; why; return; }
        mkdir -p "$folder"
        for program in nebula-cert nebula; do mv "$scratch/$program" "$folder/$program"; done
        rm -rf "$scratch"
    fi
    printf '%s' "$folder/nebula"
}

wireguard_go() {
    "$here/wireguard-go.sh" 2>"$log" || why
}

[ $# -gt 0 ] || set -- wireguard-go boringtun gotatun nebula
for name in "$@"; do
    case $name in
        wireguard-go) place=$(wireguard_go) ;;
        boringtun) place=$(crate boringtun-cli "$boringtun_version" boringtun-cli) ;;
        gotatun) place=$(crate gotatun-cli "$gotatun_version" gotatun) ;;
        nebula) place=$(nebula) ;;
        *) die "there is no peer $name: wireguard-go boringtun gotatun nebula" ;;
    esac
    printf '%s\t%s\n' "$name" "$place"
done
