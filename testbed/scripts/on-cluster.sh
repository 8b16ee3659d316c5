#!/usr/bin/env bash
# Our chart on the cluster kubectl talks to, whatever it is made of, and the checks of the end-to-end suite that need no more
# than that. Needs kubectl and helm.
#
#   on-cluster.sh install [HELM-ARGUMENTS...]   install the chart, wait until every node is Ready
#   on-cluster.sh check                         try what an operator relies on; leaves the cluster as it was
#
# CLUSTER_CIDRS and SERVICE_CIDRS are what the cluster was made with, as ./testbed/kube has them when not given.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../lib.sh"

namespace=meshd-system
: "${CLUSTER_CIDRS:=10.244.0.0/16,fd00:10:244::/48}" "${SERVICE_CIDRS:=10.96.0.0/16,fd00:10:96::/112}"

ready() { kubectl wait --for=condition=Ready nodes --all --timeout="${1:-180s}" >/dev/null; }
rolled_out() { kubectl -n "$namespace" rollout status daemonset/meshd --timeout=180s >/dev/null; }
helm_test() { helm test meshd -n "$namespace" --timeout 180s >/dev/null; }

install_chart() {
    local nodes
    # The chart's own test makes one pod for each of these.
    nodes=$(kubectl get nodes -o json | jq '[.items[] | select(any(.spec.taints[]?; .key | startswith("node.kubernetes.io/") | not)
        | not)] | length')
    # What the guide says to create before.
    kubectl create namespace "$namespace" --dry-run=client -o yaml | kubectl apply -f - >/dev/null
    kubectl label --overwrite namespace "$namespace" pod-security.kubernetes.io/enforce=privileged >/dev/null
    helm upgrade --install meshd "$root_dir/helm/meshd" -n "$namespace" --set "clusterCIDRs={$CLUSTER_CIDRS}" \
        --set "serviceCIDRs={$SERVICE_CIDRS}" --set image.pullPolicy=Never --set "test.nodes=$nodes" "$@" >/dev/null
    rolled_out
    ready
}

# check NAME COMMAND...: says whether it holds.
failures=0
check() {
    local name=$1 said
    shift
    if said=$("$@" 2>&1); then
        say "ok      $name"
    else
        say "FAILED  $name"
        say "$said"
        failures=$((failures + 1))
    fi
}

# The guide's recipe, as JSON: a key of its own, endpoints and addresses in the mesh.
every_node_says_who_it_is() {
    kubectl get nodes -o json | jq -e '[.items[].metadata.annotations] as $all
        | ($all | map(.["meshd.dev/public-key"]) | unique | length) == ($all | length)
        and all($all[]; .["meshd.dev/public-key"] and .["meshd.dev/endpoints"] and .["meshd.dev/overlay"])' >/dev/null
}

every_node_is_meshed() {
    kubectl get nodes -o json | jq -e 'all(.items[]; any(.status.conditions[];
        .type == "NetworkUnavailable" and .status == "False"))' >/dev/null
}

# By whoever asks here, an administrator most likely; nothing is written where it is not refused either.
a_foreign_key_is_refused() {
    local node said
    node=$(kubectl get nodes -o name | head -1)
    if said=$(kubectl annotate --overwrite --dry-run=server "$node" meshd.dev/public-key=mine 2>&1); then
        echo "the API server would take it"
        return 1
    fi
    case $said in *"may be written by the meshd of that node only"*) ;; *) echo "$said"; return 1 ;; esac
}

daemons_are_replaced() {
    kubectl -n "$namespace" rollout restart daemonset/meshd && rolled_out && ready && helm_test
}

# kubectl mesh: the newest of those in PATH and just built; nothing where there is none.
plugin() {
    local one newest=
    for one in "$(command -v kubectl-mesh)" "${CARGO_TARGET_DIR:-$root_dir/target}"/{release,debug}/kubectl-mesh; do
        if [ -x "$one" ] && { [ -z "$newest" ] || [ "$one" -nt "$newest" ]; }; then newest=$one; fi
    done
    printf '%s\n' "$newest"
}

check_all() {
    local mesh
    check "every node is Ready" ready
    check "every node's network is available" every_node_is_meshed
    check "every node says its key, endpoints and addresses, each key once" every_node_says_who_it_is
    check "helm test: pods of every node see one another's own addresses" helm_test
    mesh=$(plugin)
    if [ -n "$mesh" ]; then
        check "kubectl mesh status: every node is meshed" "$mesh" status
    else
        say "skipped kubectl mesh status: there is no kubectl-mesh here"
    fi
    check "a key of somebody else's on a Node is refused" a_foreign_key_is_refused
    check "daemons are replaced one by one, and pods talk as before" daemons_are_replaced
    [ "$failures" -eq 0 ] || die "$failures checks failed"
}

for program in kubectl helm jq; do command -v "$program" >/dev/null || die "$program is missing"; done
case ${1:-} in
    install) shift; install_chart "$@" ;;
    check) check_all ;;
    *) sed -n '2,8p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
