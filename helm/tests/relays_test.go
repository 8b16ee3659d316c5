package tests

// The relays of the chart: who may write the list nodes find them in, and what their pods may do.

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
)

const podName = "authentication.kubernetes.io/pod-name"

func relay(node, pod string) user.Info {
	return &user.DefaultInfo{
		Name:   "system:serviceaccount:meshd-system:meshd-keyrelay",
		Groups: []string{"system:serviceaccounts", "system:serviceaccounts:meshd-system", "system:authenticated"},
		Extra:  map[string][]string{nodeName: {node}, podName: {pod}},
	}
}

func listOfRelays(data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "meshd-system", Name: "meshd-keyrelays", Labels: map[string]string{"a": "b"}},
		Data:       data,
	}
}

func ofList(now, old *corev1.ConfigMap, by user.Info) write {
	w := write{
		kind:     corev1.SchemeGroupVersion.WithKind("ConfigMap"),
		resource: corev1.SchemeGroupVersion.WithResource("configmaps"), namespace: now.Namespace, name: now.Name, object: now, by: by,
	}
	if old != nil {
		w.old = old
	}
	return w
}

func TestARelayWritesItsOwnEntryAndNobodyElseAny(t *testing.T) {
	plugin := plugin(t, "golden/keyrelay.yaml")
	const onlyItself, onlyRemoved = "may be written by the relay it names only", "may be removed by relays and members of the group"
	type entries = map[string]string
	relayA := relay("a", "meshd-keyrelay-x7k2p")
	noNode := &user.DefaultInfo{Name: relayA.GetName()}
	for _, c := range []struct {
		what    string
		by      user.Info
		now     entries
		refused string
	}{
		{"a relay changes its entry", relayA, entries{"a": "new", "b": "B"}, ""},
		{"a relay removes its entry", relayA, entries{"b": "B"}, ""},
		{"a relay removes one that is gone", relayA, entries{"a": "A"}, ""},
		{"a relay removes all", relayA, nil, ""},
		{"a relay changes nothing", relayA, entries{"a": "A", "b": "B"}, ""},
		{"a relay changes another's entry", relayA, entries{"a": "A", "b": "mine"}, onlyItself},
		{"a relay adds an entry that is not its", relayA, entries{"a": "A", "b": "B", "c": "C"}, onlyItself},
		{"a relay adds one under its pod's name", relayA, entries{"a": "A", "b": "B", "meshd-keyrelay-x7k2p": "C"}, onlyItself},
		{"a token of no pod writes an entry", noNode, entries{"a": "new", "b": "B"}, onlyItself},
		{"a token of no pod writes one without a name", noNode, entries{"a": "A", "b": "B", "": "C"}, onlyItself},
		{"the daemon of the node writes the entry", daemonA, entries{"a": "new", "b": "B"}, onlyItself},
		{"a tenant writes an entry", tenant, entries{"a": "new", "b": "B"}, onlyItself},
		{"a tenant removes an entry", tenant, entries{"a": "A"}, onlyRemoved},
		{"a cluster administrator writes an entry", masters, entries{"a": "new", "b": "B"}, onlyItself},
		{"a cluster administrator removes an entry", masters, nil, onlyRemoved},
		{"an operator writes an entry", operator, entries{"a": "new", "b": "B"}, onlyItself},
		{"an operator removes an entry", operator, entries{"a": "A"}, ""},
		{"helm changes labels", masters, entries{"a": "A", "b": "B"}, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			now, old := listOfRelays(c.now), listOfRelays(entries{"a": "A", "b": "B"})
			if c.what == "helm changes labels" {
				now.Labels["helm.sh/chart"] = "meshd-2"
			}
			expect(t, ofList(now, old, c.by).ask(plugin), c.refused)
		})
	}
}

func TestTheListOfRelaysStaysAListThatRelaysCanWrite(t *testing.T) {
	plugin := plugin(t, "golden/keyrelay.yaml")
	relayA, yes := relay("a", "p"), true
	for _, c := range []struct {
		what    string
		by      user.Info
		change  func(*corev1.ConfigMap)
		refused string
	}{
		{"immutable", masters, func(m *corev1.ConfigMap) { m.Immutable = &yes }, "must stay changeable"},
		{"immutable by a relay", relayA, func(m *corev1.ConfigMap) { m.Immutable = &yes }, "must stay changeable"},
		{"binary", relayA, func(m *corev1.ConfigMap) { m.BinaryData = map[string][]byte{"a": {0}} }, "hold text only"},
		{"labels by a relay", relayA, func(m *corev1.ConfigMap) { m.Labels = nil }, "no labels"},
		{"annotations by a relay", relayA, func(m *corev1.ConfigMap) { m.Annotations = map[string]string{"a": "b"} }, "no labels"},
		{"owners by a relay", relayA, func(m *corev1.ConfigMap) {
			m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "x", UID: "1"}}
		}, "no labels"},
		{"finalizers by a relay", relayA, func(m *corev1.ConfigMap) { m.Finalizers = []string{"a/b"} }, "no labels"},
		{"the server's own fields", relayA, func(m *corev1.ConfigMap) { m.ResourceVersion, m.ManagedFields = "78", []metav1.ManagedFieldsEntry{{}} }, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			now := listOfRelays(nil)
			c.change(now)
			expect(t, ofList(now, listOfRelays(nil), c.by).ask(plugin), c.refused)
		})
	}
	// Helm makes it, and it is nobody's business what other ConfigMaps hold.
	expect(t, ofList(listOfRelays(nil), nil, masters).ask(plugin), "")
	expect(t, ofList(listOfRelays(map[string]string{"a": "A"}), nil, masters).ask(plugin), "by the relay it names only")
	for _, place := range [][2]string{{"meshd-system", "other"}, {"default", "meshd-keyrelays"}} {
		other := listOfRelays(map[string]string{"a": "A"})
		other.Namespace, other.Name = place[0], place[1]
		expect(t, ofList(other, nil, tenant).ask(plugin), "")
	}
}

func TestBehindAServiceARelaysEntryIsNamedAfterItsPod(t *testing.T) {
	plugin := plugin(t, "golden/keyrelay-service.yaml")
	before := map[string]string{"meshd-keyrelay-0": "A"}
	for name, refused := range map[string]string{"meshd-keyrelay-1": "", "meshd-keyrelay-2": "by the relay it names only", "a": "by the relay it names only"} {
		after := maps.Clone(before)
		after[name] = "B"
		expect(t, ofList(listOfRelays(after), listOfRelays(before), relay("a", "meshd-keyrelay-1")).ask(plugin), refused)
	}
}

func TestRelaysReadNoSecretAndWriteNothingButTheirList(t *testing.T) {
	for path, want := range map[string]string{
		"golden/keyrelay.yaml":         "nodes[]: get list watch; configmaps[meshd-keyrelays]: get patch",
		"golden/keyrelay-service.yaml": "nodes[]: get list watch; configmaps[meshd-keyrelays]: get patch; services[]: get",
	} {
		var rules []rbacv1.PolicyRule
		for _, object := range decode(t, path) {
			switch object := object.(type) {
			case *rbacv1.ClusterRole:
				if object.Name == "meshd-keyrelay" {
					rules = append(rules, object.Rules...)
				}
			case *rbacv1.Role:
				if object.Name == "meshd-keyrelay" {
					rules = append(rules, object.Rules...)
				}
			}
		}
		var got []string
		for _, rule := range rules {
			got = append(got, fmt.Sprintf("%s%v: %s", strings.Join(rule.Resources, " "), rule.ResourceNames, strings.Join(rule.Verbs, " ")))
		}
		if text := strings.Join(got, "; "); text != want {
			t.Errorf("%s: %s, expected %s", path, text, want)
		}
	}
}

// Each replica has a Service of its own that keeps the source and is not closed by a relay that says it is not ready.
func TestEachRelayHasAServiceThatKeepsTheSource(t *testing.T) {
	var set *appsv1.StatefulSet
	ports := map[string]string{}
	for _, object := range decode(t, "golden/keyrelay-service.yaml") {
		switch object := object.(type) {
		case *appsv1.StatefulSet:
			set = object
		case *corev1.Service:
			if object.Spec.ClusterIP == "None" {
				continue
			}
			if object.Spec.Type != "LoadBalancer" || object.Spec.ExternalTrafficPolicy != "Local" || !object.Spec.PublishNotReadyAddresses {
				t.Errorf("%s: %+v", object.Name, object.Spec)
			}
			for _, port := range object.Spec.Ports {
				ports[object.Name] += fmt.Sprintf("%s %d>%s ", port.Protocol, port.Port, port.TargetPort.String())
			}
			if object.Name != "meshd-keyrelay-"+object.Spec.Selector["apps.kubernetes.io/pod-index"] {
				t.Errorf("%s selects %v", object.Name, object.Spec.Selector)
			}
		}
	}
	if len(ports) != int(*set.Spec.Replicas) {
		t.Errorf("%d Services of %d relays", len(ports), *set.Spec.Replicas)
	}
	for name, got := range ports {
		if want := "UDP 3478>15192 UDP 15193>15193 TCP 443>15443 "; got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	pod := set.Spec.Template.Spec
	security := pod.Containers[0].SecurityContext
	if pod.HostNetwork || !*pod.SecurityContext.RunAsNonRoot || len(security.Capabilities.Add) != 0 || !*security.ReadOnlyRootFilesystem {
		t.Errorf("the pod may more than it needs: %+v %+v", pod.SecurityContext, security)
	}
	for _, volume := range pod.Volumes {
		if volume.HostPath != nil {
			t.Errorf("a path of the host: %s", volume.HostPath.Path)
		}
	}
}
