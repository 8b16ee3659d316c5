package tests

// What an operator reads after helm install and upgrade, with a cluster to look at.

import (
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	loader "helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/scheme"
)

type cluster struct{ client dynamic.Interface }

func (c cluster) GetClientFor(apiVersion, kind string) (dynamic.NamespaceableResourceInterface, bool, error) {
	resources := map[string]string{
		"Node": "nodes", "Pod": "pods", "Namespace": "namespaces", "NetworkPolicy": "networkpolicies", "Service": "services",
		"EndpointSlice": "endpointslices", "DaemonSet": "daemonsets", "ServiceCIDR": "servicecidrs",
	}
	version, err := schema.ParseGroupVersion(apiVersion)
	namespaced := kind != "Node" && kind != "Namespace" && kind != "ServiceCIDR"
	return c.client.Resource(version.WithResource(resources[kind])), namespaced, err
}

// render gives NOTES, or the refusal.
func render(t *testing.T, values map[string]any, objects ...runtime.Object) (string, error) {
	t.Helper()
	chart, err := loader.Load("../meshd")
	if err != nil {
		t.Fatal(err)
	}
	if values["clusterCIDRs"] == nil {
		values["clusterCIDRs"] = []any{"10.244.0.0/16", "fd00:10:244::/48"}
	}
	options := common.ReleaseOptions{Name: "meshd", Namespace: "meshd-system", Revision: 1, IsInstall: true}
	capabilities := *common.DefaultCapabilities
	capabilities.APIVersions = append(slices.Clone(capabilities.APIVersions), "networking.k8s.io/v1/ServiceCIDR")
	rendered, err := util.ToRenderValues(chart, values, options, &capabilities)
	if err != nil {
		t.Fatal(err)
	}
	client := dynamicfake.NewSimpleDynamicClient(scheme.Scheme, objects...)
	files, err := engine.RenderWithClientProvider(chart, rendered, cluster{client})
	return files["meshd/templates/NOTES.txt"], err
}

func nodeWith(name string, podCIDRs ...string) *corev1.Node {
	n := bare(name)
	n.Spec.PodCIDRs = podCIDRs
	n.Status.Conditions = []corev1.NodeCondition{{Type: "Ready", Status: "True"}}
	return n
}

func namespace(level string) *corev1.Namespace {
	n := &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: "meshd-system"}}
	if level != "" {
		n.Labels = map[string]string{"pod-security.kubernetes.io/enforce": level}
	}
	return n
}

func policy(namespace, name string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}
}

func has(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("does not say %q:\n%s", part, text)
		}
	}
}

func TestNotesOfAGoodClusterWarnOfNothing(t *testing.T) {
	values := map[string]any{"serviceCIDRs": []any{"10.96.0.0/12"}}
	notes, err := render(t, values, namespace("privileged"), nodeWith("a", "10.244.1.0/24", "fd00:10:244:1::/64"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(notes, "WARNING") || strings.Contains(notes, "pod-security") {
		t.Errorf("warns:\n%s", notes)
	}
	has(t, notes, "rollout status", "nodes behind NAT", "pauses while its daemon is replaced", "Keep this namespace to meshd", "helm test meshd")
}

// How they name them where the API server tells: helm/tests/api.
func TestNotesWarnWhereServicesAreNotTold(t *testing.T) {
	notes, _ := render(t, map[string]any{})
	has(t, notes, "WARNING: serviceCIDRs is not set", "unencrypted. Set it to what kube-apiserver was given as --service-cluster-ip-range.\n")
}

func TestNotesNamePrefixesOfServicesThatAreNotTold(t *testing.T) {
	services := &networkingv1.ServiceCIDR{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDR"},
		ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12", "fd00:10:96::/112"}},
	}
	told := func(prefixes ...any) string {
		notes, err := render(t, map[string]any{"serviceCIDRs": prefixes}, services)
		if err != nil {
			t.Fatal(err)
		}
		return notes
	}
	has(t, told("10.96.0.0/16"), "WARNING: serviceCIDRs holds not all of the cluster's prefixes of Services (10.96.0.0/12, fd00:10:96::/112)")
	has(t, told("10.96.0.0/12"), "prefixes of Services (fd00:10:96::/112)")
	if notes := told("10.96.0.0/12", "fd00:10:96::/108"); strings.Contains(notes, "serviceCIDRs") {
		t.Errorf("warns:\n%s", notes)
	}
	notes, _ := render(t, map[string]any{}, services)
	has(t, notes, "Set it: --set 'serviceCIDRs={10.96.0.0/12,fd00:10:96::/112}'")
}

func TestNotesNameNetworkPoliciesNobodyEnforces(t *testing.T) {
	notes, _ := render(t, map[string]any{}, policy("shop", "a"), policy("shop", "b"), policy("bank", "a"))
	has(t, notes, "WARNING: 3 NetworkPolicies exist (namespaces bank, shop) and meshd enforces none")
	notes, _ = render(t, map[string]any{}, policy("shop", "a"))
	has(t, notes, "WARNING: 1 NetworkPolicy exists (namespace shop) and meshd enforces none")
}

func TestNotesNameNodesWithoutPodCIDRInOneLine(t *testing.T) {
	notes, _ := render(t, map[string]any{}, nodeWith("a"), nodeWith("b", "10.244.1.0/24"), nodeWith("c"))
	has(t, notes, "WARNING: 2 nodes have no pod CIDR (a, c): start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr=10.244.0.0/16,fd00:10:244::/48; until then pods there get no address")
	notes, _ = render(t, map[string]any{}, nodeWith("a"), nodeWith("b", "10.244.1.0/24"))
	has(t, notes, "WARNING: 1 node has no pod CIDR (a): ")
}

func TestNotesNamePodCIDRsOutsideTheClusterPrefixes(t *testing.T) {
	notes, _ := render(t, map[string]any{}, nodeWith("a", "10.42.0.0/24"), nodeWith("b", "10.244.1.0/24"), nodeWith("c", "10.0.0.0/8"))
	has(t, notes, "WARNING: pod CIDRs outside clusterCIDRs are not meshed: a (10.42.0.0/24), c (10.0.0.0/8).")
}

func TestANamespaceThatRestrictsPodsIsRefusedWithTheCommand(t *testing.T) {
	for _, level := range []string{"baseline", "restricted"} {
		_, err := render(t, map[string]any{}, namespace(level))
		if err == nil {
			t.Fatalf("%s was taken", level)
		}
		has(t, err.Error(), "admits only "+level+" pods", "kubectl label namespace meshd-system --overwrite pod-security.kubernetes.io/enforce=privileged")
	}
	notes, err := render(t, map[string]any{}, namespace(""))
	if err != nil {
		t.Fatal(err)
	}
	has(t, notes, "kubectl label namespace meshd-system pod-security.kubernetes.io/enforce=privileged")
}

func TestCleanupListsNodesThatAreNotClean(t *testing.T) {
	pod := func(node, ready string) *corev1.Pod {
		return &corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Name: "p-" + node, Namespace: "meshd-system", Labels: map[string]string{"app.kubernetes.io/component": "cleanup"}},
			Spec:       corev1.PodSpec{NodeName: node},
			Status:     corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: "Ready", Status: corev1.ConditionStatus(ready)}}},
		}
	}
	gone := nodeWith("c")
	gone.Status.Conditions[0].Status = "Unknown"
	notes, err := render(t, map[string]any{"cleanup": map[string]any{"enabled": true}},
		nodeWith("a"), nodeWith("b"), gone, pod("a", "True"), pod("b", "False"))
	if err != nil {
		t.Fatal(err)
	}
	has(t, notes, "NOT CLEAN YET: node b (ready)\n", "NOT CLEAN YET: node c (not ready, not reached)\n", "/var/lib/meshd/bin/meshd uninstall --cni\n")
	if strings.Contains(notes, "node a ") {
		t.Errorf("a clean node is listed:\n%s", notes)
	}
	// The program on the host is told what it cannot know.
	elsewhere := map[string]any{"binDir": "/usr/libexec/cni", "confDir": "/srv/cni", "confName": "05-meshd.conflist"}
	notes, err = render(t, map[string]any{"cleanup": map[string]any{"enabled": true}, "cni": elsewhere, "stateDir": "/srv/meshd"})
	if err != nil {
		t.Fatal(err)
	}
	has(t, notes, "/srv/meshd/bin/meshd uninstall --cni --bin-dir=/usr/libexec/cni --conf-dir=/srv/cni --conf-name=05-meshd.conflist --state-dir=/srv/meshd\n")
}
