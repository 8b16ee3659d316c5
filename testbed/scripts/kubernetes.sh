#!/usr/bin/env bash
# Builds everything a Kubernetes cluster is made of and prints the folder all of it is in: the Kubernetes programs, etcd,
# containerd with its shim and client, runc, Helm, CoreDNS, the CNI project's plugins and a pause program. The versions stand in
# ../versions.sh; the modules' go.sum files and the Go checksum database vouch for them. The first build takes about
# ten minutes on two cores, later ones nothing.
#
#   kubernetes.sh            build what is missing, print the folder
#   kubernetes.sh --update   write the versions of versions.sh into the go.mod files
set -euo pipefail
scripts=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$scripts/../lib.sh"
. "$scripts/../versions.sh"

command -v go >/dev/null || die "Go is needed to build Kubernetes: apt-get install golang-go"
# Fetches the Go version a module asks for where the installed one is older.
export GOTOOLCHAIN=auto
# Kubernetes 1.x.y is published as v1.x.y, its libraries as v0.x.y.
library_version=0.${kubernetes_version#*.}

update() {
    (cd "$scripts/kubernetes/components" &&
        sed -i "s|\(k8s.io/kubernetes\) v.*|\1 v$kubernetes_version|; s|\(=> k8s.io/[^ ]*\) v.*|\1 v$library_version|" go.mod &&
        go mod tidy)
    (cd "$scripts/kubernetes/etcd" && sed -i "s|\(etcd/server/v3\) v.*|\1 v$etcd_version|" go.mod && go mod tidy)
    (cd "$scripts/kubernetes/coredns" && sed -i "s|\(coredns/coredns\) v.*|\1 v$coredns_version|" go.mod && go mod tidy)
    # What the chart's objects are checked against.
    (cd "$root_dir/helm/tests" &&
        go get k8s.io/{api,apimachinery,apiserver,client-go}"@v$library_version" && go mod tidy)
}
case ${1:-} in
    '') ;;
    --update) update; exit ;;
    *) die "unknown argument $1" ;;
esac
grep -q "k8s.io/kubernetes v$kubernetes_version\$" "$scripts/kubernetes/components/go.mod" &&
    grep -q "etcd/server/v3 v$etcd_version\$" "$scripts/kubernetes/etcd/go.mod" &&
    grep -q "coredns/coredns v$coredns_version\$" "$scripts/kubernetes/coredns/go.mod" ||
    die "go.mod and versions.sh name different versions: run $0 --update"

use_target_dir
tools=$CARGO_TARGET_DIR/tools
folder=$tools/kubernetes-$kubernetes_version
mkdir -p "$folder"
# Whoever comes second waits and finds everything built.
exec 9>"$folder/.lock"
flock 9

# build MODULE FOLDER LDFLAGS PACKAGE...: the programs of these packages that FOLDER lacks, renamed when whole.
build() {
    local module=$1 into=$2 flags=$3 package missing=() scratch
    shift 3
    for package in "$@"; do
        [ -x "$into/$(program_of "$package")" ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "building $(for package in "${missing[@]}"; do program_of "$package"; done | paste -sd ' ')"
    mkdir -p "$into"
    scratch=$(mktemp -d "$into/.build.XXXXXX")
    (cd "$module" && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags "-s -w $flags" -o "$scratch/" "${missing[@]}") >&2 ||
        die "go build failed"
    for package in "${missing[@]}"; do
        # A module's main package at its root is named after the module's last part, its version left out.
        mv "$scratch/$(basename "${package%/v[0-9]*}")" "$into/$(program_of "$package")"
    done
    rm -rf "$scratch"
}

program_of() {
    case $1 in
        go.etcd.io/etcd/server/v3) printf 'etcd\n' ;;
        *) basename "$1" ;;
    esac
}

# install_one NAME VERSION PACKAGE LDFLAGS: a program whose module needs no replacing of modules.
install_one() {
    local name=$1 version=$2 package=$3 flags=$4 into=$tools/$1-$2 scratch
    if [ ! -x "$into/$name" ]; then
        say "building $name"
        mkdir -p "$into"
        scratch=$(mktemp -d "$into/.build.XXXXXX")
        CGO_ENABLED=0 GOBIN=$scratch go install -trimpath -ldflags "-s -w $flags" "$package@v$version" >&2 ||
            die "building $package failed"
        mv "$scratch/$name" "$into/$name"
        rmdir "$scratch"
    fi
    ln -sfn "../$name-$version/$name" "$folder/$name"
}

# link_all FOLDER: every program of another script's folder, by a link.
link_all() {
    local program
    for program in "$1"/*; do
        ln -sfn "../$(basename "$1")/$(basename "$program")" "$folder/$(basename "$program")"
    done
}

stamp=
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    stamp+=" -X $package.gitVersion=v$kubernetes_version -X $package.gitTreeState=clean"
    stamp+=" -X $package.gitMajor=${kubernetes_version%%.*} -X $package.gitMinor=$(cut -d. -f2 <<<"$kubernetes_version")"
done
commands=()
for program in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
    commands+=("k8s.io/kubernetes/cmd/$program")
done
build "$scripts/kubernetes/components" "$folder" "$stamp" "${commands[@]}"
build "$scripts/kubernetes/etcd" "$tools/etcd-$etcd_version" "" go.etcd.io/etcd/server/v3
ln -sfn "../etcd-$etcd_version/etcd" "$folder/etcd"
if [ ! -x "$folder/pause" ]; then
    need_packages gcc libc6-dev
    gcc -Os -s -static -o "$folder/.pause" "$scripts/kubernetes/pause.c" || die "pause.c does not compile"
    mv "$folder/.pause" "$folder/pause"
fi
build "$scripts/kubernetes/coredns" "$tools/coredns-$coredns_version" "" meshd.dev/testbed/coredns
ln -sfn "../coredns-$coredns_version/coredns" "$folder/coredns"
install_one helm "$helm_version" helm.sh/helm/v4/cmd/helm "-X helm.sh/helm/v4/internal/version.version=v$helm_version"
link_all "$("$scripts/containerd.sh")"
link_all "$("$scripts/cni-tools.sh")"
printf '%s\n' "$folder"
