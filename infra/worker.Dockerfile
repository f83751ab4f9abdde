# Image of a worker: Python, the locked requirements and the checkout. Build it from the checkout's root:
#   docker build -f infra/worker.Dockerfile -t coalora-worker:cuda .
#   docker build -f infra/worker.Dockerfile -t coalora-worker:cpu --build-arg DEVICE=cpu .
# CUDA: PyPI's torch brings CUDA's libraries as wheels, so that the image needs no CUDA of its own, only the host's
# driver (`--gpus all`). CPU: the build of torch without them, 5 GB smaller.
FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# cuda | cpu
ARG DEVICE=cuda
# Index of torch's CPU builds; a company's mirror goes here.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# The user that runs the flows: not root. Give it the ids that own the volumes.
ARG UID=1000
ARG GID=1000

# git: the commit of a run; DVC asks it, too. gcc: Triton compiles small launchers for the GPU kernels.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid "${GID}" coalora && useradd --uid "${UID}" --gid "${GID}" --create-home coalora

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv

# Requirements first: an edit of the code does not install them again. torch by itself, since its two builds come from two
# indexes.
WORKDIR /srv/coalora
COPY requirements.lock requirements-torch.lock pyproject.toml ./
RUN pip install --no-deps --require-hashes --requirement requirements.lock
RUN case "${DEVICE}" in \
      cuda) pip install --requirement requirements-torch.lock ;; \
      cpu) pip install --requirement requirements-torch.lock --index-url "${TORCH_CPU_INDEX}" ;; \
      *) echo "DEVICE is cuda or cpu, got: ${DEVICE}" >&2; exit 2 ;; \
    esac

# What runs keep lies in the volume: the store and Prefect's records (.coalora), and the folders of finished runs.
COPY --chown=coalora:coalora . .
RUN pip install --no-deps --editable . \
 && install --directory --owner coalora --group coalora /data configurations .dvc/cache .dvc/tmp \
 && ln -s /data/coalora .coalora && ln -s /data/runs runs && chown coalora:coalora .
USER coalora
ENV COALORA_HOME=/data/coalora \
    PREFECT_RESULTS_LOCAL_STORAGE_PATH=/data/coalora/results \
    PREFECT_HOME=/data/prefect \
    HF_HOME=/data/huggingface \
    PREFECT_UI_STATIC_DIRECTORY=/tmp/prefect-ui \
    DVC_SITE_CACHE_DIR=/tmp/dvc
# Runs with a read-only root: written are /data, /tmp, the home, configurations and .dvc/{cache,tmp}.
VOLUME /data

# Servers and credentials come by the environment.
ENTRYPOINT ["/srv/coalora/infra/entrypoint.sh"]
CMD ["prefect", "worker", "start", "--pool", "coalora"]
