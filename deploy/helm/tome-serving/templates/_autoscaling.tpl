{{/* Which series are this release's: PodMonitor sets both labels. */}}
{{- define "tome-serving.series" -}}
namespace="{{ .Release.Namespace }}",app_kubernetes_io_instance="{{ .Release.Name }}"
{{- end }}

{{/* 0 while the server is scraped, nothing when it isn't: then nobody scales. */}}
{{- define "tome-serving.zero" -}}
0 * count(tome_requests_pending{ {{- include "tome-serving.series" . -}} })
{{- end }}

{{/* Mean r as a share of the largest, of the model that merges most; 0 where nothing is asked. */}}
{{- define "tome-serving.rShare" -}}
{{- $s := include "tome-serving.series" . }}{{ $w := .Values.autoscaling.window -}}
max(
  sum by (model) (rate(tome_merge_r_sum{ {{- $s -}} }[{{ $w }}]))
  / (sum by (model) (rate(tome_merge_r_count{ {{- $s -}} }[{{ $w }}])) > 0)
  / (max by (model) (tome_merge_r_limit{ {{- $s -}} }) > 0)
) or {{ include "tome-serving.zero" . }}
{{- end }}

{{/* Share of requests, of those in order, refused because their deadline couldn't be met, or for want of room. */}}
{{- define "tome-serving.refusedShare" -}}
{{- $s := include "tome-serving.series" . }}{{ $w := .Values.autoscaling.window -}}
sum(rate(tome_slo_missed_total{reason=~"infeasible|queue_full", {{- $s -}} }[{{ $w }}]))
/ (
  sum(rate(tome_slo_met_total{ {{- $s -}} }[{{ $w }}])) + sum(rate(tome_slo_missed_total{ {{- $s -}} }[{{ $w }}])) > 0
) or {{ include "tome-serving.zero" . }}
{{- end }}

{{/* Share of the time that devices are busy; each pod has one. A pod that still loads isn't counted. */}}
{{- define "tome-serving.busy" -}}
{{- $s := include "tome-serving.series" . }}{{ $w := .Values.autoscaling.window -}}
sum(rate(tome_compute_seconds_total{ {{- $s -}} }[{{ $w }}]))
/ count(sum by (pod) (tome_merge_r_limit{ {{- $s -}} }))
{{- end }}

{{/* Up at once and by leaps, for quality is being lost; down one at a time, to see what each costs. */}}
{{- define "tome-serving.behavior" -}}
{{- range $direction, $b := dict "scaleUp" .Values.autoscaling.scaleUp "scaleDown" .Values.autoscaling.scaleDown }}
{{ $direction }}:
  stabilizationWindowSeconds: {{ $b.stabilizationSeconds }}
  selectPolicy: Max
  policies:
    - {type: Pods, value: {{ $b.pods }}, periodSeconds: {{ $b.periodSeconds }}}
    - {type: Percent, value: {{ $b.percent }}, periodSeconds: {{ $b.periodSeconds }}}
{{- end }}
{{- end }}
