# One image for a CPU, one for an NVIDIA GPU:
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<an index with CPU builds of torch> -t tome-serving:cpu .
#   docker build --build-arg DEVICE=cuda -t tome-serving:cuda .
#
# DEVICE=cpu accepts nothing but a CPU build of torch, and fails at once where pip is offered none. DEVICE=cuda takes
# the registry's own build, which brings CUDA's libraries: the host adds the NVIDIA driver and container toolkit, and
# the base image is the same. pip reads the PIP_… arguments as its own settings; left out, its defaults hold.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS builder
ARG DEVICE=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
# For the part of the server that is written in C.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv --without-pip /opt/tome

# What the server needs, apart from the server: a change of its code leaves this layer, the large one, as it was.
COPY pyproject.toml constraints.txt ./
RUN set -e; \
    case "$DEVICE" in \
      cpu) sed -i 's/^torch==.*/&+cpu/' constraints.txt ;; \
      cuda) ;; \
      *) echo "DEVICE is cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac; \
    python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["server"], *p["optional-dependencies"]["tracing"], sep="\n")' > requirements.txt; \
    pip --python /opt/tome/bin/python install -c constraints.txt -r requirements.txt \
      || { echo "with DEVICE=cpu, pip must be told where CPU builds of torch are: see this file's head" >&2; exit 1; }; \
    built_for="$(/opt/tome/bin/python -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')"; \
    if [ "$built_for" != "$DEVICE" ]; then echo "pip took torch for $built_for, not $DEVICE" >&2; exit 1; fi

COPY README.md LICENSE ./
COPY protos protos
COPY client client
COPY server server
RUN pip --python /opt/tome/bin/python install --no-deps . \
    && ls /opt/tome/lib/python*/site-packages/tome_server/merging/cpu/_matching.abi3.so \
          /opt/tome/lib/python*/site-packages/tome_server/merging/cpu/_attention.abi3.so

# What the image holds of Python, in CycloneDX: /opt/tome/sbom.cdx.json. Its maker stays outside of the image.
RUN python -m venv --without-pip /opt/sbom \
    && pip --python /opt/sbom/bin/python install -c constraints.txt cyclonedx-bom \
    && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
         --output-file /opt/tome/sbom.cdx.json /opt/tome/bin/python

FROM python:${PYTHON}-slim
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="tome-serving" \
      org.opencontainers.image.description="A gRPC server of Vision Transformers that merges tokens" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /opt/tome /opt/tome
# The root file system may be read-only, /tmp included: torch only wants its cache folder to exist. Pretrained weights
# from the hub need HF_HOME: mount a volume there that user 65532 can write, or name a local checkpoint. Measured
# latencies are kept in a volume of their own; without one that outlives the container, each start measures again.
ENV PATH=/opt/tome/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/var/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/torch \
    XDG_CACHE_HOME=/var/cache/tome \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN install -d -o 65532 -g 65532 /var/cache/huggingface /var/cache/torch /var/cache/tome/tome-serving
VOLUME /var/cache/tome/tome-serving
WORKDIR /srv
USER 65532:65532
EXPOSE 8500 8501
# Asks what an orchestrator's own gRPC probe asks. Served over TLS or on another port, use that probe instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import sys, grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; channel = grpc.insecure_channel('127.0.0.1:8500', [('grpc.enable_http_proxy', 0)]); sys.exit(rpc.HealthStub(channel).Check(pb.HealthCheckRequest(), timeout=3).status != pb.HealthCheckResponse.SERVING)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tome-server"]
CMD ["serve"]
