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
. "$here/peers-lib.sh"
peers=(wireguard-go boringtun gotatun nebula)

# One crate's program: CRATE VERSION PROGRAM.
crate() {
    local folder=$tools/$1-$2
    if [ ! -x "$folder/$3" ]; then
        command -v cargo >/dev/null || { printf '!cargo is needed'; return; }
        begin "building $1 $2"
        CARGO_TARGET_DIR=$scratch/target cargo install --quiet --locked --no-track --root "$scratch" "$1@$2" \
            >"$log" 2>&1 || { failed; return; }
        keep "$folder" "$scratch/bin/$3"
    fi
    printf '%s' "$folder/$3"
}

nebula() {
    local folder=$tools/nebula-$nebula_version module=github.com/slackhq/nebula/cmd
    if [ ! -x "$folder/nebula" ] || [ ! -x "$folder/nebula-cert" ]; then
        command -v go >/dev/null || { printf '!Go is needed'; return; }
        begin "building nebula $nebula_version"
        # The project's own folder has a go.mod: what is installed by version must not see it.
        (cd / && GOTOOLCHAIN=auto CGO_ENABLED=0 GOBIN=$scratch go install -trimpath \
            "$module/nebula@v$nebula_version" "$module/nebula-cert@v$nebula_version") >"$log" 2>&1 ||
            { failed; return; }
        keep "$folder" "$scratch/nebula-cert" "$scratch/nebula"
    fi
    printf '%s' "$folder/nebula"
}

wireguard_go() {
    "$here/wireguard-go.sh" 2>"$log" || why
}

place_of() {
    case $1 in
        wireguard-go) wireguard_go ;;
        boringtun) crate boringtun-cli "$boringtun_version" boringtun-cli ;;
        gotatun) crate gotatun-cli "$gotatun_version" gotatun ;;
        nebula) nebula ;;
    esac
}

print_places "$@"
