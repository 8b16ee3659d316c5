package tests

// Values, schema and program agree.

import (
	"encoding/json"
	"os"
	"regexp"
	"sort"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Free maps of the schema: their keys are the user's.
var free = map[string]bool{
	"global": true, "keyrelay.nodeSelector": true, "metrics.podMonitor.labels": true, "metrics.rules.labels": true,
	"metrics.dashboard.labels": true, "keyrelay.service.annotations": true, "keyrelay.hosts": true,
}

type description struct {
	Properties           map[string]description
	AdditionalProperties any
	Type                 any
}

// walk gives the names of all values of the schema and complains of maps that take anything.
func walk(t *testing.T, prefix string, d description, into map[string]bool) {
	t.Helper()
	for name, property := range d.Properties {
		path := strings.TrimPrefix(prefix+"."+name, ".")
		into[path] = true
		if property.Type == "object" && !free[path] {
			if closed, ok := property.AdditionalProperties.(bool); !ok || closed {
				t.Errorf("%s takes unknown values", path)
			}
			walk(t, path, property, into)
		}
	}
}

func TestValuesAndSchemaNameTheSame(t *testing.T) {
	var schema description
	if err := json.Unmarshal([]byte(read(t, "../meshd/values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	if closed, ok := schema.AdditionalProperties.(bool); !ok || closed {
		t.Error("the schema takes unknown values")
	}
	inSchema := map[string]bool{}
	walk(t, "", schema, inSchema)
	var values map[string]any
	if err := yaml.UnmarshalStrict([]byte(read(t, "../meshd/values.yaml")), &values); err != nil {
		t.Fatal(err)
	}
	inValues := map[string]bool{"global": true, "clusterCIDRs": true}
	var visit func(string, map[string]any)
	visit = func(prefix string, values map[string]any) {
		for name, value := range values {
			path := strings.TrimPrefix(prefix+"."+name, ".")
			inValues[path] = true
			if inner, ok := value.(map[string]any); ok && !free[path] {
				visit(path, inner)
			}
		}
	}
	visit("", values)
	for _, pair := range []struct {
		a, b map[string]bool
		says string
	}{{inSchema, inValues, "values.yaml does not show"}, {inValues, inSchema, "the schema does not know"}} {
		var missing []string
		for name := range pair.a {
			if !pair.b[name] {
				missing = append(missing, name)
			}
		}
		sort.Strings(missing)
		if len(missing) > 0 {
			t.Errorf("%s %s", pair.says, strings.Join(missing, ", "))
		}
	}
}

func find(t *testing.T, path, pattern string) string {
	t.Helper()
	match := regexp.MustCompile("(?m)" + pattern).FindStringSubmatch(read(t, path))
	if match == nil {
		t.Fatalf("%s holds no %s", path, pattern)
	}
	return match[1]
}

func TestTheChartIsOfTheVersionOfThePrograms(t *testing.T) {
	program := find(t, "../../Cargo.toml", `^version = "([^"]+)"`)
	for _, field := range []string{"version", "appVersion"} {
		if chart := find(t, "../meshd/Chart.yaml", "^"+field+`: "?([^"\n]+)"?$`); chart != program {
			t.Errorf("%s of the chart is %s, the programs are %s", field, chart, program)
		}
	}
}

func TestDefaultsAreThoseOfThePrograms(t *testing.T) {
	const rust = "../../crates/mesh-types/src/defaults.rs"
	for value, constant := range map[string]string{
		"listenPort: ": "UDP_PORT: u16 = ", "adminPort: ": "ADMIN_PORT: u16 = ", "  port: ": "KEYRELAY_PORT: u16 = ",
		"  table: ": "TABLE: u32 = ", "  rulePriority: ": "RULE_PRIORITY: u32 = ",
		"  tunName: ": "TUN_NAME: &str = ", "stateDir: ": "STATE_DIR: &str = ", "runDir: ": "RUN_DIR: &str = ",
	} {
		chart := find(t, "../meshd/values.yaml", "^"+value+`(\S+)$`)
		if program := find(t, rust, "^pub const "+constant+`"?([^";]+)"?;`); strings.ReplaceAll(program, "_", "") != chart {
			t.Errorf("%s%s: the programs have %s", value, chart, program)
		}
	}
	if label := find(t, "../../meshd/src/args.rs", `env = "MESHD_LOG",\s+default_value = "([^"]+)"`); label != find(t, "../meshd/values.yaml", `^log: (\S+)$`) {
		t.Errorf("log: the program has %s", label)
	}
}
