#!/usr/bin/env bash
# Makes what a virtual machine with the kernel's own WireGuard boots from, and prints where it is: kernel, a tab, initial
# file system, a tab, version. The kernel is Debian's for clouds, of the version that the package lists of this machine
# name; made once for each version and kept. Inside there are busybox, wg and iperf3 of this machine; a shell reads
# commands from the second serial port, and ends each answer with a line of `=` and the exit status.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/../lib.sh"
use_target_dir
need_packages qemu-system-x86 busybox wireguard-tools iperf3

# The kernel's package of this version is a dependency of the one that names it.
apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || apt-get update -qq >&2 || true
package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -1)
[ -n "$package" ] || die "the package lists have no linux-image-cloud-amd64: is this Debian on amd64, and did apt-get update work?"
version=$(apt-cache policy "$package" | sed -n 's/^ *Candidate: //p')
# What is inside changes with this script, and with the programs of this machine.
edition=$(cat "${BASH_SOURCE[0]}" "$(command -v busybox)" "$(command -v wg)" "$(command -v iperf3)" | sha256sum | cut -c1-12)
folder=$CARGO_TARGET_DIR/tools/kernel-peer-$version-$edition

# The machine's first program. Time, entropy and addresses are those of its host.
init() {
    cat <<'INIT'
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin
for module in virtio_pci virtio_net wireguard; do modprobe $module || echo "no module $module"; done
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
ip link set lo up
ip link set eth0 up
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
echo "=ready"
while read -r line; do
    eval "$line"
    echo "=$?"
done
poweroff -f
INIT
}

# copy ROOT PROGRAM...: with the libraries they load.
copy() {
    local to=$1 program library
    shift
    for program in "$@"; do
        program=$(command -v "$program")
        install -D "$(readlink -f "$program")" "$to/bin/$(basename "$program")"
        for library in $(ldd "$program" | grep -o '/[^ ]*'); do
            [ -e "$to$library" ] || install -D "$(readlink -f "$library")" "$to$library"
        done
    done
}

# modules FROM TO: what the machine loads, and what that needs.
modules() {
    local release
    release=$(ls "$1/lib/modules")
    mkdir -p "$2/lib/modules/$release"
    busybox depmod -b "$1" "$release"
    awk -F: -v wanted="virtio_pci virtio_net wireguard" '
        { needs[$1] = $2; n = split($1, part, "/"); name = part[n]; sub(/\.ko.*/, "", name); path[name] = $1 }
        function take(file, list, count, i) {
            if (file in taken) return
            taken[file] = 1; print file
            count = split(needs[file], list, " ")
            for (i = 1; i <= count; i++) take(list[i])
        }
        END { count = split(wanted, first, " "); for (i = 1; i <= count; i++) take(path[first[i]]) }
    ' "$1/lib/modules/$release/modules.dep" | while read -r file; do
        install -D "$1/lib/modules/$release/$file" "$2/lib/modules/$release/$file"
    done
    busybox depmod -b "$2" "$release"
}

if [ ! -e "$folder/initrd" ]; then
    say "making the kernel peer of $package $version"
    mkdir -p "$CARGO_TARGET_DIR/tools"
    scratch=$(mktemp -d "$CARGO_TARGET_DIR/tools/.kernel.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    (cd "$scratch" && apt-get download -qq "$package=$version" >&2) || die "could not download $package: is the network up?"
    dpkg -x "$scratch"/*.deb "$scratch/kernel"
    mkdir "$scratch/root" "$scratch/done"
    copy "$scratch/root" busybox wg iperf3
    modules "$scratch/kernel" "$scratch/root"
    init >"$scratch/root/init"
    chmod 755 "$scratch/root/init"
    (cd "$scratch/root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$scratch/done/initrd"
    cp "$scratch"/kernel/boot/vmlinuz-* "$scratch/done/kernel"
    # Renamed when whole: another test may be looking, or may have been faster.
    mv -T "$scratch/done" "$folder" 2>/dev/null || [ -e "$folder/initrd" ]
fi
printf '%s\t%s\t%s\n' "$folder/kernel" "$folder/initrd" "${package#linux-image-} ($version)"
