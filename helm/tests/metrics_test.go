package tests

// Dashboard, alerts and scrape configuration: expressions parse, and every metric they name is one the daemon has.

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metricsql"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// Where the metrics of the daemon, and of the relay, are named.
var sources = []string{
	"../../meshd/src/metrics.rs", "../../meshd/src/io/snapshot.rs", "../../meshd/src/plane.rs",
	"../../keyrelay/src/metrics.rs", "../../keyrelay/src/core/counters.rs",
}

var (
	metric = regexp.MustCompile(`\b(meshd|keyrelay)_[a-z_]+`)
	reason = regexp.MustCompile(`reason=~?"([a-z_.*|]+)"`)
)

// named tells whether the daemon's source holds the name, without prefix and the suffixes of OpenMetrics.
func named(t *testing.T, name string) bool {
	t.Helper()
	_, name, _ = strings.Cut(name, "_")
	for _, suffix := range []string{"_total", "_seconds", "_bytes"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return quoted(t, name)
}

func quoted(t *testing.T, text string) bool {
	t.Helper()
	for _, path := range sources {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(source), `"`+text+`"`) {
			return true
		}
	}
	return false
}

func check(t *testing.T, where, expression string) {
	t.Helper()
	plain := strings.NewReplacer("$__rate_interval", "5m", "$node", ".*").Replace(expression)
	if _, err := metricsql.Parse(plain); err != nil {
		t.Errorf("%s: %s: %v", where, expression, err)
	}
	names := metric.FindAllString(expression, -1)
	for _, name := range names {
		if !named(t, name) {
			t.Errorf("%s: the daemon has no metric %s", where, name)
		}
	}
	if len(names) == 0 && !strings.HasPrefix(expression, "up{") {
		t.Errorf("%s names no metric of ours: %s", where, expression)
	}
	for _, match := range reason.FindAllStringSubmatch(expression, -1) {
		for _, exact := range strings.Split(match[1], "|") {
			if !strings.HasSuffix(exact, ".*") && !quoted(t, exact) {
				t.Errorf("%s: nobody counts the reason %s", where, exact)
			}
		}
	}
}

func TestADaemonWithoutAMetricIsNoticed(t *testing.T) {
	if named(t, "meshd_no_such_metric_total") || named(t, "keyrelay_no_such_total") || !named(t, "keyrelay_not_ready") || !named(t, "meshd_peer_received_bytes_total") {
		t.Error("names are not found as they should be")
	}
}

func TestAlertsNameWhatTheDaemonCounts(t *testing.T) {
	text, err := os.ReadFile("../meshd/files/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rules monitoringv1.PrometheusRuleSpec
	if err := yaml.UnmarshalStrict(text, &rules); err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			count++
			check(t, rule.Alert, rule.Expr.String())
			if rule.Annotations["summary"] == "" || rule.Labels["severity"] == "" {
				t.Errorf("%s has no summary or severity", rule.Alert)
			}
		}
	}
	if count < 8 {
		t.Errorf("%d alerts", count)
	}
}

// The alert says for which conditions the scheduler keeps pods away, as the daemon decides it.
func TestTheAlertOfConditionsNamesThoseThatKeepNoPodsAway(t *testing.T) {
	needed := find(t, "../../meshd/src/kube/verdict.rs", `PODS_NEED: \[&str; [0-9]+\] = \[([^\]]*)\]`)
	var kept []string
	for _, match := range regexp.MustCompile(`pub const ([A-Z_]+): &str = "([a-z-]+)";`).FindAllStringSubmatch(read(t, "../../meshd/src/view.rs"), -1) {
		if !strings.Contains(needed, "condition::"+match[1]+",") {
			kept = append(kept, match[2])
		}
	}
	last := len(kept) - 1
	if last < 1 {
		t.Fatalf("conditions no pod needs: %v", kept)
	}
	words := "While " + strings.Join(kept[:last], ", ") + " or " + kept[last] + " does not hold, the node takes new pods"
	has(t, read(t, "../meshd/files/rules.yaml"), words)
}

func TestTheDashboardNamesWhatTheDaemonCounts(t *testing.T) {
	text, err := os.ReadFile("../meshd/files/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			GridPos struct{ H, W, X, Y int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	for i, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			check(t, panel.Title, target.Expr)
		}
		if at := panel.GridPos; at.X+at.W > 24 {
			t.Errorf("%s lies beside the page", panel.Title)
		}
		for _, other := range dashboard.Panels[:i] {
			a, b := panel.GridPos, other.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("%s lies on %s", panel.Title, other.Title)
			}
		}
	}
	if len(dashboard.Panels) < 10 {
		t.Errorf("%d panels", len(dashboard.Panels))
	}
}

// The target of a scrape is the first overlay address, whatever its family, on our port.
func TestScrapesGoToTheOverlay(t *testing.T) {
	type relabeling struct {
		SourceLabels             []string `json:"source_labels"`
		Regex, Action            string
		TargetLabel, Replacement string
	}
	addresses := map[string]string{
		"10.244.1.1": "10.244.1.1:15291", "10.244.1.1,fd00::1": "10.244.1.1:15291",
		"fd00::1": "[fd00::1]:15291", "fd00::1,10.244.1.1": "[fd00::1]:15291",
	}
	apply := func(rules []relabeling, value string) (address string) {
		for _, rule := range rules {
			if rule.TargetLabel != "__address__" {
				continue
			}
			// Prometheus anchors.
			whole := regexp.MustCompile("^(?:" + rule.Regex + ")$")
			if match := whole.FindStringSubmatchIndex(value); match != nil {
				address = string(whole.ExpandString(nil, rule.Replacement, value, match))
			}
		}
		return address
	}
	seen := 0
	for _, object := range decode(t, "golden/everything.yaml") {
		var rules []relabeling
		switch object := object.(type) {
		case *monitoringv1.PodMonitor:
			for _, r := range object.Spec.PodMetricsEndpoints[0].RelabelConfigs {
				rules = append(rules, relabeling{Regex: r.Regex, TargetLabel: r.TargetLabel, Replacement: *orEmpty(r.Replacement)})
			}
		case *corev1.ConfigMap:
			if object.Name != "meshd-scrape" {
				continue
			}
			var file struct {
				ScrapeConfigs []struct {
					JobName        string `json:"job_name"`
					RelabelConfigs []struct {
						SourceLabels []string `json:"source_labels"`
						Regex        string   `json:"regex"`
						Action       string   `json:"action"`
						TargetLabel  string   `json:"target_label"`
						Replacement  string   `json:"replacement"`
					} `json:"relabel_configs"`
					Discovery []map[string]string `json:"kubernetes_sd_configs"`
				} `json:"scrape_configs"`
			}
			if err := yaml.UnmarshalStrict([]byte(object.Data["meshd-scrape.yaml"]), &file); err != nil {
				t.Fatal(err)
			}
			for _, r := range file.ScrapeConfigs[0].RelabelConfigs {
				rules = append(rules, relabeling{Regex: r.Regex, TargetLabel: r.TargetLabel, Replacement: r.Replacement})
			}
		default:
			continue
		}
		seen++
		for value, want := range addresses {
			if got := apply(rules, value); got != want {
				t.Errorf("%T: %s becomes %s, expected %s", object, value, got, want)
			}
		}
	}
	if seen != 2 {
		t.Errorf("%d scrape configurations, expected 2", seen)
	}
}

func orEmpty(text *string) *string {
	if text == nil {
		return new(string)
	}
	return text
}
