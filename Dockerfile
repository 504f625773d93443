# The image that cluster nodes run: the project and the tested set of its dependencies, as an ordinary user.
#
#   docker build -t tipl_ray .
#   docker build -t tipl_ray:gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.11-slim-bookworm

# g++ compiles the learner for a machine's own processor at first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 tipl
WORKDIR /home/tipl/tipl_ray
RUN python -m venv /home/tipl/venv && chown -R tipl:tipl /home/tipl
USER tipl
ENV PATH=/home/tipl/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=tipl:tipl constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"

COPY --chown=tipl:tipl pyproject.toml README.md LICENSE ./
COPY --chown=tipl:tipl tipl_ray tipl_ray
COPY --chown=tipl:tipl jobs jobs
RUN pip install --no-cache-dir -c constraints.txt -e .

RUN python -c "import ray.train.torch, ray.tune, mlflow, mujoco.batch, tipl_ray.stages"
