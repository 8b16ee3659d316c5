package tests

// Every object of every golden render is what its type says: unknown and doubled fields are errors.

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

func init() {
	// Makes PodMonitor and PrometheusRule known.
	if err := monitoringv1.AddToScheme(scheme.Scheme); err != nil {
		panic(err)
	}
}

func decode(t *testing.T, path string) []runtime.Object {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true})
	reader := yaml.NewYAMLReader(bufioReader(text))
	var objects []runtime.Object
	for {
		document, err := reader.Read()
		if err == io.EOF {
			return objects
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if len(bytes.TrimSpace(stripComments(document))) == 0 {
			continue
		}
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			t.Fatalf("%s: %v\n%s", path, err, document)
		}
		objects = append(objects, object)
	}
}

func goldens(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob("golden/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no golden renders (%v): run helm/tests/run --update", err)
	}
	return paths
}

func TestEveryObjectIsWhatItsTypeSays(t *testing.T) {
	count := 0
	for _, path := range goldens(t) {
		count += len(decode(t, path))
	}
	t.Logf("%d objects", count)
}

// What the pod may do is spelled out here too, so that a change of it is seen twice.
func TestTheDaemonsPrivileges(t *testing.T) {
	pod := daemonSet(t, "golden/default.yaml", "meshd").Spec.Template.Spec
	if !pod.HostNetwork || pod.HostPID || pod.HostIPC {
		t.Errorf("host namespaces: network %v, processes %v, IPC %v", pod.HostNetwork, pod.HostPID, pod.HostIPC)
	}
	if *pod.AutomountServiceAccountToken || *pod.EnableServiceLinks {
		t.Error("token or links of Services in every container")
	}
	want := map[string]string{"install-cni": "DAC_OVERRIDE", "meshd": "NET_ADMIN"}
	for _, container := range append(pod.InitContainers, pod.Containers...) {
		c := container.SecurityContext
		if *c.Privileged || *c.AllowPrivilegeEscalation || !*c.ReadOnlyRootFilesystem || c.Capabilities.Drop[0] != "ALL" ||
			len(c.Capabilities.Add) != 1 || string(c.Capabilities.Add[0]) != want[container.Name] {
			t.Errorf("%s: %+v", container.Name, c)
		}
		if len(container.Ports) != 0 {
			t.Errorf("%s declares ports: on the host's network each is a hostPort", container.Name)
		}
		if _, limited := container.Resources.Limits[corev1.ResourceCPU]; limited {
			t.Errorf("%s has a CPU limit", container.Name)
		}
	}
	var paths []string
	for _, volume := range pod.Volumes {
		if volume.HostPath != nil {
			paths = append(paths, volume.HostPath.Path)
		}
	}
	got := strings.Join(paths, " ")
	if want := "/var/lib/meshd /run/meshd /var/run/wireguard /dev/net /proc/sys/net /proc/sys/kernel/random/boot_id /etc/machine-id /opt/cni/bin /etc/cni/net.d"; got != want {
		t.Errorf("paths of the host: %s, expected %s", got, want)
	}
}

func TestPortsBelow1024AreAllowedWhereThereAreSome(t *testing.T) {
	for path, want := range map[string]string{"golden/keyrelay.yaml": "[]", "golden/everything.yaml": "[NET_BIND_SERVICE]"} {
		container := daemonSet(t, path, "meshd-keyrelay").Spec.Template.Spec.Containers[0]
		if got := fmt.Sprint(container.SecurityContext.Capabilities.Add); got != want {
			t.Errorf("%s: %s, expected %s", path, got, want)
		}
	}
}

func TestOneDaemonAtATimeAndItsPredecessorFirst(t *testing.T) {
	set := daemonSet(t, "golden/default.yaml", "meshd")
	rolling := set.Spec.UpdateStrategy.RollingUpdate
	if rolling.MaxUnavailable.IntValue() != 1 || rolling.MaxSurge.IntValue() != 0 {
		t.Errorf("update: %+v", rolling)
	}
	pod := set.Spec.Template.Spec
	if pod.PriorityClassName != "system-node-critical" || len(pod.Tolerations) != 1 || pod.Tolerations[0].Key != "" || pod.Tolerations[0].Operator != "Exists" {
		t.Errorf("priority %s, tolerations %+v", pod.PriorityClassName, pod.Tolerations)
	}
}

func TestCleanupReplacesTheDaemonAndNeverForces(t *testing.T) {
	for _, object := range decode(t, "golden/cleanup.yaml") {
		if set, ok := object.(*appsv1.DaemonSet); ok && set.Name != "meshd-cleanup" {
			t.Errorf("%s stays beside the cleanup", set.Name)
		}
	}
	pod := daemonSet(t, "golden/cleanup.yaml", "meshd-cleanup").Spec.Template.Spec
	if first := strings.Join(pod.InitContainers[0].Command, " "); first != "/usr/bin/meshd uninstall --by-host-copy" {
		t.Errorf("first: %s", first)
	}
}

func daemonSet(t *testing.T, path, name string) *appsv1.DaemonSet {
	t.Helper()
	for _, object := range decode(t, path) {
		if set, ok := object.(*appsv1.DaemonSet); ok && set.Name == name {
			return set
		}
	}
	t.Fatalf("%s holds no DaemonSet %s", path, name)
	return nil
}
