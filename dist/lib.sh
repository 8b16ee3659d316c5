# Shared by the scripts of this folder: versions, tools, and what an image is made of. Sourced, never run.

. "$(dirname "${BASH_SOURCE[0]}")/../testbed/lib.sh"

dist_dir=$root_dir/dist
image_name=meshd.dev/meshd
# In the image; and with them in the archives, for people.
programs=(meshd meshd-cni keyrelay)
released=("${programs[@]}" kubectl-mesh)
# What build_programs builds.
wanted=("${released[@]}")

# Architectures as container images and Debian name them, and the names others have for them.
architectures=(amd64 arm64)
declare -A rust_target=([amd64]=x86_64-unknown-linux-musl [arm64]=aarch64-unknown-linux-musl)
declare -A library_folder=([amd64]=x86_64-linux-gnu [arm64]=aarch64-linux-gnu)
declare -A loader=([amd64]=/lib64/ld-linux-x86-64.so.2 [arm64]=/lib/ld-linux-aarch64.so.1)

# nft and the libraries it is linked with, from the Debian release below: package and file. Its packages have no static
# libraries to link it with, so it brings its loader; dist/test checks that nothing is missing and nothing is too much.
#
# Several versions of nft meet on a node: ours, the host's, kube-proxy's. Each looks at all tables, and nft 1.0 dies of many sets
# that nft 1.1 makes. So ours has to be 1.1, and our own tables hold no such sets. dist/test tries ours with these releases'.
debian_suite=trixie
met_suites=(bookworm trixie)
nft_files=(
    nftables:nft libnftables1:libnftables.so.1 libnftnl11:libnftnl.so.11 libmnl0:libmnl.so.0 libjansson4:libjansson.so.4
    libgmp10:libgmp.so.10 libxtables12:libxtables.so.12 libedit2:libedit.so.2 libtinfo6:libtinfo.so.6
    libbsd0:libbsd.so.0 libmd0:libmd.so.0 libc6:libc.so.6 libc6:loader
)

# prepare SCRIPT ARGS...: installs what is missing, as root, then goes on as whoever builds. Returns when that is done.
prepare() {
    [ -z "${MESHD_DIST_PREPARED:-}" ] || return 0
    local packages=(gcc libc6-dev git ca-certificates curl jq binutils xz-utils python3 python3-venv debian-archive-keyring)
    dpkg-query -W "${packages[@]}" >/dev/null 2>&1 || become_root "$@"
    use_target_dir
    choose_builder
    need_packages "${packages[@]}"
    need_rust
    [ ! -d "$root_dir/helm/meshd" ] || need_go
    export MESHD_DIST_PREPARED=1
    as_builder bash "$@"
    exit
}

# One build at a time in a build folder.
alone() {
    mkdir -p "$CARGO_TARGET_DIR/dist"
    exec 9>"$CARGO_TARGET_DIR/dist/lock"
    flock --nonblock 9 || { say "waiting for another build to end"; flock 9; }
}

version() { sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' "$root_dir/Cargo.toml"; }

# Of this tree, whoever owns it: root runs the tests in somebody's checkout.
git_here() { git -c safe.directory='*' -C "$root_dir" "$@"; }

# The commit and its time go into what is made. Without git, the caller knows them; with $loose set, nobody needs to.
know_revision() {
    if [ -z "${MESHD_DIST_REVISION:-}" ]; then
        if MESHD_DIST_REVISION=$(git_here rev-parse HEAD 2>/dev/null); then
            if [ -n "$(git_here status --porcelain)" ]; then
                say "warning: there are changes that are not committed; the revision says so"
                MESHD_DIST_REVISION+=-modified
            fi
        elif [ -n "${loose:-}" ]; then
            say "warning: this is no git checkout; the revision says so"
            MESHD_DIST_REVISION=$(printf '%040d' 0)-modified
            : "${SOURCE_DATE_EPOCH:=$(stat --format=%Y "$root_dir/Cargo.lock")}"
        else
            die "this is no git checkout: set MESHD_DIST_REVISION and SOURCE_DATE_EPOCH"
        fi
    fi
    [ -n "${SOURCE_DATE_EPOCH:-}" ] || SOURCE_DATE_EPOCH=$(git_here log -1 --format=%ct 2>/dev/null) ||
        die "set SOURCE_DATE_EPOCH to the time of the release, in seconds since 1970"
    export MESHD_DIST_REVISION SOURCE_DATE_EPOCH
}

# need_cross: the compilers for the architectures to build.
need_cross() {
    local folder part architecture target
    folder=$CARGO_TARGET_DIR/tools/cross-$(sha256sum "$dist_dir/python.lock" | cut -c1-12)
    if [ ! -x "$folder/bin/cargo-zigbuild" ]; then
        say "installing cargo-zigbuild and Zig"
        # A virtual environment knows its own path: it cannot be renamed when whole. Its programs come last.
        part=$folder/.part
        rm -rf "$folder"
        mkdir -p "$folder"
        : >"$part"
        python3 -m venv "$folder" >&2 || die "python3 -m venv failed: apt-get install python3-venv"
        "$folder/bin/pip" install --quiet --require-hashes --only-binary :all: --no-deps -r "$dist_dir/python.lock" >&2 || {
            rm -rf "$folder"
            die "pip could not install what dist/python.lock names: is the Python package index reachable?"
        }
        rm "$part"
    fi
    [ ! -e "$folder/.part" ] || die "another build installs Zig just now, or one was cut off: remove $folder"
    export PATH=$folder/bin:$PATH CARGO_ZIGBUILD_ZIG_PATH=$folder/bin/python-zig
    for architecture in "$@"; do
        target=${rust_target[$architecture]}
        (cd "$root_dir" && [ -d "$(rustc --print target-libdir --target "$target")" ]) && continue
        has rustup || die "Rust's standard library for $target is missing, and there is no rustup to add it"
        (cd "$root_dir" && rustup target add "$target" >&2) || die "rustup could not add $target"
    done
}

# profile_of ARCHITECTURE: how its programs are built. With $loose set, those that only an emulator starts are built in a
# fraction of the time.
profile_of() {
    if [ -n "${loose:-}" ] && [ "$1" != "$(dpkg --print-architecture)" ]; then echo emulated; else echo release; fi
}

# programs_of ARCHITECTURE: the folder they are built into.
programs_of() { printf '%s/%s/%s\n' "$build_dir" "${rust_target[$1]}" "$(profile_of "$1")"; }

# build_programs ARCHITECTURE...: the release's programs. No path of this machine gets into them: the compiler writes other
# ones instead.
build_programs() {
    local architecture profile
    need_cross "$@"
    for profile in release emulated; do
        local targets=()
        for architecture in "$@"; do
            [ "$(profile_of "$architecture")" != "$profile" ] || targets+=("$architecture")
        done
        [ ${#targets[@]} -eq 0 ] || build_profile "$profile" "${targets[@]}"
    done
}

# build_profile PROFILE ARCHITECTURE...
build_profile() {
    local profile=$1 architecture name arguments=()
    shift
    for architecture in "$@"; do arguments+=(--target "${rust_target[$architecture]}"); done
    for name in "${programs[@]}"; do arguments+=(-p "$name"); done
    for name in "${wanted[@]}"; do arguments+=(--bin "$name"); done
    say "building for $*, profile $profile"
    (
        cd "$root_dir"
        # Flags of the caller's own would make other programs. The time is in none of them, and would have half of them
        # built again for every commit.
        unset RUSTFLAGS SOURCE_DATE_EPOCH
        export CARGO_TARGET_DIR=$build_dir CARGO_TERM_COLOR=never
        export CARGO_ENCODED_RUSTFLAGS="" RUSTC_WRAPPER=$dist_dir/rustc MESHD_DIST_ROOT=$root_dir
        nice cargo zigbuild --profile "$profile" --locked --quiet "${arguments[@]}" >&2
    ) || die "the build failed"
}

# apt_apart COMMAND...: apt-get or apt-cache with lists of its own: the suite and architectures we want, from the mirror
# this machine uses, with Debian's signatures checked. What the machine has installed is neither asked nor changed.
apt_apart() {
    local apt=$CARGO_TARGET_DIR/tools/debian/apt-$debian_suite mirror
    if [ ! -e "$apt/fresh.$$" ]; then
        # The mirror of the system's own packages, whatever release it has.
        mirror=$(LC_ALL=C apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
            sed -n 's/^Debian Debian //p' | sort | uniq -c | sort -rn | sed -n '1s/^ *[0-9]* //p')
        [ -n "$mirror" ] || die "apt knows no Debian mirror: run apt-get update, or build on Debian"
        mkdir -p "$apt"/{state/lists/partial,cache/archives/partial}
        rm -f "$apt"/fresh.*
        : >"$apt/state/status"
        cat >"$apt/debian.sources" <<-END
			Types: deb
			URIs: $mirror
			Suites: $debian_suite
			Components: main
			Architectures: ${architectures[*]}
			Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
		END
        cat >"$apt/apt.conf" <<-END
			APT::Architecture "${architectures[0]}";
			APT::Architectures { $(printf '"%s"; ' "${architectures[@]}") };
			APT::Sandbox::User "";
			Acquire::Languages "none";
			Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
			Acquire::Retries "3";
			Dir::Etc::SourceList "$apt/debian.sources";
			Dir::Etc::SourceParts "/dev/null";
			Dir::State "$apt/state";
			Dir::State::status "$apt/state/status";
			Dir::Cache "$apt/cache";
		END
        APT_CONFIG=$apt/apt.conf apt-get update -qq >&2 || die "apt-get update for $debian_suite failed: is the mirror reachable?"
        : >"$apt/fresh.$$"
    fi
    APT_CONFIG=$apt/apt.conf "$@"
}

# debian_package ARCHITECTURE NAME: prints where the package file is that dist/debian.lock names; fetched once.
# With $loose set, what Debian has now serves where it has replaced that version.
debian_package() {
    local architecture=$1 name=$2 version digest file scratch
    read -r version digest < <(awk -v a="$architecture" -v n="$name" '$1 == a && $2 == n { print $3, $4 }' \
        "$dist_dir/debian.lock") || die "dist/debian.lock does not name $name for $architecture"
    file=$CARGO_TARGET_DIR/tools/debian/${name}_${architecture}_${digest:0:16}.deb
    if [ ! -e "$file" ]; then
        mkdir -p "${file%/*}"
        rm -rf "${file%/*}"/.get.*
        scratch=$(mktemp -d "${file%/*}/.get.XXXXXX")
        if (cd "$scratch" && apt_apart apt-get download -qq "$name:$architecture=$version" >&2); then
            echo "$digest  $(echo "$scratch"/*.deb)" | sha256sum --check --quiet >&2 ||
                die "$name $version for $architecture is not what dist/debian.lock says: refused"
        elif [ -n "${loose:-}" ]; then
            say "warning: Debian has replaced $name $version; taking its newer one. A release needs dist/build --update"
            (cd "$scratch" && apt_apart apt-get download -qq "$name:$architecture" >&2) ||
                die "could not fetch $name for $architecture: is the mirror reachable?"
            # Under no name that says it were the locked one.
            file=$CARGO_TARGET_DIR/tools/debian/newer-$(basename "$scratch"/*.deb)
        else
            die "could not fetch $name $version for $architecture. Where Debian has replaced it: dist/build --update, look at what changed, commit"
        fi
        mv "$scratch"/*.deb "$file"
        rmdir "$scratch"
    fi
    printf '%s\n' "$file"
}

# package_of SUITE ARCHITECTURE NAME: prints where the package file is that this release of Debian had when it was first asked
# for: for tests, nothing of it is released.
package_of() {
    local debian_suite=$1 architecture=$2 name=$3 folder=$CARGO_TARGET_DIR/tools/debian/$1 scratch
    if ! compgen -G "$folder/${name}_*_$architecture.deb" >/dev/null; then
        mkdir -p "$folder"
        scratch=$(mktemp -d "$folder/.get.XXXXXX")
        (cd "$scratch" && apt_apart apt-get download -qq "$name:$architecture" >&2) ||
            die "could not fetch $name of $debian_suite: is the mirror reachable?"
        mv "$scratch"/*.deb "$folder"
        rmdir "$scratch"
    fi
    compgen -G "$folder/${name}_*_$architecture.deb"
}

# collect_nft ARCHITECTURE FOLDER [SUITE]: nft's files as they lie in the image, and the licences of their packages in
# FOLDER/../nft-copyright. Those of dist/debian.lock, or of another release.
collect_nft() {
    local architecture=$1 folder=$2 fetch=(debian_package) unpacked pair package name libraries file from to
    [ -z "${3:-}" ] || fetch=(package_of "$3")
    libraries=usr/lib/${library_folder[$architecture]}
    unpacked=$(mktemp -d)
    rm -rf "$folder"
    mkdir -p "$folder/usr/sbin" "$folder/$libraries" "$folder$(dirname "${loader[$architecture]}")"
    for pair in "${nft_files[@]}"; do
        package=${pair%%:*} name=${pair##*:}
        file=$("${fetch[@]}" "$architecture" "$package") || exit
        [ -d "$unpacked/$package" ] || dpkg-deb -x "$file" "$unpacked/$package" || die "could not unpack $file"
        case $name in
            nft) from=usr/sbin/nft to=/usr/sbin/nft ;;
            loader) from=$libraries/$(basename "${loader[$architecture]}") to=${loader[$architecture]} ;;
            *) from=$libraries/$name to=/$libraries/$name ;;
        esac
        # Debian 12 has the libraries of its first packages in /lib still.
        [ -e "$unpacked/$package/$from" ] || from=${from#usr/}
        # Links are followed: the image has none.
        cp --dereference "$unpacked/$package/$from" "$folder$to" || die "$package has no $from"
    done
    # The image names its programs' licences; these are nft's.
    for package in "$unpacked"/*; do
        printf '==== %s\n\n' "${package##*/}"
        cat "$package"/usr/share/doc/*/copyright
        echo
    done >"$(dirname "$folder")/nft-copyright"
    rm -rf "$unpacked"
}

# make_context FOLDER ARCHITECTURE...: everything the Containerfile copies.
make_context() {
    local folder=$1 architecture name
    shift
    for architecture in "$@"; do
        rm -rf "${folder:?}/$architecture"
        mkdir -p "$folder/$architecture"
        for name in "${programs[@]}"; do
            cp "$(programs_of "$architecture")/$name" "$folder/$architecture/$name"
        done
        collect_nft "$architecture" "$folder/$architecture/nft"
    done
}

# make_image CONTEXT FILE ARCHITECTURE...: prints the image's digest.
make_image() {
    local context=$1 file=$2 architecture platforms=()
    shift 2
    for architecture in "$@"; do platforms+=(--platform "$architecture"); done
    "$CARGO_TARGET_DIR/debug/image-builder" --file "$root_dir/Containerfile" --context "$context" \
        --name "$image_name:$(version)" --epoch "$SOURCE_DATE_EPOCH" --arg "VERSION=$(version)" \
        --arg "REVISION=$MESHD_DIST_REVISION" "${platforms[@]}" "$file" || die "could not make $file"
}

build_image_builder() {
    # Of the whole workspace, or its crates would be built with other features than for everything else.
    (cd "$root_dir" && nice cargo build --quiet --locked --workspace --bin image-builder >&2) ||
        die "building image-builder failed"
}
