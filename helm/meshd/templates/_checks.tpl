{{/*
What the schema cannot say. Each refusal is one line that names the value and says what to write.
*/}}
{{- define "meshd.check" -}}
{{- include "meshd.check.given" . -}}
{{- include "meshd.check.prefixes" . -}}
{{- include "meshd.check.namespace" . -}}
{{- include "meshd.check.values" . -}}
{{- include "meshd.check.stateDir" . -}}
{{- /* A cleanup closes nothing, and may be the way out. */ -}}
{{- if not .Values.cleanup.enabled }}{{ include "meshd.check.addresses" . }}{{ end -}}
{{- end }}

{{/* null takes a default away, and so does --reuse-values with an older chart. A list or a map of the user's may be gone. */}}
{{- define "meshd.check.given" -}}
{{- range $path := list "image.repository" "image.tag" "image.digest" "image.pullPolicy" "k8sServiceHost" "k8sServicePort"
  "cni.install" "cni.binDir" "cni.confDir" "cni.confName" "cni.strict" "cni.removeOthers" "listenPort" "shards" "udpGso" "adminPort" "log" "logFormat"
  "kernel.tunName" "kernel.table" "kernel.rulePriority" "kernel.mark" "portMapping" "stateDir" "runDir" "wireguardDir" "machineIdFile" "resources" "maxUnavailable"
  "privileged" "seLinuxType" "operators.group" "keyrelay.enabled" "keyrelay.kind" "keyrelay.port" "keyrelay.tlsPort"
  "keyrelay.adminPort" "keyrelay.replicas" "keyrelay.service.loadBalancerClass" "keyrelay.service.ipFamilyPolicy" "keyrelay.stateDir" "keyrelay.resources"
  "metrics.enabled" "metrics.podMonitor.enabled" "metrics.podMonitor.interval" "metrics.scrapeConfig.enabled" "metrics.rules.operator"
  "metrics.rules.configMap" "metrics.dashboard.enabled" "test.nodes" "test.timeoutSeconds" "cleanup.enabled" -}}
  {{- $at := $.Values -}}
  {{- $seen := list -}}
  {{- range splitList "." $path -}}
    {{- $seen = append $seen . -}}
    {{- if or (not (hasKey $at .)) (kindIs "invalid" (get $at .)) -}}
      {{- fail (printf "%s is null: leave it out, and it has its default (after an upgrade from an older chart: helm upgrade --reset-then-reuse-values)" (join "." $seen)) -}}
    {{- end -}}
    {{- $at = get $at . -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.prefixes" -}}
{{- $cluster := list -}}
{{- range .Values.clusterCIDRs -}}
  {{- $prefix := include "meshd.cidr.parse" . | fromJson -}}
  {{- include "meshd.check.prefix" (dict "prefix" $prefix "value" "clusterCIDRs" "who" "pods") -}}
  {{- if lt (sub $prefix.bits $prefix.length) 2 -}}
    {{- fail (printf "clusterCIDRs: %s is too small: a node needs an address of its own and at least one for a pod" .) -}}
  {{- end -}}
  {{- range $other := $cluster -}}
    {{- if include "meshd.cidr.overlap" (dict "a" $prefix "b" $other) -}}
      {{- fail (printf "clusterCIDRs: %s and %s overlap" $other.text $prefix.text) -}}
    {{- end -}}
  {{- end -}}
  {{- $cluster = append $cluster $prefix -}}
{{- end -}}
{{- range .Values.serviceCIDRs -}}
  {{- $prefix := include "meshd.cidr.parse" . | fromJson -}}
  {{- include "meshd.check.prefix" (dict "prefix" $prefix "value" "serviceCIDRs" "who" "Services") -}}
  {{- $widest := ternary 8 32 (eq (int $prefix.family) 4) -}}
  {{- if lt (int $prefix.length) $widest -}}
    {{- fail (printf "serviceCIDRs: %s is wider than /%d: the guard drops whatever a node sends there; write what kube-apiserver was given as --service-cluster-ip-range" $prefix.text $widest) -}}
  {{- end -}}
  {{- range $other := $cluster -}}
    {{- if include "meshd.cidr.overlap" (dict "a" $prefix "b" $other) -}}
      {{- fail (printf "serviceCIDRs: %s overlaps %s of clusterCIDRs: pods and Services need prefixes of their own" $prefix.text $other.text) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* What no prefix of ours may be. Call with (dict "prefix" PREFIX "value" "clusterCIDRs" "who" "pods"). */}}
{{- define "meshd.check.prefix" -}}
{{- $where := . -}}
{{- include "meshd.check.hostBits" . -}}
{{- if eq (int .prefix.length) 0 }}{{ fail (printf "%s: %s is everything, not a prefix %s can live in" .value .prefix.text .who) }}{{ end -}}
{{- range $what, $reserved := dict "loopback" (list "127.0.0.0/8" "::1/128") "link-local" (list "169.254.0.0/16" "fe80::/10") "multicast or reserved" (list "224.0.0.0/3" "ff00::/8") "unspecified" (list "0.0.0.0/8" "::/128") "IPv4 mapped into IPv6" (list "::ffff:0:0/96") -}}
  {{- range $reserved -}}
    {{- if include "meshd.cidr.overlap" (dict "a" $where.prefix "b" (include "meshd.cidr.parse" . | fromJson)) -}}
      {{- fail (printf "%s: %s is %s, not a prefix %s can live in" $where.value $where.prefix.text $what $where.who) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/*
What carries the mesh lies outside the prefixes of the mesh: the guard lets nothing leave a node in clear to an address inside
them, so a node or an API server there would be cut off, helm's next upgrade with it. Asked of the cluster; `helm template`
has none to ask.
*/}}
{{- define "meshd.check.addresses" -}}
{{- $prefixes := list -}}
{{- range $value := list "clusterCIDRs" "serviceCIDRs" -}}
  {{- range (index $.Values $value) }}{{ $prefixes = append $prefixes (dict "value" $value "prefix" (include "meshd.cidr.parse" . | fromJson)) }}{{ end -}}
{{- end -}}
{{- range $node := (lookup "v1" "Node" "" "").items -}}
  {{- /* Its address inside the mesh is one its pods' prefixes hold. */ -}}
  {{- $overlay := dig "metadata" "annotations" "meshd.dev/overlay" "" $node | splitList "," -}}
  {{- range (dig "status" "addresses" list $node) -}}
    {{- if not (has .address $overlay) -}}
      {{- include "meshd.check.address" (dict "prefixes" $prefixes "address" .address "whose" (printf "%s of node %s" .type $node.metadata.name)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- range $slice := (lookup "discovery.k8s.io/v1" "EndpointSlice" "default" "").items -}}
  {{- if eq (dig "metadata" "labels" "kubernetes.io/service-name" "" $slice) "kubernetes" -}}
    {{- range (dig "endpoints" list $slice) -}}
      {{- range .addresses }}{{ include "meshd.check.address" (dict "prefixes" $prefixes "address" . "whose" (printf "the API server, in EndpointSlice default/%s" $slice.metadata.name)) }}{{ end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- /* The Service itself leads to the API server through kube-proxy, as without k8sServiceHost. Which it is, the cluster knows. */ -}}
{{- $service := lookup "v1" "Service" "default" "kubernetes" -}}
{{- $host := .Values.k8sServiceHost -}}
{{- if not (has $host (dig "spec" "clusterIPs" list $service)) -}}
  {{- $asked := list -}}
  {{- range $prefixes }}{{ if or $service (eq .value "clusterCIDRs") }}{{ $asked = append $asked . }}{{ end }}{{ end -}}
  {{- include "meshd.check.address" (dict "prefixes" $asked "address" $host "whose" "k8sServiceHost") -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.address" -}}
{{- $where := . -}}
{{- with include "meshd.cidr.address" .address -}}
  {{- $address := fromJson . -}}
  {{- range $where.prefixes -}}
    {{- if include "meshd.cidr.covers" (dict "outer" .prefix "inner" $address) -}}
      {{- $advice := "list the prefix of pods alone (kube-controller-manager --cluster-cidr); nodes and the API server need addresses outside it" -}}
      {{- if eq .value "serviceCIDRs" }}{{ $advice = "list what kube-apiserver was given as --service-cluster-ip-range (kubectl get servicecidrs), and where that holds such addresses itself, only the parts of it that hold none" }}{{ end -}}
      {{- fail (printf "%s: %s holds %s (%s): the guard would drop what nodes send there and cut them off; %s" .value .prefix.text $where.address $where.whose $advice) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.hostBits" -}}
{{- $cut := include "meshd.cidr.cut" .prefix -}}
{{- if ne $cut (toJson .prefix.groups) -}}
{{- fail (printf "%s: %s has bits set behind its length; write %s" .value .prefix.text (include "meshd.cidr.network" .prefix)) -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.namespace" -}}
{{- $name := .Release.Namespace -}}
{{- if has $name (list "default" "kube-system" "kube-public" "kube-node-lease") -}}
{{- fail (printf "the namespace %s is no place for meshd: who may create pods beside it can become any node; install with --namespace meshd-system --create-namespace" $name) -}}
{{- end -}}
{{- $namespace := lookup "v1" "Namespace" "" $name -}}
{{- if $namespace -}}
  {{- $level := dig "metadata" "labels" "pod-security.kubernetes.io/enforce" "privileged" $namespace -}}
  {{- if ne $level "privileged" -}}
    {{- fail (printf "the namespace %s admits only %s pods, meshd needs the host's network: kubectl label namespace %s --overwrite pod-security.kubernetes.io/enforce=privileged" $name $level $name) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/*
Addresses of pods that live are kept in stateDir: a daemon that begins with an empty one would give them out again, and the
plugin of the next pod too. Where it is now, the DaemonSet of the release says.
*/}}
{{- define "meshd.check.stateDir" -}}
{{- range $name := list "meshd" "meshd-cleanup" -}}
  {{- $set := lookup "apps/v1" "DaemonSet" $.Release.Namespace $name -}}
  {{- $pod := dig "spec" "template" "spec" dict $set -}}
  {{- range (concat (dig "initContainers" list $pod) (dig "containers" list $pod)) -}}
    {{- range (dig "env" list .) -}}
      {{- if and (eq .name "MESHD_STATE_DIR") (ne (clean .value) (clean $.Values.stateDir)) -}}
        {{- fail (printf "stateDir: nodes keep their key and the addresses of living pods in %s, and with %s they would give those addresses out twice: leave stateDir=%s; to move it, clean the nodes first (cleanup.enabled=true, see docs/guide/install.md), helm uninstall, and install anew" .value $.Values.stateDir .value) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.values" -}}
{{- $v := .Values -}}
{{- if $v.keyrelay.enabled }}{{ include "meshd.check.keyrelay" $v }}{{ end -}}
{{- if not (regexMatch `^$|^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$|^[0-9A-Fa-f:]*:[0-9A-Fa-f:.]+$` $v.k8sServiceHost) -}}
{{- fail (printf "k8sServiceHost: %s: write a name or an address alone, without scheme, brackets and port; the port is k8sServicePort" $v.k8sServiceHost) -}}
{{- end -}}
{{- range $v.keyrelay.keys -}}
  {{- if not (regexMatch `^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$` .) -}}
    {{- fail (printf "keyrelay.keys: %s is no public key: 44 characters, as wg pubkey prints them" .) -}}
  {{- end -}}
{{- end -}}
{{- if and $v.cni.strict $v.cni.removeOthers -}}
{{- fail "cni.strict refuses to install beside another network plugin and cni.removeOthers removes it: choose one" -}}
{{- end -}}
{{- include "meshd.check.folders" . -}}
{{- include "meshd.check.mark" $v.kernel.mark -}}
{{- /* Everybody, or who must not write it, would be an operator. */ -}}
{{- if or (has $v.operators.group (list "system:authenticated" "system:unauthenticated" "system:nodes" "system:serviceaccounts")) (eq $v.operators.group (printf "system:serviceaccounts:%s" .Release.Namespace)) -}}
{{- fail (printf "operators.group: %s holds more than operators: choose a group of their own, like meshd:operators" $v.operators.group) -}}
{{- end -}}
{{- range $v.conditionWriters -}}
  {{- if or (hasPrefix "system:node:" .) (hasPrefix "system:bootstrap:" .) (eq . "system:anonymous") -}}
    {{- fail (printf "conditionWriters: %s is not one to say whether a network is there: name controllers" .) -}}
  {{- end -}}
{{- end -}}
{{- range $name := list $v.kernel.tunName -}}
  {{- if or (hasPrefix "meshp" $name) (has $name (list "." ".." "lo" "all" "default")) -}}
    {{- fail (printf "kernel.tunName: %s is taken: choose another" $name) -}}
  {{- end -}}
{{- end -}}
{{- if and (not $v.metrics.enabled) (or $v.metrics.podMonitor.enabled $v.metrics.scrapeConfig.enabled) -}}
{{- fail "metrics.enabled is false: there is nothing metrics.podMonitor and metrics.scrapeConfig could scrape" -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.keyrelay" -}}
{{- $relay := .keyrelay -}}
{{- if eq $relay.kind "hostNetwork" -}}
  {{- if not $relay.nodeSelector -}}
    {{- fail "keyrelay.nodeSelector: say which nodes with a public address run the keyrelay, like {meshd.dev/keyrelay: \"true\"} after kubectl label node NODE meshd.dev/keyrelay=true" -}}
  {{- end -}}
  {{- /* The daemon's too: both are on the network of the same node. */ -}}
  {{- if eq (int $relay.port) (int .listenPort) -}}
    {{- fail (printf "keyrelay.port and listenPort are both %d: both are UDP ports of the same node" (int .listenPort)) -}}
  {{- end -}}
  {{- if eq (add $relay.port 1) (int .listenPort) -}}
    {{- fail (printf "keyrelay.port: %d, and listenPort is the next one, by which the relay lets nodes measure their NAT: choose another" (int $relay.port)) -}}
  {{- end -}}
  {{- range $name := list "adminPort" "tlsPort" -}}
    {{- if eq (int (get $relay $name)) (int $.adminPort) -}}
      {{- fail (printf "keyrelay.%s and adminPort are both %d: both are TCP ports of the same node" $name (int $.adminPort)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if eq (int $relay.adminPort) (int $relay.tlsPort) -}}
{{- fail (printf "keyrelay.adminPort and keyrelay.tlsPort are both %d: both are TCP ports of the relay" (int $relay.tlsPort)) -}}
{{- end -}}
{{- if eq $relay.kind "service" -}}
  {{- if eq (int $relay.port) 15193 -}}
    {{- fail "keyrelay.port: 15193 is where the relay's Service takes what nodes measure their NAT by: choose another" -}}
  {{- end -}}
  {{- if eq (int $relay.adminPort) 15443 -}}
    {{- fail "keyrelay.adminPort: 15443 is where the relay's pod takes TLS: choose another" -}}
  {{- end -}}
  {{- if lt (int $relay.adminPort) 1024 -}}
    {{- fail (printf "keyrelay.adminPort: %d needs rights the relay's pod does not have: choose one above 1023" (int $relay.adminPort)) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* Our folders are made accessible to root alone, and a cleanup removes them. */}}
{{- define "meshd.check.folders" -}}
{{- $v := .Values -}}
{{- range $name, $path := dict "stateDir" $v.stateDir "runDir" $v.runDir "keyrelay.stateDir" $v.keyrelay.stateDir "cni.binDir" $v.cni.binDir "cni.confDir" $v.cni.confDir "machineIdFile" $v.machineIdFile "wireguardDir" $v.wireguardDir -}}
  {{- if and $path (ne $path (clean $path)) }}{{ fail (printf "%s: %s: write it without . and .." $name $path) }}{{ end -}}
{{- end -}}
{{- $taken := list $v.cni.binDir $v.cni.confDir "/etc/kubernetes" "/etc/cni/net.d" "/etc/ssl" "/opt/cni/bin" "/home" "/root" "/tmp" "/srv" "/mnt" "/media" "/run/containerd" "/var/run/containerd" "/var/cache" "/var/log" "/var/tmp" "/var/lib/cni" "/var/lib/containerd" "/var/lib/docker" "/var/lib/etcd" "/var/lib/kubelet" "/var/lib/rancher" -}}
{{- range $name, $path := dict "stateDir" $v.stateDir "runDir" $v.runDir "keyrelay.stateDir" $v.keyrelay.stateDir -}}
  {{- range $taken -}}
    {{- if or (eq $path .) (hasPrefix (print $path "/") .) }}{{ include "meshd.check.ofTheSystem" (list $name $path) }}{{ end -}}
  {{- end -}}
  {{- range list "/bin" "/boot" "/dev" "/lib" "/proc" "/sbin" "/sys" "/usr" -}}
    {{- if or (eq $path .) (hasPrefix (print . "/") $path) }}{{ include "meshd.check.ofTheSystem" (list $name $path) }}{{ end -}}
  {{- end -}}
  {{- if ne $name "runDir" -}}
    {{- range list "/run/" "/var/run/" "/tmp/" -}}
      {{- if hasPrefix . $path }}{{ fail (printf "%s: %s does not survive a reboot, and what it holds must" $name $path) }}{{ end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if eq $v.stateDir $v.runDir -}}
{{- fail (printf "stateDir and runDir are both %s: one survives a reboot, the other must not" $v.stateDir) -}}
{{- end -}}
{{- if and $v.keyrelay.enabled (has $v.keyrelay.stateDir (list $v.stateDir $v.runDir)) -}}
{{- fail (printf "keyrelay.stateDir: %s is the daemon's too: choose a directory of the relay's own" $v.keyrelay.stateDir) -}}
{{- end -}}
{{- end }}

{{- define "meshd.check.ofTheSystem" -}}
{{- fail (printf "%s: %s belongs to the system: it is made accessible to root alone, choose a directory of its own" (first .) (last .)) -}}
{{- end }}

{{/* As the program reads it: above 0, and no bit of it outside its mask. */}}
{{- define "meshd.check.mark" -}}
{{- $parts := splitList "/" . -}}
{{- $mark := int64 (first $parts) -}}
{{- $mask := int64 (last $parts) -}}
{{- $good := and (gt $mark 0) (le $mark 4294967295) (le $mask 4294967295) -}}
{{- range until 32 -}}
  {{- if gt (mod $mark 2) (mod $mask 2) }}{{ $good = false }}{{ end -}}
  {{- $mark = div $mark 2 -}}
  {{- $mask = div $mask 2 -}}
{{- end -}}
{{- if not $good -}}
{{- fail (printf "kernel.mark: %s: write MARK/MASK with a mark above 0 inside the mask, like 0x4/0x4" .) -}}
{{- end -}}
{{- end }}
