package tests

// What the chart asks of a cluster before it is installed there, and values taken away.

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

func nodeAt(name string, addresses ...string) *corev1.Node {
	n := nodeWith(name, "10.244.1.0/24")
	for i := 0; i < len(addresses); i += 2 {
		address := corev1.NodeAddress{Type: corev1.NodeAddressType(addresses[i]), Address: addresses[i+1]}
		n.Status.Addresses = append(n.Status.Addresses, address)
	}
	return n
}

func apiServerAt(service string, addresses ...string) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: service + "-x", Labels: map[string]string{"kubernetes.io/service-name": service},
		},
		Endpoints: []discoveryv1.Endpoint{{Addresses: addresses}},
	}
}

func kubernetesService(clusterIPs ...string) *corev1.Service {
	return &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes"},
		Spec:       corev1.ServiceSpec{ClusterIPs: clusterIPs},
	}
}

// The guard would cut off what has such an address, and helm could not take it back.
func TestPrefixesThatHoldNodesOrTheAPIServerAreRefused(t *testing.T) {
	overlay := nodeAt("a", "InternalIP", "192.0.2.1", "InternalIP", "10.244.1.1", "InternalIP", "fd00:10:244:1::1")
	annotate("meshd.dev/overlay", "10.244.1.1,fd00:10:244:1::1")(overlay)
	for _, c := range []struct {
		what    string
		host    string
		objects []runtime.Object
		refused []string // empty: taken
	}{
		{"all outside", "192.0.2.10", []runtime.Object{
			nodeAt("a", "InternalIP", "10.95.255.255", "ExternalIP", "10.112.0.0", "InternalIP", "2001:db8::1", "Hostname", "a"),
			apiServerAt("kubernetes", "10.112.0.1"), kubernetesService("10.96.0.1")}, nil},
		{"names and nonsense", "api.example.org", []runtime.Object{nodeAt("a",
			"Hostname", "a", "InternalDNS", "a.example.org", "InternalIP", "", "InternalIP", "1:2:3:4:5:6:7::8:9",
			"InternalIP", "10.97.300.1", "InternalIP", "10.97.1.1/32", "InternalIP", "fe80::1%eth0")}, nil},
		{"a node among Services", "", []runtime.Object{nodeAt("b", "InternalIP", "192.0.2.1"), nodeAt("c", "Hostname", "c", "InternalIP", "10.97.3.4")},
			[]string{"serviceCIDRs: 10.96.0.0/12 holds 10.97.3.4 (InternalIP of node c): the guard would drop what nodes send there and cut them off",
				"kubectl get servicecidrs", "only the parts of it that hold none"}},
		{"a node among Services, by its outer address", "", []runtime.Object{nodeAt("c", "ExternalIP", "10.111.255.255")},
			[]string{"holds 10.111.255.255 (ExternalIP of node c)"}},
		{"a node among Services, IPv6", "", []runtime.Object{nodeAt("c", "InternalIP", "fd00:10:96::beef")},
			[]string{"serviceCIDRs: fd00:10:96::/112 holds fd00:10:96::beef (InternalIP of node c)"}},
		{"a node among pods", "", []runtime.Object{nodeAt("c", "InternalIP", "10.244.200.7")},
			[]string{"clusterCIDRs: 10.244.0.0/16 holds 10.244.200.7 (InternalIP of node c)", "list the prefix of pods alone"}},
		{"a node's own address in the mesh", "", []runtime.Object{overlay}, nil},
		{"the API server among Services", "", []runtime.Object{apiServerAt("kubernetes", "192.0.2.1", "10.100.0.1"), kubernetesService("10.96.0.1")},
			[]string{"serviceCIDRs: 10.96.0.0/12 holds 10.100.0.1 (the API server, in EndpointSlice default/kubernetes-x)"}},
		{"the API server among pods", "", []runtime.Object{apiServerAt("kubernetes", "fd00:10:244::a")},
			[]string{"clusterCIDRs: fd00:10:244::/48 holds fd00:10:244::a (the API server"}},
		{"another Service's endpoints among pods", "", []runtime.Object{apiServerAt("shop", "10.244.1.7")}, nil},
		{"k8sServiceHost is the Service", "10.96.0.1", []runtime.Object{kubernetesService("10.96.0.1")}, nil},
		{"k8sServiceHost is no Service", "10.96.0.2", []runtime.Object{kubernetesService("10.96.0.1")},
			[]string{"serviceCIDRs: 10.96.0.0/12 holds 10.96.0.2 (k8sServiceHost)"}},
		{"k8sServiceHost among Services, and no cluster to ask", "10.96.0.2", nil, nil},
		{"k8sServiceHost among pods", "10.244.0.9", nil, []string{"clusterCIDRs: 10.244.0.0/16 holds 10.244.0.9 (k8sServiceHost)"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			values := map[string]any{"serviceCIDRs": []any{"10.96.0.0/12", "fd00:10:96::/112"}, "k8sServiceHost": c.host}
			_, err := render(t, values, c.objects...)
			answer(t, err, c.refused...)
		})
	}
}

// Nodes that are closed by mistake are opened by the cleanup.
func TestACleanupAsksNoAddresses(t *testing.T) {
	values := map[string]any{"cleanup": map[string]any{"enabled": true}, "serviceCIDRs": []any{"10.96.0.0/12"}}
	_, err := render(t, values, nodeAt("c", "InternalIP", "10.97.3.4"))
	answer(t, err)
}

func TestAnotherStateDirIsRefusedWhileNodesHaveOne(t *testing.T) {
	set := func(name, stateDir string) *appsv1.DaemonSet {
		container := corev1.Container{Name: "meshd", Env: []corev1.EnvVar{
			{Name: "MESHD_NODE_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}},
			{Name: "MESHD_STATE_DIR", Value: stateDir},
		}}
		pod := corev1.PodSpec{Containers: []corev1.Container{container}}
		if name == "meshd-cleanup" {
			pod = corev1.PodSpec{InitContainers: []corev1.Container{container}, Containers: []corev1.Container{{Name: "clean"}}}
		}
		return &appsv1.DaemonSet{
			TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "meshd-system", Name: name},
			Spec:       appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{Spec: pod}},
		}
	}
	elsewhere := set("meshd", "/data/meshd")
	elsewhere.Namespace = "other"
	cleaning := map[string]any{"enabled": true}
	refused := "stateDir: nodes keep their key and the addresses of living pods in /data/meshd, and with /var/lib/meshd they would give those addresses out twice: leave stateDir=/data/meshd"
	for _, c := range []struct {
		what    string
		values  map[string]any
		object  runtime.Object
		refused []string
	}{
		{"the same", map[string]any{}, set("meshd", "/var/lib/meshd"), nil},
		{"another", map[string]any{}, set("meshd", "/data/meshd"), []string{refused, "clean the nodes first (cleanup.enabled=true"}},
		{"back from a cleanup", map[string]any{}, set("meshd-cleanup", "/data/meshd"), []string{refused}},
		{"a cleanup of another", map[string]any{"cleanup": cleaning}, set("meshd", "/data/meshd"), []string{refused}},
		{"a cleanup of the same", map[string]any{"cleanup": cleaning, "stateDir": "/data/meshd"}, set("meshd", "/data/meshd"), nil},
		{"another namespace's", map[string]any{}, elsewhere, nil},
	} {
		t.Run(c.what, func(t *testing.T) {
			_, err := render(t, c.values, c.object)
			answer(t, err, c.refused...)
		})
	}
}

// Each value and each map of values, set to null: words, or nothing missing.
func TestNullIsToldOrTheSameAsNothing(t *testing.T) {
	var defaults map[string]any
	if err := yaml.Unmarshal([]byte(read(t, "../meshd/values.yaml")), &defaults); err != nil {
		t.Fatal(err)
	}
	none := map[string]bool{}
	var visit func(path []string, at any)
	visit = func(path []string, at any) {
		inner, isMap := at.(map[string]any)
		for name := range inner {
			if free[strings.Join(path, ".")] {
				break
			}
			visit(append(path[:len(path):len(path)], name), inner[name])
		}
		if len(path) == 0 {
			return
		}
		dotted := strings.Join(path, ".")
		var value any
		for i := len(path) - 1; i >= 0; i-- {
			value = map[string]any{path[i]: value}
		}
		_, err := render(t, value.(map[string]any))
		if _, isList := at.([]any); isList || (isMap && free[dotted]) || strings.Contains(dotted, "resources.") {
			none[dotted] = true
			answer(t, err)
		} else {
			answer(t, err, dotted+" is null: leave it out")
		}
	}
	visit(nil, defaults)
	if !none["serviceCIDRs"] || !none["keyrelay.nodeSelector"] {
		t.Errorf("not tried: %v", none)
	}
}

func answer(t *testing.T, err error, refused ...string) {
	t.Helper()
	switch {
	case len(refused) == 0 && err != nil:
		t.Errorf("refused: %v", err)
	case len(refused) > 0 && err == nil:
		t.Errorf("taken, expected %q", refused)
	case err != nil:
		has(t, err.Error(), refused...)
	}
}
