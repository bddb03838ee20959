{{- define "tome-serving.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Room is left for the longest suffix, -headless. */}}
{{- define "tome-serving.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* Services and InferenceServices: before Kubernetes 1.36 their names must begin with a letter. */}}
{{- define "tome-serving.serviceName" -}}
{{- $full := include "tome-serving.fullname" . }}
{{- ternary (printf "tome-%s" $full | trunc 52 | trimSuffix "-") $full (regexMatch "^[0-9]" $full) }}
{{- end }}

{{- define "tome-serving.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tome-serving.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "tome-serving.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{ include "tome-serving.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{- define "tome-serving.serviceAccountName" -}}
{{- ternary (default (include "tome-serving.fullname" .) .Values.serviceAccount.name) (default "default" .Values.serviceAccount.name) (not (not .Values.serviceAccount.create)) }}
{{- end }}

{{- define "tome-serving.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion .Values.device) .Values.image.tag }}
{{- end }}
{{- end }}

{{- define "tome-serving.profilesSpec" -}}
accessModes: {{ .Values.profiles.accessModes | toJson }}
{{- with .Values.profiles.storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.profiles.size | quote }}
{{- end }}

{{/* Kubernetes changes no claim, so the name follows from what is claimed: other values make another claim. What it
     held is measured again. */}}
{{- define "tome-serving.profilesClaim" -}}
{{- $full := include "tome-serving.fullname" . }}
{{- $digest := printf "%s %s" $full (include "tome-serving.profilesSpec" .) | sha256sum | trunc 8 }}
{{- default (printf "%s-profiles-%s" ($full | trunc 45 | trimSuffix "-") $digest) .Values.profiles.existingClaim }}
{{- end }}

{{/* The server's settings: those of the chart's user, and those that must agree with the manifests. */}}
{{- define "tome-serving.settings" -}}
{{- $settings := dict
  "listen" "0.0.0.0:8500"
  "metrics" "0.0.0.0:8501"
  "device" .Values.device
  "profiles" "/var/cache/tome/tome-serving/profiles"
  "rest" .Values.rest.enabled
  "drain_timeout" (printf "%ds" (int .Values.drain.timeoutSeconds)) }}
{{- with .Values.tls }}
{{- if .secretName }}
{{- $tls := dict "certificate" "/etc/tome-tls/tls.crt" "key" "/etc/tome-tls/tls.key" }}
{{- if .clients }}
{{- $_ := set $tls "client_ca" "/etc/tome-tls/ca.crt" }}
{{- end }}
{{- $_ := set $settings "tls" $tls }}
{{- end }}
{{- end }}
{{- if .Values.auth.secretName }}
{{- $_ := set $settings "auth" (dict "tokens" (printf "/etc/tome-auth/%s" .Values.auth.key)) }}
{{- end }}
{{- toYaml (merge (deepCopy .Values.config) $settings) }}
{{- end }}

{{/* What a probe asks: of gRPC health a service, or over HTTP, where TLS keeps Kubernetes out of the former. */}}
{{- define "tome-serving.probe" -}}
{{- if (index . 0).Values.tls.secretName -}}
httpGet: {port: metrics, path: /v2/health/{{ index . 2 }}}
{{- else -}}
grpc: {port: 8500, service: {{ index . 1 | quote }}}
{{- end }}
{{- end }}

{{- define "tome-serving.container" -}}
image: {{ include "tome-serving.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: {{ concat (list "serve" "--config" "/etc/tome/server.yaml") (default list .Values.args) | toJson }}
{{- with .Values.env }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - {name: {{ ternary "h2c" "grpc" (not (not .Values.kserve.enabled)) }}, containerPort: 8500, protocol: TCP}
  - {name: metrics, containerPort: 8501, protocol: TCP}
# From the first process to SERVING; until then the other two don't ask.
startupProbe:
  {{- include "tome-serving.probe" (list . "" "ready") | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div (add .Values.startup.timeoutSeconds 1) 2 }}
# NOT_SERVING takes the pod out of its Services: another replica has room where this one is draining.
readinessProbe:
  {{- include "tome-serving.probe" (list . "tome_api.v1.Inference" "ready") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
# Overload is answered by merging and refusals, never by a restart: only half a minute of silence is.
livenessProbe:
  {{- include "tome-serving.probe" (list . "" "live") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
lifecycle:
  preStop:
    sleep:
      seconds: {{ .Values.drain.preStopSeconds }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
volumeMounts:
  - {name: settings, mountPath: /etc/tome, readOnly: true}
  - {name: profiles, mountPath: /var/cache/tome/tome-serving}
  - {name: hub, mountPath: /var/cache/huggingface}
  - {name: tmp, mountPath: /tmp}
  {{- if .Values.tls.secretName }}
  - {name: tls, mountPath: /etc/tome-tls, readOnly: true}
  {{- end }}
  {{- if .Values.auth.secretName }}
  - {name: auth, mountPath: /etc/tome-auth, readOnly: true}
  {{- end }}
  {{- if .Values.modelsVolume }}
  - {name: models, mountPath: /models, readOnly: true}
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "tome-serving.volumes" -}}
- name: settings
  configMap:
    name: {{ include "tome-serving.fullname" . | quote }}
- name: profiles
  {{- if or .Values.profiles.create .Values.profiles.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ include "tome-serving.profilesClaim" . | quote }}
  {{- else }}
  emptyDir: {sizeLimit: 100Mi}
  {{- end }}
- name: hub
  {{- if .Values.hub.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.hub.existingClaim | quote }}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.hub.sizeLimit | quote }}}
  {{- end }}
- name: tmp
  emptyDir: {sizeLimit: 100Mi}
{{- range $name, $secret := dict "tls" .Values.tls.secretName "auth" .Values.auth.secretName }}
{{- if $secret }}
- name: {{ $name }}
  secret:
    secretName: {{ $secret | quote }}
    # For the server's group, which fsGroup makes the owner.
    defaultMode: 0440
{{- end }}
{{- end }}
{{- with .Values.modelsVolume }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What Deployment and ServingRuntime have in common of a pod. */}}
{{- define "tome-serving.pod" -}}
automountServiceAccountToken: false
serviceAccountName: {{ include "tome-serving.serviceAccountName" . | quote }}
terminationGracePeriodSeconds: {{ include "tome-serving.graceSeconds" . }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  # Else each start walks the whole of a volume of weights.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
enableServiceLinks: false
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- if .Values.topologySpread.enabled }}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: {{ $.Values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "tome-serving.selectorLabels" $ | nindent 8 }}
    {{- if not $.Values.kserve.enabled }}
    # Else the pods of the version that is leaving would count.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What may pass between deletion and SIGKILL: preStop, the drain, and a moment to leave. */}}
{{- define "tome-serving.graceSeconds" -}}
{{- add .Values.drain.preStopSeconds .Values.drain.timeoutSeconds 5 }}
{{- end }}
