# Versions of the programs of others that the testbed builds and runs: one place for all of them. Sourced, never run.
# After changing those of Kubernetes, etcd or CoreDNS: testbed/scripts/kubernetes.sh --update

kubernetes_version=1.37.2
etcd_version=3.7.3
containerd_version=2.4.2
runc_version=1.5.2
helm_version=4.3.1
coredns_version=1.15.0
cnitool_version=1.3.1
cni_plugins_version=1.9.1
boringtun_version=0.7.1
gotatun_version=0.10.2
# 1.11 and later need github.com/DefinedNet/netlink, which not every module proxy has.
nebula_version=1.10.3
