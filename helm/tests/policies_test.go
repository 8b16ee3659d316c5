package tests

// The admission policies of the chart, evaluated by the API server's own plugin: matching, bindings, CEL, messages.

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta/testrestmapper"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	key      = "meshd.dev/public-key"
	endpoint = "meshd.dev/endpoint"
	overlay  = "meshd.dev/overlay"
	nodeName = "authentication.kubernetes.io/node-name"
	daemonSA = "system:serviceaccount:meshd-system:meshd"
)

// Requesters.
var (
	serviceAccounts = []string{"system:serviceaccounts", "system:serviceaccounts:meshd-system", "system:authenticated"}
	daemonA         = as(daemonSA, "a", serviceAccounts...)
	daemonB         = as(daemonSA, "b", serviceAccounts...)
	// A token not of a pod: kubectl create token meshd.
	daemonUnbound = as(daemonSA, "", serviceAccounts...)
	daemonNoExtra = &user.DefaultInfo{Name: daemonSA, Groups: serviceAccounts}
	daemonEmpty   = &user.DefaultInfo{Name: daemonSA, Groups: serviceAccounts, Extra: map[string][]string{nodeName: {}}}
	// Another service account of a pod on node a, also one that is called as ours is elsewhere.
	otherPodA      = as("system:serviceaccount:meshd-system:default", "a", serviceAccounts...)
	otherNamespace = as("system:serviceaccount:tenant:meshd", "a", "system:serviceaccounts", "system:serviceaccounts:tenant")
	kubeletA       = as("system:node:a", "", "system:nodes", "system:authenticated")
	kubeletNoGroup = as("system:node:a", "", "system:authenticated")
	tenant         = as("tenant", "", "tenants", "system:authenticated")
	masters        = as("root", "", "system:masters", "system:authenticated")
	operator       = as("olga", "", "meshd:operators", "system:authenticated")
	nobody         = &user.DefaultInfo{}
	nodeController = as("system:serviceaccount:kube-system:node-controller", "", "system:serviceaccounts")
)

func as(name, node string, groups ...string) user.Info {
	info := &user.DefaultInfo{Name: name, Groups: groups}
	if node != "" {
		info.Extra = map[string][]string{nodeName: {node}}
	}
	return info
}

// node is a Node as it stands before a write.
func node(name string) *corev1.Node {
	return &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{
			Name: name, UID: "5f0c", ResourceVersion: "77",
			Labels:        map[string]string{"kubernetes.io/hostname": name},
			Annotations:   map[string]string{"node.alpha.kubernetes.io/ttl": "0", key: "old", "meshd.dev/version": "0.1.0"},
			Finalizers:    []string{"example.org/keep"},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet", Operation: "Update"}},
		},
		Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24", "fd00:10:244:1::/64"}},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: "InternalIP", Address: "192.0.2.1"}},
			Conditions: []corev1.NodeCondition{{Type: "MemoryPressure", Status: "False"}, {Type: "Ready", Status: "True"}},
		},
	}
}

// bare is a Node without anything a policy could stumble over.
func bare(name string) *corev1.Node {
	return &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name}}
}

type change func(*corev1.Node)

func annotate(name, value string) change {
	return func(n *corev1.Node) {
		if n.Annotations == nil {
			n.Annotations = map[string]string{}
		}
		n.Annotations[name] = value
	}
}
func remove(name string) change { return func(n *corev1.Node) { delete(n.Annotations, name) } }
func both(a, b change) change   { return func(n *corev1.Node) { a(n); b(n) } }
func nothing(*corev1.Node)      {}
func condition(kind, status string) change {
	return func(n *corev1.Node) {
		for i := range n.Status.Conditions {
			if string(n.Status.Conditions[i].Type) == kind {
				n.Status.Conditions[i].Status = corev1.ConditionStatus(status)
				return
			}
		}
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{
			Type: corev1.NodeConditionType(kind), Status: corev1.ConditionStatus(status)})
	}
}

// plugin is the API server's, with the policies of a golden render.
func plugin(t *testing.T, golden string) *validating.Plugin {
	t.Helper()
	var objects []runtime.Object
	for _, object := range decode(t, golden) {
		switch object := object.(type) {
		case *admissionv1.ValidatingAdmissionPolicy:
			// The API server's defaults.
			match := object.Spec.MatchConstraints
			match.NamespaceSelector, match.ObjectSelector = &metav1.LabelSelector{}, &metav1.LabelSelector{}
			for i := range match.ResourceRules {
				scope := admissionv1.AllScopes
				match.ResourceRules[i].Scope = &scope
			}
			objects = append(objects, object)
		case *admissionv1.ValidatingAdmissionPolicyBinding:
			objects = append(objects, object)
		}
	}
	want := map[string]int{"golden/default.yaml": 10, "golden/keyrelay.yaml": 12, "golden/keyrelay-service.yaml": 12, "golden/everything.yaml": 12}[golden]
	if len(objects) != want {
		t.Fatalf("%d policies and bindings, expected %d", len(objects), want)
	}
	for _, name := range []string{"default", "meshd-system"} {
		objects = append(objects, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
	}
	client := fake.NewClientset(objects...)
	factory := informers.NewSharedInformerFactory(client, 0)
	plugin, err := validating.NewPlugin(nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	plugin.SetExternalKubeClientSet(client)
	plugin.SetExternalKubeInformerFactory(factory)
	plugin.SetRESTMapper(testrestmapper.TestOnlyStaticRESTMapper(scheme.Scheme))
	plugin.SetDynamicClient(dynamicfake.NewSimpleDynamicClient(scheme.Scheme))
	plugin.SetUnconditionalAuthorizer(allow{})
	plugin.SetDrainedNotification(ctx.Done())
	plugin.SetAPIServerID("test")
	if err := plugin.ValidateInitialization(); err != nil {
		t.Fatal(err)
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	return plugin
}

type allow struct{}

func (allow) Authorize(context.Context, authorizer.Attributes) (authorizer.Decision, string, error) {
	return authorizer.DecisionAllow, "", nil
}

type write struct {
	kind        schema.GroupVersionKind
	resource    schema.GroupVersionResource
	subresource string
	namespace   string
	name        string
	object, old runtime.Object
	by          user.Info
}

// ask gives the words of the refusal, empty when allowed.
func (w write) ask(plugin *validating.Plugin) string {
	operation, options := admission.Update, runtime.Object(&metav1.UpdateOptions{})
	if w.old == nil {
		operation, options = admission.Create, &metav1.CreateOptions{}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	attributes := admission.NewAttributesRecord(w.object, w.old, w.kind, w.namespace, w.name, w.resource, w.subresource, operation, options, false, w.by)
	if err := plugin.Validate(ctx, attributes, admission.NewObjectInterfacesFromScheme(scheme.Scheme)); err != nil {
		return err.Error()
	}
	return ""
}

func ofNode(object, old *corev1.Node, subresource string, by user.Info) write {
	w := write{
		kind:     corev1.SchemeGroupVersion.WithKind("Node"),
		resource: corev1.SchemeGroupVersion.WithResource("nodes"), subresource: subresource,
		name: object.Name, object: object, by: by,
	}
	if old != nil {
		w.old = old
	}
	return w
}

// The words of each refusal.
const (
	onlyDaemon    = "may be written by the meshd of that node only"
	onlyOperators = "may be written by members of the group meshd:operators only"
	otherNode     = "may not write node"
	unbound       = "with a token that names no node"
	metadata      = "no labels, finalizers, owners or other metadata"
	ownOnly       = "meshd may write its own annotations of its Node only"
	noSpec        = "meshd may not write the spec"
	oneCondition  = "meshd may write the condition NetworkUnavailable"
	noPodCIDRs    = "a kubelet"
	inside        = "must be addresses inside its spec.podCIDRs"
)

func TestWritesOfNodes(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	main, status := "", "status"
	cases := []struct {
		what        string
		by          user.Info
		subresource string
		change      change
		refused     string // empty: allowed
	}{
		// The daemon, its own Node.
		{"the daemon writes its key", daemonA, main, annotate(key, "new"), ""},
		{"the daemon writes its endpoints", daemonA, main, annotate("meshd.dev/endpoints", "192.0.2.1:15190"), ""},
		{"the daemon writes its next key", daemonA, main, annotate("meshd.dev/next-public-key", "x"), ""},
		{"the daemon writes its relay", daemonA, main, annotate("meshd.dev/keyrelay", "x"), ""},
		{"the daemon writes its version", daemonA, main, annotate("meshd.dev/version", "0.2.0"), ""},
		{"the daemon removes its key", daemonA, main, remove(key), ""},
		{"the daemon changes nothing", daemonA, main, nothing, ""},
		{"the daemon writes its overlay addresses", daemonA, main, annotate(overlay, "10.244.1.1,fd00:10:244:1::1"), ""},
		{"the daemon claims a foreign overlay address", daemonA, main, annotate(overlay, "10.244.2.1"), inside},
		{"the daemon claims an outside address among good ones", daemonA, main, annotate(overlay, "10.244.1.1,198.51.100.1"), inside},
		{"the daemon claims no address", daemonA, main, annotate(overlay, "example.org"), inside},
		{"the server's own fields change", daemonA, main, func(n *corev1.Node) {
			n.Annotations[key], n.ResourceVersion, n.Generation = "new", "78", 2
			n.ManagedFields = append(n.ManagedFields, metav1.ManagedFieldsEntry{Manager: "meshd"})
		}, ""},
		{"the daemon writes the operator's annotation", daemonA, main, annotate(endpoint, "x:1"), ownOnly},
		{"the daemon writes an unknown annotation of ours", daemonA, main, annotate("meshd.dev/other", "x"), ownOnly},
		{"the daemon writes a foreign annotation", daemonA, main, annotate("node.alpha.kubernetes.io/ttl", "9"), ownOnly},
		{"the daemon adds a foreign annotation", daemonA, main, annotate("example.org/a", "b"), ownOnly},
		{"the daemon removes a foreign annotation", daemonA, main, remove("node.alpha.kubernetes.io/ttl"), ownOnly},
		{"the daemon adds a label", daemonA, main, func(n *corev1.Node) { n.Labels["site.node-restriction.kubernetes.io/meshd"] = "x" }, metadata},
		{"the daemon changes a label", daemonA, main, func(n *corev1.Node) { n.Labels["kubernetes.io/hostname"] = "x" }, metadata},
		{"the daemon removes all labels", daemonA, main, func(n *corev1.Node) { n.Labels = nil }, metadata},
		{"the daemon removes a finalizer", daemonA, main, func(n *corev1.Node) { n.Finalizers = nil }, metadata},
		{"the daemon adds a finalizer", daemonA, main, func(n *corev1.Node) { n.Finalizers = append(n.Finalizers, "a/b") }, metadata},
		{"the daemon adds an owner", daemonA, main, func(n *corev1.Node) {
			n.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "x", UID: "1"}}
		}, metadata},
		{"the daemon writes a key and a label", daemonA, main, both(annotate(key, "new"), func(n *corev1.Node) { n.Labels["a"] = "b" }), metadata},
		{"the daemon taints", daemonA, main, func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "a", Effect: "NoSchedule"}} }, noSpec},
		{"the daemon cordons", daemonA, main, func(n *corev1.Node) { n.Spec.Unschedulable = true }, noSpec},
		{"the daemon writes podCIDRs", daemonA, main, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.0.0/16"} }, noSpec},
		{"the daemon removes podCIDRs", daemonA, main, func(n *corev1.Node) { n.Spec.PodCIDR, n.Spec.PodCIDRs = "", nil }, noSpec},
		{"the daemon writes a provider id", daemonA, main, func(n *corev1.Node) { n.Spec.ProviderID = "a://b" }, noSpec},
		{"the daemon writes status through the Node", daemonA, main, condition("NetworkUnavailable", "False"), oneCondition},
		// The daemon, its own Node's status.
		{"the daemon adds its condition", daemonA, status, condition("NetworkUnavailable", "True"), ""},
		{"the daemon changes its condition", daemonA, status, condition("NetworkUnavailable", "False"), ""},
		{"the daemon says Ready", daemonA, status, condition("Ready", "False"), oneCondition},
		{"the daemon adds another condition", daemonA, status, condition("MeshUnavailable", "True"), oneCondition},
		{"the daemon removes all conditions", daemonA, status, func(n *corev1.Node) { n.Status.Conditions = nil }, oneCondition},
		{"the daemon reorders conditions", daemonA, status, func(n *corev1.Node) {
			c := n.Status.Conditions
			c[0], c[1] = c[1], c[0]
		}, oneCondition},
		{"the daemon writes addresses", daemonA, status, func(n *corev1.Node) { n.Status.Addresses[0].Address = "198.51.100.1" }, oneCondition},
		{"the daemon adds capacity", daemonA, status, func(n *corev1.Node) { n.Status.Capacity = corev1.ResourceList{}; n.Status.Phase = "Running" }, oneCondition},
		{"the daemon removes addresses", daemonA, status, func(n *corev1.Node) { n.Status.Addresses = nil }, oneCondition},
		{"the daemon writes its key with the status", daemonA, status, annotate(key, "new"), ownOnly},
		{"the daemon writes a label with the status", daemonA, status, func(n *corev1.Node) { n.Labels["a"] = "b" }, metadata},
		{"the daemon writes the condition and Ready", daemonA, status, both(condition("NetworkUnavailable", "False"), condition("Ready", "False")), oneCondition},
		// Daemons of other nodes, tokens of no node.
		{"another node's daemon writes the key", daemonB, main, annotate(key, "new"), otherNode},
		{"another node's daemon removes the key", daemonB, main, remove(key), otherNode},
		{"another node's daemon changes nothing", daemonB, main, nothing, otherNode},
		{"another node's daemon writes the condition", daemonB, status, condition("NetworkUnavailable", "False"), otherNode},
		{"another node's daemon writes the key with the status", daemonB, status, annotate(key, "new"), otherNode},
		{"an unbound token writes the key", daemonUnbound, main, annotate(key, "new"), unbound},
		{"an unbound token writes the condition", daemonUnbound, status, condition("NetworkUnavailable", "False"), unbound},
		{"a token without extra writes the condition", daemonNoExtra, status, condition("NetworkUnavailable", "False"), unbound},
		{"a token with an empty node name writes the condition", daemonEmpty, status, condition("NetworkUnavailable", "False"), unbound},
		// Others.
		{"a neighbour in our namespace writes the key", otherPodA, main, annotate(key, "new"), onlyDaemon},
		{"a namesake elsewhere writes the key", otherNamespace, main, annotate(key, "new"), onlyDaemon},
		{"the kubelet writes the key", kubeletA, main, annotate(key, "new"), onlyDaemon},
		{"the kubelet removes the key", kubeletA, main, remove(key), onlyDaemon},
		{"the kubelet writes the key with the status", kubeletA, status, annotate(key, "new"), onlyDaemon},
		{"the kubelet writes the operator's annotation", kubeletA, main, annotate(endpoint, "x:1"), onlyOperators},
		{"the kubelet writes the operator's annotation with the status", kubeletA, status, annotate(endpoint, "x:1"), onlyOperators},
		{"the kubelet beats", kubeletA, status, condition("Ready", "False"), ""},
		{"the kubelet annotates", kubeletA, status, annotate("volumes.kubernetes.io/controller-managed-attach-detach", "true"), ""},
		{"the kubelet labels", kubeletA, main, func(n *corev1.Node) { n.Labels["a"] = "b" }, ""},
		{"the kubelet writes podCIDRs", kubeletA, main, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.0.0/16"} }, noPodCIDRs},
		{"the kubelet writes podCIDR", kubeletA, main, func(n *corev1.Node) { n.Spec.PodCIDR = "10.244.0.0/16" }, noPodCIDRs},
		{"the kubelet removes podCIDRs", kubeletA, main, func(n *corev1.Node) { n.Spec.PodCIDR, n.Spec.PodCIDRs = "", nil }, noPodCIDRs},
		{"the kubelet adds a podCIDR", kubeletA, main, func(n *corev1.Node) { n.Spec.PodCIDRs = append(n.Spec.PodCIDRs, "fd00::/64") }, noPodCIDRs},
		{"the kubelet writes podCIDRs with the status", kubeletA, status, func(n *corev1.Node) { n.Spec.PodCIDRs = nil }, noPodCIDRs},
		{"a kubelet outside its group writes podCIDRs", kubeletNoGroup, main, func(n *corev1.Node) { n.Spec.PodCIDRs = nil }, noPodCIDRs},
		{"the controller writes podCIDRs", nodeController, main, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.9.0/24"} }, ""},
		{"a tenant writes the key", tenant, main, annotate(key, "new"), onlyDaemon},
		{"a tenant removes the key", tenant, main, remove(key), onlyDaemon},
		{"a tenant writes the key with the status", tenant, status, annotate(key, "new"), onlyDaemon},
		{"a tenant writes the operator's annotation", tenant, main, annotate(endpoint, "x:1"), onlyOperators},
		{"a tenant writes the relay", tenant, main, annotate("meshd.dev/keyrelay", "x"), onlyDaemon},
		{"a tenant writes an unknown annotation of ours", tenant, main, annotate("meshd.dev/x", "y"), onlyDaemon},
		{"a tenant annotates and labels", tenant, main, both(annotate("example.org/a", "b"), func(n *corev1.Node) { n.Labels["a"] = "b" }), ""},
		{"a tenant writes a name that only begins as ours", tenant, main, annotate("meshd.development/a", "b"), ""},
		{"cluster administrators write the key", masters, main, annotate(key, "new"), onlyDaemon},
		{"cluster administrators write the operator's annotation", masters, main, annotate(endpoint, "x:1"), onlyOperators},
		{"somebody without name and groups writes the key", nobody, main, annotate(key, "new"), onlyDaemon},
		{"somebody without name and groups changes nothing", nobody, main, nothing, ""},
		// Operators.
		{"an operator writes the operator's annotation", operator, main, annotate(endpoint, "home.example.org:15190"), ""},
		{"an operator writes it with the status", operator, status, annotate(endpoint, "x:1"), ""},
		{"an operator writes the key", operator, main, annotate(key, "new"), onlyDaemon},
		{"an operator adds endpoints", operator, main, annotate("meshd.dev/endpoints", "x"), onlyDaemon},
		{"an operator removes what a node left", operator, main, both(remove(key), remove("meshd.dev/version")), ""},
	}
	for _, c := range cases {
		t.Run(c.what, func(t *testing.T) {
			old, now := node("a"), node("a")
			c.change(now)
			expect(t, ofNode(now, old, c.subresource, c.by).ask(plugin), c.refused)
		})
	}
	t.Logf("%d writes", len(cases))
}

func TestCreatedNodes(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	noCIDRs := func(n *corev1.Node) { n.Spec.PodCIDR, n.Spec.PodCIDRs = "", nil }
	plain := both(noCIDRs, both(remove(key), remove("meshd.dev/version")))
	for _, c := range []struct {
		what    string
		by      user.Info
		change  change
		refused string
	}{
		{"a kubelet registers", kubeletA, plain, ""},
		{"a kubelet registers with a key", kubeletA, both(plain, annotate(key, "x")), onlyDaemon},
		{"a kubelet registers with an endpoint", kubeletA, both(plain, annotate(endpoint, "x:1")), onlyOperators},
		{"a kubelet registers with podCIDRs", kubeletA, both(plain, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.7.0/24"} }), noPodCIDRs},
		{"a kubelet registers with podCIDR", kubeletA, both(plain, func(n *corev1.Node) { n.Spec.PodCIDR = "10.244.7.0/24" }), noPodCIDRs},
		{"an administrator creates a Node", masters, plain, ""},
		{"an administrator creates a Node with a key", masters, both(plain, annotate(key, "x")), onlyDaemon},
		{"an operator creates a Node with an endpoint", operator, both(plain, annotate(endpoint, "x:1")), ""},
		{"the daemon creates its Node", daemonA, plain, otherNode},
		{"the daemon creates its Node with its key", daemonA, both(plain, annotate(key, "x")), otherNode},
	} {
		t.Run(c.what, func(t *testing.T) {
			now := node("a")
			c.change(now)
			expect(t, ofNode(now, nil, "", c.by).ask(plugin), c.refused)
		})
	}
}

// A policy that fails to evaluate refuses what it should not look at: kubelets' heartbeats would stop.
func TestNodesWithoutAnythingAreNoTrouble(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	for _, by := range []user.Info{daemonA, kubeletA, tenant, operator, masters, nobody} {
		for _, subresource := range []string{"", "status"} {
			expect(t, ofNode(bare("a"), bare("a"), subresource, by).ask(plugin), "")
			changed := bare("a")
			kind := corev1.NodeConditionType("Ready")
			if by == daemonA {
				kind = "NetworkUnavailable"
			}
			changed.Status.Conditions = []corev1.NodeCondition{{Type: kind, Status: "True"}}
			if subresource == "status" {
				expect(t, ofNode(changed, bare("a"), subresource, by).ask(plugin), "")
			}
		}
		if by != daemonA {
			expect(t, ofNode(bare("a"), nil, "", by).ask(plugin), "")
		}
	}
	first := bare("a")
	annotate(key, "x")(first)
	expect(t, ofNode(first, bare("a"), "", daemonA).ask(plugin), "")
	expect(t, ofNode(bare("a"), first, "", daemonA).ask(plugin), "")
}

// A large Node must stay below the cost an evaluation may have.
func TestALargeNodeIsAffordable(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	large := func() *corev1.Node {
		n := node("a")
		for i := range 300 {
			n.Labels[fmt.Sprintf("example.org/label-%d", i)] = strings.Repeat("x", 60)
			n.Annotations[fmt.Sprintf("example.org/annotation-%d", i)] = strings.Repeat("x", 500)
			n.Status.Images = append(n.Status.Images, corev1.ContainerImage{Names: []string{strings.Repeat("i", 200)}, SizeBytes: 1})
		}
		for i := range 200 {
			n.Status.VolumesInUse = append(n.Status.VolumesInUse, corev1.UniqueVolumeName(fmt.Sprint("volume-", i)))
		}
		return n
	}
	now := large()
	annotate(key, "new")(now)
	expect(t, ofNode(now, large(), "", daemonA).ask(plugin), "")
	now = large()
	condition("NetworkUnavailable", "False")(now)
	expect(t, ofNode(now, large(), "status", daemonA).ask(plugin), "")
	expect(t, ofNode(large(), large(), "status", kubeletA).ask(plugin), "")
}

func TestEvents(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	about := func(kind, name string) *eventsv1.Event {
		return &eventsv1.Event{
			TypeMeta:   metav1.TypeMeta{APIVersion: "events.k8s.io/v1", Kind: "Event"},
			ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "default"},
			Regarding:  corev1.ObjectReference{Kind: kind, Name: name},
		}
	}
	legacy := func(kind, name string) *corev1.Event {
		return &corev1.Event{
			TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
			ObjectMeta:     metav1.ObjectMeta{Name: "e", Namespace: "default"},
			InvolvedObject: corev1.ObjectReference{Kind: kind, Name: name},
		}
	}
	const refused = "meshd may tell Events about the Node it runs on only"
	for _, c := range []struct {
		what        string
		by          user.Info
		object, old runtime.Object
		refused     string
	}{
		{"about its own Node", daemonA, about("Node", "a"), nil, ""},
		{"again about its own Node", daemonA, about("Node", "a"), about("Node", "a"), ""},
		{"about another Node", daemonA, about("Node", "b"), nil, refused},
		{"about a Pod of that name", daemonA, about("Pod", "a"), nil, refused},
		{"about nothing", daemonA, about("", ""), nil, refused},
		{"in place of another's", daemonA, about("Node", "a"), about("Node", "b"), refused},
		{"with an unbound token", daemonUnbound, about("Node", "a"), nil, refused},
		{"in the older form, about its own Node", daemonA, legacy("Node", "a"), nil, ""},
		{"in the older form, about another Node", daemonA, legacy("Node", "b"), nil, refused},
		{"by somebody else", tenant, about("Pod", "x"), nil, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			w := write{
				kind: eventsv1.SchemeGroupVersion.WithKind("Event"), resource: eventsv1.SchemeGroupVersion.WithResource("events"),
				namespace: "default", name: "e", object: c.object, old: c.old, by: c.by,
			}
			if _, ok := c.object.(*corev1.Event); ok {
				w.kind, w.resource = corev1.SchemeGroupVersion.WithKind("Event"), corev1.SchemeGroupVersion.WithResource("events")
			}
			expect(t, w.ask(plugin), c.refused)
		})
	}
}

// Namespace and group come from the release and the values.
func TestGroupOfTheOperatorsIsAValue(t *testing.T) {
	plugin := plugin(t, "golden/everything.yaml")
	now := node("a")
	annotate(endpoint, "x:1")(now)
	expect(t, ofNode(now, node("a"), "", as("nina", "", "oidc:network-team")).ask(plugin), "")
	expect(t, ofNode(now, node("a"), "", operator).ask(plugin), "members of the group oidc:network-team only, not by olga")
}

func expect(t *testing.T, said, words string) {
	t.Helper()
	switch {
	case strings.Contains(said, "failed expression") || strings.Contains(said, "resulted in error"):
		t.Errorf("not evaluated: %s", said)
	case words == "" && said != "":
		t.Errorf("refused: %s", said)
	case words != "" && said == "":
		t.Errorf("allowed, expected %q", words)
	case !strings.Contains(said, words):
		t.Errorf("refused with other words than %q: %s", words, said)
	}
}
