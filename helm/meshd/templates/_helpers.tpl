{{/* Labels of every object. Call with (dict "ctx" $ "component" "node"). */}}
{{- define "meshd.labels" -}}
{{ include "meshd.selector" . }}
app.kubernetes.io/version: {{ .ctx.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .ctx.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .ctx.Chart.Name .ctx.Chart.Version }}
{{- end }}

{{/* What selects the pods of one component: never changes. */}}
{{- define "meshd.selector" -}}
app.kubernetes.io/name: meshd
app.kubernetes.io/instance: {{ .ctx.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "meshd.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* The user name of the daemon's service account. */}}
{{- define "meshd.user" -}}
system:serviceaccount:{{ .Release.Namespace }}:meshd
{{- end }}

{{/* Who may write the condition NetworkUnavailable beside the daemons, as a JSON list of user names. */}}
{{- define "meshd.conditionWriters" -}}
{{- /* Those with a loop that makes routes, or that may run one, in and outside of kube-controller-manager. */ -}}
{{- $own := list "system:kube-controller-manager" "system:cloud-controller-manager" -}}
{{- range list "node-controller" "route-controller" "cloud-controller-manager" }}{{ $own = append $own (print "system:serviceaccount:kube-system:" .) }}{{ end -}}
{{- concat $own (.Values.conditionWriters | default list) | uniq | toJson -}}
{{- end }}

{{/* Annotations a daemon writes on its own Node, as a CEL list. */}}
{{- define "meshd.daemonKeys" -}}
['meshd.dev/public-key', 'meshd.dev/endpoints', 'meshd.dev/next-public-key', 'meshd.dev/keyrelay', 'meshd.dev/overlay', 'meshd.dev/version']
{{- end }}

{{/* Confinement of the pods that use paths and the network of the host. */}}
{{- define "meshd.podSecurity" -}}
runAsUser: 0
runAsGroup: 0
seccompProfile:
  type: RuntimeDefault
{{- with .Values.seLinuxType }}
seLinuxOptions:
  type: {{ . }}
{{- end }}
{{- end }}

{{/* Call with (dict "ctx" $ "add" (list "NET_ADMIN")). */}}
{{- define "meshd.containerSecurity" -}}
{{- if and .ctx.Values.privileged (has "NET_ADMIN" .add) -}}
privileged: true
readOnlyRootFilesystem: true
{{- else -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with .add }}
  add: [{{ join ", " . }}]
  {{- end }}
{{- end }}
{{- end }}

{{/* Capabilities of a container on the host's network that listens on ports, as a JSON list: ports below 1024 need one of their
own. Call with (dict "add" (list "NET_ADMIN") "ports" (list 15190)). */}}
{{- define "meshd.capabilities" -}}
{{- $add := .add -}}
{{- range .ports }}{{ if lt (int .) 1024 }}{{ $add = append $add "NET_BIND_SERVICE" | uniq }}{{ end }}{{ end -}}
{{- toJson $add -}}
{{- end }}

{{/* Names of our objects in the kernel and places of our files, as environment. */}}
{{- define "meshd.places" -}}
- name: MESHD_STATE_DIR
  value: {{ .Values.stateDir | quote }}
- name: MESHD_RUN_DIR
  value: {{ .Values.runDir | quote }}
- name: MESHD_TUN_NAME
  value: {{ .Values.kernel.tunName | quote }}
- name: MESHD_TABLE
  value: {{ .Values.kernel.table | int64 | quote }}
- name: MESHD_RULE_PRIORITY
  value: {{ .Values.kernel.rulePriority | int64 | quote }}
- name: MESHD_MARK
  value: {{ .Values.kernel.mark | quote }}
{{- end }}

{{/* A token of the pod, and what else a client of the API server reads. */}}
{{- define "meshd.tokenSources" -}}
- serviceAccountToken:
    path: token
    expirationSeconds: 3607
- configMap:
    name: kube-root-ca.crt
    items:
      - {key: ca.crt, path: ca.crt}
- downwardAPI:
    items:
      - path: namespace
        fieldRef:
          fieldPath: metadata.namespace
{{- end }}

{{/* The user name of the relays' service account. */}}
{{- define "meshd.relayUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:meshd-keyrelay
{{- end }}
