# Serving and evaluation with TensorRT-LLM: NVIDIA's release image with this project and the cluster's Ray.
#
#     docker build -f docker/tensorrt_llm.Dockerfile -t kraken-tensorrt-llm .
#     docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 kraken-tensorrt-llm \
#         python -m jobs.doctor tensorrt_llm
#
# The doctor's report stays in the container; `-v "$PWD:/report"` and `--report /report/report.json` bring it out.
# The image brings Python 3.12, torch, CUDA and TensorRT-LLM, which fit one another and nothing else: none of them is
# touched here. RAY_VERSION must be the cluster's; the default is the pin of constraints.txt.
ARG TENSORRT_LLM_VERSION=1.2.1
FROM nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM_VERSION}

ARG RAY_VERSION=2.60.0

# MPI ranks run as root inside a container, and only there.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 \
    OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/kraken
COPY pyproject.toml constraints.txt README.md LICENSE ./

# What the image has already stays as it is: its versions become constraints, and ours hold only for what is missing.
RUN python3 -c "import sys; assert sys.version_info[:2] == (3, 12), sys.version" \
    && python3 -m pip list --format=freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/image.txt \
    && python3 -c "import re; name = lambda line: re.split('[= @]', line)[0].lower().replace('_', '-'); \
image = {name(line) for line in open('/tmp/image.txt')}; \
ours = [l for l in open('constraints.txt') if l.strip() and l[0] not in '#-' and name(l) not in image | {'ray'}]; \
open('/tmp/constraints.txt', 'w').writelines([*open('/tmp/image.txt'), *ours])" \
    && sed -i '/^ray==/d' /tmp/constraints.txt \
    && python3 -m pip install -c /tmp/constraints.txt "ray[serve,default]==${RAY_VERSION}" \
        tiktoken rustbpe datasets safetensors pyarrow dacite tqdm mlflow psutil tyro

COPY . .
RUN python3 -m pip install --no-deps -e . \
    && TLLM_DISABLE_MPI=1 python3 -c "import importlib.metadata as m; print(m.version('tensorrt_llm'), m.version('torch'))"

CMD ["python3", "-m", "jobs.doctor", "tensorrt_llm"]
