# The image of every cluster node and of the MLflow server: the project and the tested set of its dependencies.
#
#   docker build -t registry.example.com/tipl_ray:ray-2.60.0 .
#   docker build -t registry.example.com/tipl_ray:ray-2.60.0-gpu \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.11-slim-bookworm

# g++ compiles the learner for a machine's own processor at first use; curl and rsync serve `ray up`. Which patch level
# of them is left to Debian: its security fixes are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl g++ rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash tipl

WORKDIR /home/tipl/tipl_ray

# Into the system's Python, whose commands every shell finds: `ray up` and KubeRay start login shells, which reset PATH.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY tipl_ray tipl_ray
COPY jobs jobs
RUN pip install --no-cache-dir -c constraints.txt ".[cluster]"
COPY cluster cluster

USER 1000
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
RUN python -c "import ray.train.torch, ray.tune, mlflow, mujoco.batch, boto3, psycopg2, tipl_ray.stages" \
    && python jobs/collect.py --help >/dev/null
