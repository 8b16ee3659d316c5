# Shared by the scripts that bring programs of others: each is got once and kept, and what cannot be had is said instead of a place.
# Sourced after lib.sh, never run.

use_target_dir
tools=$CARGO_TARGET_DIR/tools
log=$(mktemp)
# Where one is made; renamed from there when whole, as another run may be looking.
scratch=$tools/.build.$$
trap 'rm -rf "$log" "$scratch"' EXIT

# The last thing a failed step said.
why() { printf '!%s' "$(grep -v '^ *$' "$log" | tail -1 | tr '\t' ' ')"; }

# begin WHAT IS DONE: an empty $scratch.
begin() {
    rm -rf "$scratch"
    mkdir -p "$scratch"
    say "$1"
}

# failed: why, and nothing is left.
failed() {
    rm -rf "$scratch"
    why
}

# keep FOLDER PROGRAM...: the programs of this folder, which are files, are whole.
keep() {
    local folder=$1 program
    shift
    mkdir -p "$folder"
    for program in "$@"; do mv "$program" "$folder/${program##*/}"; done
    rm -rf "$scratch"
}

# print_places [NAME...]: a line for each, or for all of `peers`. The script's place_of NAME prints the place.
print_places() {
    local name place
    [ $# -gt 0 ] || set -- "${peers[@]}"
    for name in "$@"; do
        [[ " ${peers[*]} " == *" $name "* ]] || die "there is no peer $name: ${peers[*]}"
        place=$(place_of "$name")
        printf '%s\t%s\n' "$name" "$place"
    done
}
