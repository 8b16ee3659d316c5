#!/usr/bin/env bash
# Makes one of the machines a node, by kubeadm: inside it, as root, run by Vagrant. Twice is fine.
#
#   node.sh a1 | b1 | c1
set -euo pipefail
name=$1
. /meshd/testbed/versions.sh
release=${kubernetes_version%.*}
made=/meshd/testbed/vagrant/made
declare -A address=([a1]=198.51.100.11 [b1]=203.0.113.11 [c1]=192.168.1.11)
own=${address[$name]}

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq curl gpg jq nftables >/dev/null
source=https://pkgs.k8s.io/core:/stable:/v$release/deb
curl -fsSL "$source/Release.key" | gpg --batch --yes --dearmor -o /usr/share/keyrings/kubernetes.gpg
echo "deb [signed-by=/usr/share/keyrings/kubernetes.gpg] $source/ /" >/etc/apt/sources.list.d/kubernetes.list
apt-get update -qq
apt-get install -y -qq "kubelet=$kubernetes_version-*" "kubeadm=$kubernetes_version-*" "kubectl=$kubernetes_version-*" >/dev/null

swapoff -a
modprobe tun
printf 'net.ipv4.ip_forward=1\nnet.ipv6.conf.all.forwarding=1\n' >/etc/sysctl.d/90-kubernetes.conf
sysctl -q --system
# Of the versions ./testbed/kube has, built by the same script.
install -m 755 "$made"/{containerd,containerd-shim-runc-v2,ctr,runc} /usr/local/bin/
mkdir -p /etc/containerd
containerd config default | sed 's/SystemdCgroup = false/SystemdCgroup = true/' >/etc/containerd/config.toml
cat >/etc/systemd/system/containerd.service <<'UNIT'
[Unit]
After=network.target
[Service]
ExecStart=/usr/local/bin/containerd
Type=notify
Delegate=yes
KillMode=process
Restart=always
[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable -q --now containerd
# Vagrant's own leg has the same address on every machine.
echo "KUBELET_EXTRA_ARGS=--node-ip=$own" >/etc/default/kubelet

# The way between the networks leads through a1, which hides the home.
case $name in
    a1) nft -f - <<'RULES' ;;
table ip home
delete table ip home
table ip home {
    chain leaving {
        type nat hook postrouting priority 100;
        ip saddr 192.168.1.0/24 ip daddr != 192.168.1.0/24 masquerade
    }
    chain entering {
        type filter hook forward priority 0;
        ip daddr 192.168.1.0/24 ct state new drop
    }
}
RULES
    b1) ip route replace 198.51.100.0/24 via 203.0.113.1 ;;
    c1) ip route replace 198.51.100.0/24 via 192.168.1.1 && ip route replace 203.0.113.0/24 via 192.168.1.1 ;;
esac

if [ -e /etc/kubernetes/kubelet.conf ]; then
    exit 0
elif [ "$name" = a1 ]; then
    kubeadm init --node-name=a1 --apiserver-advertise-address="$own" --kubernetes-version="$kubernetes_version" \
        --pod-network-cidr=10.244.0.0/16 --service-cidr=10.96.0.0/16 --skip-token-print
    mkdir -p /root/.kube && cp /etc/kubernetes/admin.conf /root/.kube/config
    kubectl taint nodes --all node-role.kubernetes.io/control-plane:NoSchedule-
else
    bash "$made/join.sh" --node-name="$name"
fi
