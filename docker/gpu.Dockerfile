# Every stage on NVIDIA GPUs; the engine is PyTorch's (docker/tensorrt_llm.Dockerfile has the other one).
#
#     docker build -f docker/gpu.Dockerfile -t REGISTRY/kraken:gpu .
#     docker run --rm --gpus all --ipc host REGISTRY/kraken:gpu python -m jobs.plan --help
#
# CUDA comes with torch's wheels, so that the host needs nothing but a driver. gcc stays: Triton compiles launchers, and
# kernels are compiled for the CPU that loads a model.
FROM python:3.11.14-slim-bookworm

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# rsync and ssh are the cluster launcher's, wget is that of KubeRay's probes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev libgomp1 make openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /opt/kraken
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = p['optional-dependencies']; print('\n'.join([*p['dependencies'], *extras['pipelines'], *extras['postgres']]))" \
        > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt

COPY --chown=ray:ray . .
RUN pip install --no-deps -e . && chown ray:ray /opt/kraken

USER 1000
CMD ["python", "-m", "jobs.end_to_end", "--help"]
