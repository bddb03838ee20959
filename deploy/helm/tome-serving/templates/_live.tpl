{{/* What of this release runs now. Helm sees the cluster at install and upgrade; `helm template` and --dry-run=client see
     nothing. */}}

{{/* How many pods the Deployment asks for. With an autoscaler it is the number that runs: Kubernetes takes a missing
     number for 1, and would stop the other pods until the autoscaler has added them again. */}}
{{- define "tome-serving.replicas" -}}
{{- $full := include "tome-serving.fullname" . }}
{{- $spec := default dict (lookup "apps/v1" "Deployment" .Release.Namespace $full).spec }}
{{- $running := int (default 0 $spec.replicas) }}
{{- /* A release that reuses the values of an older chart has none. */}}
{{- $chosen := default "live" .Values.autoscaling.replicas }}
{{- if eq .Values.autoscaling.kind "none" }}
{{- .Values.replicas }}
{{- else if eq (toString $chosen) "omit" }}
{{- if gt $running 1 }}
{{- fail (printf "autoscaling.replicas: with omit Deployment %s would go from %d pods to 1; leave it at live" $full $running) }}
{{- end }}
{{- else if ne (toString $chosen) "live" }}
{{- int $chosen }}
{{- else if hasKey $spec "replicas" }}
{{- $running }}
{{- else }}
{{- .Values.autoscaling.minReplicas }}
{{- end }}
{{- end }}

{{/* Refuses an upgrade that stops pods of a service that runs. Helm deletes what a revision no longer has without waiting
     for what takes its place. */}}
{{- define "tome-serving.checkLive" -}}
{{- if .Release.IsUpgrade }}
{{- $full := include "tome-serving.fullname" . }}
{{- $replaces := default "" .Values.replaces }}
{{- $deployed := false }}
{{- range (lookup "apps/v1" "Deployment" .Release.Namespace "").items }}
{{- $owner := get (default dict .metadata.annotations) "meta.helm.sh/release-name" }}
{{- /* KServe copies annotations to a Deployment of its own, which has an owner. */}}
{{- if and (eq (toString $owner) $.Release.Name) (not .metadata.ownerReferences) }}
{{- $deployed = true }}
{{- if and (eq .metadata.name $full) (not $.Values.kserve.enabled) }}
{{- include "tome-serving.checkDeployment" (list $ .) }}
{{- else if ne (printf "Deployment/%s" .metadata.name) $replaces }}
{{- fail (printf "this upgrade deletes Deployment %s with all its pods before others can serve: install a second release beside it (docs/operations.md, KServe), or accept the gap with replaces=Deployment/%s" .metadata.name .metadata.name) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (not $deployed) (not .Values.kserve.enabled) (lookup "v1" "ConfigMap" .Release.Namespace $full) }}
{{- $service := include "tome-serving.serviceName" . }}
{{- if ne (printf "InferenceService/%s" $service) $replaces }}
{{- fail (printf "this upgrade deletes InferenceService %s with all its pods before others can serve: install a second release beside it (docs/operations.md, KServe), or accept the gap with replaces=InferenceService/%s" $service $service) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of the Deployment that stays: what can't be changed, and pods that an autoscaler added. */}}
{{- define "tome-serving.checkDeployment" -}}
{{- $root := index . 0 }}
{{- $live := index . 1 }}
{{- if ne (toJson $live.spec.selector.matchLabels) (include "tome-serving.selectorLabels" $root | fromYaml | toJson) }}
{{- fail (printf "nameOverride: the selector of Deployment %s can't be changed; leave the value as it was, or install a second release" $live.metadata.name) }}
{{- end }}
{{- $kind := get (default dict $live.metadata.annotations) "tome-serving/autoscaling" | default "none" }}
{{- if and (ne $kind "none") (eq $root.Values.autoscaling.kind "none") (gt (int $live.spec.replicas) (int $root.Values.replicas)) }}
{{- fail (printf "replicas, %d, is less than the %d pods that the autoscaler runs: set replicas=%d to switch it off, and lower the number in a later upgrade" (int $root.Values.replicas) (int $live.spec.replicas) (int $live.spec.replicas)) }}
{{- end }}
{{- end }}
