package tests

// The API's own description of its objects, from the module of the Kubernetes version that k8s.io/api is pinned to: has every
// object what is required, and would the API server warn of an expression in a policy?

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	"k8s.io/apimachinery/pkg/api/meta/testrestmapper"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/openapi"
	"k8s.io/client-go/openapi/openapitest"
	"k8s.io/kube-openapi/pkg/validation/strfmt"
	"k8s.io/kube-openapi/pkg/validation/validate"
)

type described struct {
	discovery.DiscoveryInterface
	client openapi.Client
}

func (d described) OpenAPIV3() openapi.Client { return d.client }

func schemas(t *testing.T) resolver.SchemaResolver {
	t.Helper()
	output := func(arguments ...string) string {
		command := exec.Command("go", arguments...)
		command.Stderr = os.Stderr
		out, err := command.Output()
		if err != nil {
			t.Fatalf("go %s: %v", strings.Join(arguments, " "), err)
		}
		return strings.TrimSpace(string(out))
	}
	version := output("list", "-m", "-f", "{{.Version}}", "k8s.io/api")
	version = "v1." + strings.TrimPrefix(version, "v0.")
	var module struct{ Dir string }
	if err := json.Unmarshal([]byte(output("mod", "download", "-json", "k8s.io/kubernetes@"+version)), &module); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(module.Dir, "api", "openapi-spec", "v3")
	return &resolver.ClientDiscoveryResolver{Discovery: described{client: openapitest.NewFileClient(folder)}}
}

func TestEveryObjectHasWhatTheAPIRequires(t *testing.T) {
	schemas := schemas(t)
	checked := 0
	for _, path := range goldens(t) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		reader := yaml.NewYAMLReader(bufioReader(text))
		for {
			document, err := reader.Read()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(bytes.TrimSpace(stripComments(document))) == 0 {
				continue
			}
			var object unstructured.Unstructured
			if err := yaml.Unmarshal(document, &object.Object); err != nil {
				t.Fatal(err)
			}
			kind := object.GroupVersionKind()
			if kind.Group == "monitoring.coreos.com" {
				continue
			}
			schema, err := schemas.ResolveSchema(kind)
			if err != nil {
				t.Fatalf("%s: %v", kind, err)
			}
			result := validate.NewSchemaValidator(schema, nil, "", strfmt.Default).Validate(object.Object)
			for _, err := range result.Errors {
				// The published form of a number that may be a text is a text.
				if strings.HasSuffix(err.Error(), `must be of type int-or-string: "int64"`) {
					continue
				}
				t.Errorf("%s: %s %s: %v", path, kind.Kind, object.GetName(), err)
			}
			checked++
		}
	}
	t.Logf("%d objects", checked)
}

func TestTheAPIServerWarnsOfNoExpression(t *testing.T) {
	checker := &validating.TypeChecker{
		SchemaResolver: schemas(t), RestMapper: testrestmapper.TestOnlyStaticRESTMapper(scheme.Scheme),
	}
	for _, object := range decode(t, "golden/default.yaml") {
		if policy, ok := object.(*admissionv1.ValidatingAdmissionPolicy); ok {
			for _, warning := range checker.Check(policy) {
				t.Errorf("%s: %s: %s", policy.Name, warning.FieldRef, warning.Warning)
			}
		}
	}
}

// The two tests above are worth something: they see what they should.
func TestAMistakeIsSeen(t *testing.T) {
	schemas := schemas(t)
	set := unstructured.Unstructured{Object: map[string]any{"apiVersion": "apps/v1", "kind": "DaemonSet", "spec": map[string]any{}}}
	schema, err := schemas.ResolveSchema(set.GroupVersionKind())
	if err != nil {
		t.Fatal(err)
	}
	if validate.NewSchemaValidator(schema, nil, "", strfmt.Default).Validate(set.Object).IsValid() {
		t.Error("a DaemonSet without selector and template is taken")
	}
	checker := &validating.TypeChecker{SchemaResolver: schemas, RestMapper: testrestmapper.TestOnlyStaticRESTMapper(scheme.Scheme)}
	for _, object := range decode(t, "golden/default.yaml") {
		if policy, ok := object.(*admissionv1.ValidatingAdmissionPolicy); ok && policy.Name == "meshd-pod-cidrs" {
			policy.Spec.Validations[0].Expression = "object.spec.noSuchField == ''"
			if len(checker.Check(policy)) == 0 {
				t.Error("an expression on a field that does not exist is taken")
			}
			return
		}
	}
	t.Error("no policy meshd-pod-cidrs")
}
