{{/* What a schema can't say: values that must go together, and those that would only fail later. */}}
{{- define "tome-serving.check" -}}
{{- if contains "." (include "tome-serving.fullname" .) }}
{{- fail (printf "the name %s has a dot, which no Service's name may have: set fullnameOverride" (include "tome-serving.fullname" .)) }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if and (ne .kind "none") (lt (int .maxReplicas) (int .minReplicas)) }}
{{- fail (printf "autoscaling.maxReplicas, %d, is less than minReplicas, %d" (int .maxReplicas) (int .minReplicas)) }}
{{- end }}
{{- end }}
{{- if and .Values.tls.clients (not .Values.tls.secretName) }}
{{- fail "tls.clients needs tls.secretName" }}
{{- end }}
{{- if and (has (toString .Values.strategy.maxSurge) (list "0" "0%")) (has (toString .Values.strategy.maxUnavailable) (list "0" "0%")) }}
{{- fail "strategy: with maxSurge and maxUnavailable both 0 no pod could ever be replaced" }}
{{- end }}
{{- if and .Values.podDisruptionBudget.enabled (has (toString .Values.podDisruptionBudget.maxUnavailable) (list "0" "0%")) }}
{{- fail "podDisruptionBudget.maxUnavailable: with 0 no node could ever be drained; allow at least 1" }}
{{- end }}
{{- if and .Values.rest.enabled (eq (int .Values.rest.port) (int .Values.service.port)) }}
{{- fail (printf "rest.port and service.port are both %d: the Service needs two ports" (int .Values.rest.port)) }}
{{- end }}
{{- include "tome-serving.checkFlags" . }}
{{- include "tome-serving.checkDevice" . }}
{{- include "tome-serving.checkModels" . }}
{{- include "tome-serving.checkLive" . }}
{{- end }}

{{/* Flags win over the settings file, so they would part the server from its ports, probes, volumes and image. */}}
{{- define "tome-serving.checkFlags" -}}
{{- $values := dict "--config" "config" "--listen" "service.port" "--metrics" "rest.port" "--device" "device" "--drain-timeout" "drain.timeoutSeconds" "--profiles" "profiles" }}
{{- range .Values.args }}
{{- $flag := regexReplaceAll "=.*" . "" }}
{{- if hasKey $values $flag }}
{{- fail (printf "args: the chart sets %s itself; see the value %s" $flag (get $values $flag)) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A device plugin's resource has a domain, such as nvidia.com/gpu; a claim or a runtime class may bring a GPU as well. */}}
{{- define "tome-serving.checkDevice" -}}
{{- if eq .Values.device "cuda" }}
{{- $named := concat (keys (default dict .Values.resources.requests)) (keys (default dict .Values.resources.limits)) }}
{{- if not (or (contains "/" (join " " $named)) .Values.resources.claims .Values.runtimeClassName) }}
{{- fail "device: cuda needs a GPU, such as nvidia.com/gpu: 1 under resources.requests and resources.limits" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Something where a rule of networkPolicy.egress lets the port of config.traces out, to wherever. A rule without ports
     allows all, and a port's name could be any. */}}
{{- define "tome-serving.tracesAllowed" -}}
{{- $port := regexFind ":[0-9]+" .Values.config.traces | trimPrefix ":" | default "4317" | int }}
{{- range .Values.networkPolicy.egress }}
{{- if not .ports }}allowed{{ end }}
{{- range .ports }}
{{- $first := int (default 0 .port) }}
{{- $last := int (default $first .endPort) }}
{{- if or (not $first) (and (le $first $port) (ge $last $port)) }}allowed{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Files that the server would look for in vain: under /models with no volume there, or on the hub without a way out. */}}
{{- define "tome-serving.checkModels" -}}
{{- $paths := dict "config.repository" (default "" .Values.config.repository) }}
{{- range $i, $model := default list .Values.config.models }}
{{- range $key := list "checkpoint" "labels" "quality" }}
{{- $_ := set $paths (printf "config.models[%d].%s" $i $key) (default "" (get $model $key)) }}
{{- end }}
{{- $source := default "bundled:fashion" $model.source }}
{{- if not (or (hasPrefix "bundled:" $source) $model.checkpoint $.Values.hub.enabled) }}
{{- fail (printf "config.models[%d]: the weights of %s come from the hub; set hub.enabled, or a checkpoint from modelsVolume" $i $source) }}
{{- end }}
{{- end }}
{{- $mounted := ternary (list "/models") list (not (empty .Values.modelsVolume)) }}
{{- range .Values.extraVolumeMounts }}
{{- $mounted = append $mounted .mountPath }}
{{- end }}
{{- range $name, $path := $paths }}
{{- if hasPrefix "/models/" (printf "%s/" (clean $path)) }}
{{- $found := false }}
{{- range $mounted }}
{{- $found = or $found (hasPrefix (printf "%s/" (clean .)) (printf "%s/" (clean $path))) }}
{{- end }}
{{- if not $found }}
{{- fail (printf "%s: nothing is mounted at %s; set modelsVolume" $name $path) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
