package tests

// Who may write the condition NetworkUnavailable of a Node, and that it is there once.

import (
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
)

const (
	network     = "NetworkUnavailable"
	onlyNetwork = "the condition NetworkUnavailable of node a may be written by the meshd of that node only"
	once        = "a Node has the condition NetworkUnavailable once only"
	onceDaemon  = "meshd may write the condition NetworkUnavailable of its Node once only"
)

// told is a Node of which its daemon has told how its network stands.
func told() *corev1.Node {
	n := node("a")
	at := metav1.NewTime(time.Unix(1800000000, 0))
	n.Status.Conditions = slices.Insert(n.Status.Conditions, 1, corev1.NodeCondition{
		Type: network, Status: "True", Reason: "MeshNotReady", Message: "m", LastHeartbeatTime: at, LastTransitionTime: at,
	})
	return n
}

// again adds a second entry of the type, as it is or with another status.
func again(status string) change {
	return func(n *corev1.Node) {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: network, Status: corev1.ConditionStatus(status)})
	}
}

func without(kind string) change {
	return func(n *corev1.Node) {
		n.Status.Conditions = slices.DeleteFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return string(c.Type) == kind })
	}
}

func reworded(n *corev1.Node) { n.Status.Conditions[1].Message = "another" }
func beats(n *corev1.Node)    { n.Status.Conditions[1].LastHeartbeatTime.Time = time.Unix(1900000000, 0) }

func TestTheConditionIsTheDaemons(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	controller := func(name string) user.Info { return as("system:serviceaccount:kube-system:"+name, "") }
	for _, c := range []struct {
		what        string
		by          user.Info
		before, now change
		refused     string
	}{
		{"the daemon turns it", daemonA, nothing, condition(network, "False"), ""},
		{"the daemon tells it first", daemonA, without(network), again("True"), ""},
		{"the daemon takes it away", daemonA, nothing, without(network), ""},
		{"the daemon tells it twice", daemonA, nothing, again("False"), onceDaemon},
		{"the daemon tells two at once", daemonA, without(network), both(again("True"), again("False")), onceDaemon},
		{"the daemon puts one in place of two", daemonA, again("False"), both(without(network), again("False")), ""},
		{"the kubelet beats beside it", kubeletA, nothing, condition("Ready", "False"), ""},
		{"the kubelet tells another condition first", kubeletA, nothing, condition("PIDPressure", "False"), ""},
		{"the kubelet beats where there are two", kubeletA, again("False"), condition("Ready", "False"), ""},
		{"the kubelet beats where there is none", kubeletA, without(network), condition("Ready", "False"), ""},
		{"the kubelet turns it", kubeletA, nothing, condition(network, "False"), onlyNetwork},
		{"the kubelet tells it first", kubeletA, without(network), again("False"), onlyNetwork},
		{"the kubelet rewords it", kubeletA, nothing, reworded, onlyNetwork},
		{"the kubelet renews it", kubeletA, nothing, beats, onlyNetwork},
		{"the kubelet takes it away", kubeletA, nothing, without(network), onlyNetwork},
		{"the kubelet takes all away", kubeletA, nothing, func(n *corev1.Node) { n.Status.Conditions = nil }, onlyNetwork},
		{"the kubelet adds a second", kubeletA, nothing, again("False"), onlyNetwork},
		{"the kubelet adds the same again", kubeletA, nothing, func(n *corev1.Node) {
			n.Status.Conditions = append(n.Status.Conditions, n.Status.Conditions[1])
		}, onlyNetwork},
		{"a tenant turns it", tenant, nothing, condition(network, "False"), onlyNetwork},
		{"a tenant tells it first", tenant, without(network), again("True"), onlyNetwork},
		{"a tenant takes one of two", tenant, again("False"), func(n *corev1.Node) {
			n.Status.Conditions = slices.Delete(n.Status.Conditions, 1, 2)
		}, onlyNetwork},
		{"cluster administrators turn it", masters, nothing, condition(network, "False"), onlyNetwork},
		{"operators turn it", operator, nothing, condition(network, "False"), onlyNetwork},
		{"a neighbour in our namespace turns it", otherPodA, nothing, condition(network, "False"), onlyNetwork},
		{"a namesake elsewhere turns it", otherNamespace, nothing, condition(network, "False"), onlyNetwork},
		{"somebody without a name turns it", nobody, nothing, condition(network, "False"), onlyNetwork},
		{"kube-controller-manager turns it", as("system:kube-controller-manager", ""), nothing, condition(network, "False"), ""},
		{"the node controller turns it", nodeController, nothing, condition(network, "False"), ""},
		{"the route controller turns it", controller("route-controller"), nothing, condition(network, "False"), ""},
		{"the route controller tells it first", controller("route-controller"), without(network), again("True"), ""},
		{"a cloud's controller turns it", controller("cloud-controller-manager"), nothing, condition(network, "False"), ""},
		{"a cloud's controller adds a second", controller("cloud-controller-manager"), nothing, again("False"), once},
		{"another controller turns it", controller("daemon-set-controller"), nothing, condition(network, "False"), onlyNetwork},
		{"a namesake of the route controller elsewhere turns it", as("system:serviceaccount:tenant:route-controller", ""), nothing,
			condition(network, "False"), onlyNetwork},
	} {
		t.Run(c.what, func(t *testing.T) {
			old := told()
			c.before(old)
			now := old.DeepCopy()
			c.now(now)
			expect(t, ofNode(now, old, "status", c.by).ask(plugin), c.refused)
		})
	}
}

// The API server takes a whole status with a new Node.
func TestNobodyMakesANodeWithTheCondition(t *testing.T) {
	plugin := plugin(t, "golden/default.yaml")
	for _, c := range []struct {
		what    string
		by      user.Info
		now     change
		refused string
	}{
		{"a kubelet registers", kubeletA, condition("Ready", "False"), ""},
		{"a kubelet registers with the condition", kubeletA, condition(network, "False"), onlyNetwork},
		{"an administrator makes one", masters, condition(network, "True"), onlyNetwork},
		{"a controller makes one", as("system:cloud-controller-manager", ""), condition(network, "True"), ""},
		{"a controller makes one with two", as("system:cloud-controller-manager", ""), both(again("True"), again("False")), once},
	} {
		t.Run(c.what, func(t *testing.T) {
			now := bare("a")
			c.now(now)
			expect(t, ofNode(now, nil, "", c.by).ask(plugin), c.refused)
		})
	}
}

func TestWritersOfTheConditionAreAValue(t *testing.T) {
	plugin := plugin(t, "golden/everything.yaml")
	for name, refused := range map[string]string{
		"system:serviceaccount:kube-system:hcloud-cloud-controller-manager": "",
		"oidc:routes@example.org": "", "system:serviceaccount:kube-system:route-controller": "", "olga": onlyNetwork,
	} {
		now := told()
		condition(network, "False")(now)
		expect(t, ofNode(now, told(), "status", as(name, "")).ask(plugin), refused)
	}
}
