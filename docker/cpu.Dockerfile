# Every stage on CPUs, and the head of a cluster.
#
#     docker build -f docker/cpu.Dockerfile -t REGISTRY/kraken:cpu .
#     docker run --rm -p 127.0.0.1:8000:8000 --shm-size 2g REGISTRY/kraken:cpu \
#         make run PRESET=quickstart STORAGE=/tmp/storage ARGS='--serve.host 0.0.0.0'
#
# The versions are those of constraints.txt. gcc stays: kernels are compiled for the CPU that loads a model.
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
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /opt/kraken
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch first, from the index of CPU builds: the one on PyPI brings several GB of CUDA
# hadolint ignore=DL3013
RUN torch="$(grep '^torch==' constraints.txt)" \
    && pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "${torch}" \
    && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = p['optional-dependencies']; print('\n'.join([*p['dependencies'], *extras['pipelines'], *extras['postgres']]))" \
        > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt

COPY --chown=ray:ray . .
RUN pip install --no-deps -e . && chown ray:ray /opt/kraken

USER 1000
CMD ["python", "-m", "jobs.end_to_end", "--help"]
