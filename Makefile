# make demo    installs into .venv and runs the main job on real PPO data
# make test    installs into .venv and runs the tests
# make sweep   nine trainings over SVD rank and context length on the demo's data, compared in MLflow
# make learn   the slow proof that PPO learns: HalfCheetah, 3 trials of 300,000 steps, with a report
# make chaos   kills collections at every publication point and at random, compares what comes of them
# make zero-shot   the Transformer of the pendulum, asked about HalfCheetah networks: half an hour
# make bench   what the README claims of speed, side by side

PYTHON ?= python3
STAMP := .venv/installed

.PHONY: demo sweep learn zero-shot test test-slow chaos lint bench clean

demo: $(STAMP)
	.venv/bin/python jobs/pipeline.py --experiment jobs/experiments/demo.toml

sweep: demo
	.venv/bin/python jobs/sweep.py --preset paper --train.num-steps 500 --train.steps-per-iteration 125

learn: $(STAMP)
	.venv/bin/python jobs/pipeline.py --experiment jobs/experiments/half_cheetah_small.toml

zero-shot: $(STAMP)
	.venv/bin/python jobs/collect.py --experiment jobs/experiments/inverted_pendulum.toml
	.venv/bin/python jobs/pipeline.py --experiment jobs/experiments/zero_shot.toml

test: $(STAMP)
	.venv/bin/python -m pytest -q

test-slow: $(STAMP)
	.venv/bin/python -m pytest -q -m slow

chaos: $(STAMP)
	.venv/bin/python benchmarks/chaos.py

lint: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: $(STAMP)
	.venv/bin/python -m pip install -q --no-deps -c constraints.txt stable-baselines3
	.venv/bin/python -m pip install -q --no-deps -c constraints.txt \
	    transformers huggingface_hub tokenizers httpx2 httpcore2 truststore
	.venv/bin/python benchmarks/engine.py
	.venv/bin/python benchmarks/returns.py
	.venv/bin/python benchmarks/training.py
	.venv/bin/python benchmarks/scaling.py

clean:
	rm -rf .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)
