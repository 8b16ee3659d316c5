{{/*
Arithmetic on prefixes, which neither Helm nor JSON schema has. A prefix is a list of 16-bit groups, two for IPv4 and
eight for IPv6, and a length in bits.

  meshd.cidr.parse TEXT              -> JSON {"family": 4|6, "bits": 32|128, "length": n, "groups": [n, …], "text": TEXT}
  meshd.cidr.address TEXT            -> the same for an address alone, with all its bits; nothing where it is none
  meshd.cidr.overlap {a, b}          -> "yes" or nothing
  meshd.cidr.covers {outer, inner}   -> "yes" or nothing
meshd.cidr.parse refuses text that is no prefix.
*/}}
{{- define "meshd.cidr.parse" -}}
{{- $read := include "meshd.cidr.read" . | fromJson -}}
{{- with $read.wrong }}{{ fail (printf "%s is no prefix: %s" $read.text .) }}{{ end -}}
{{- toJson $read -}}
{{- end }}

{{- define "meshd.cidr.address" -}}
{{- $read := include "meshd.cidr.read" (printf "%s/%d" . (ternary 128 32 (contains ":" .))) | fromJson -}}
{{- if not $read.wrong }}{{ toJson $read }}{{ end -}}
{{- end }}

{{- define "meshd.cidr.read" -}}
{{- $v4 := `^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])/(3[0-2]|[12]?[0-9])$` -}}
{{- $v6 := `^(([0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}|([0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4}){0,6})?::([0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4}){0,6})?)/(12[0-8]|1[01][0-9]|[1-9]?[0-9])$` -}}
{{- $wrong := "" -}}
{{- if not (or (regexMatch $v4 .) (regexMatch $v6 .)) }}{{ $wrong = "write ADDRESS/LENGTH, like 10.244.0.0/16 or fd00:10:244::/48" }}{{ end -}}
{{- $parts := splitList "/" . -}}
{{- $address := first $parts -}}
{{- $groups := list -}}
{{- $family := 4 -}}
{{- if and (not $wrong) (contains ":" $address) -}}
  {{- $family = 6 -}}
  {{- $halves := splitList "::" $address -}}
  {{- $head := list -}}
  {{- range (splitList ":" (first $halves)) }}{{ if . }}{{ $head = append $head . }}{{ end }}{{ end -}}
  {{- $tail := list -}}
  {{- if gt (len $halves) 1 -}}
    {{- range (splitList ":" (last $halves)) }}{{ if . }}{{ $tail = append $tail . }}{{ end }}{{ end -}}
  {{- end -}}
  {{- $zeros := sub 8 (add (len $head) (len $tail)) | int -}}
  {{- if lt $zeros (sub (len $halves) 1 | int) }}{{ $wrong = ":: stands for one group at least, and there are eight in all" }}{{ end -}}
  {{- range $head }}{{ $groups = append $groups (int64 (printf "0x%s" .)) }}{{ end -}}
  {{- range until (max $zeros 0 | int) }}{{ $groups = append $groups (int64 0) }}{{ end -}}
  {{- range $tail }}{{ $groups = append $groups (int64 (printf "0x%s" .)) }}{{ end -}}
{{- else if not $wrong -}}
  {{- $o := splitList "." $address -}}
  {{- $groups = list (add (mul (atoi (index $o 0)) 256) (atoi (index $o 1))) (add (mul (atoi (index $o 2)) 256) (atoi (index $o 3))) -}}
{{- end -}}
{{- if $wrong -}}
{{- dict "wrong" $wrong "text" . | toJson -}}
{{- else -}}
{{- dict "family" $family "bits" (mul 16 (len $groups)) "length" (last $parts | atoi) "groups" $groups "text" . | toJson -}}
{{- end -}}
{{- end }}

{{/* The first `length` bits of `groups`, the rest zero, as a JSON list. */}}
{{- define "meshd.cidr.cut" -}}
{{- $cut := list -}}
{{- $left := int .length -}}
{{- range .groups -}}
  {{- $keep := min (max $left 0) 16 | int -}}
  {{- $size := 1 -}}
  {{- range until (int (sub 16 $keep)) }}{{ $size = mul $size 2 }}{{ end -}}
  {{- $cut = append $cut (mul (div (int64 .) $size) $size) -}}
  {{- $left = sub $left 16 | int -}}
{{- end -}}
{{- toJson $cut -}}
{{- end }}

{{- define "meshd.cidr.overlap" -}}
{{- if eq (int .a.family) (int .b.family) -}}
  {{- $length := min (int .a.length) (int .b.length) -}}
  {{- $a := include "meshd.cidr.cut" (dict "groups" .a.groups "length" $length) -}}
  {{- $b := include "meshd.cidr.cut" (dict "groups" .b.groups "length" $length) -}}
  {{- if eq $a $b }}yes{{ end -}}
{{- end -}}
{{- end }}

{{- define "meshd.cidr.covers" -}}
{{- if le (int .outer.length) (int .inner.length) -}}
{{- include "meshd.cidr.overlap" (dict "a" .outer "b" .inner) -}}
{{- end -}}
{{- end }}

{{/* The prefix with the bits behind its length cleared, for people. */}}
{{- define "meshd.cidr.network" -}}
{{- $cut := include "meshd.cidr.cut" . | fromJsonArray -}}
{{- $shown := list -}}
{{- range $cut -}}
  {{- if eq (int $.family) 4 -}}
    {{- $shown = concat $shown (list (div (int .) 256 | toString) (mod (int .) 256 | toString)) -}}
  {{- else -}}
    {{- $shown = append $shown (printf "%x" (int .)) -}}
  {{- end -}}
{{- end -}}
{{- if eq (int .family) 4 }}{{ join "." $shown }}{{ else }}{{ regexReplaceAll "(:0)+$" (join ":" $shown) "::" }}{{ end }}/{{ .length }}
{{- end }}
