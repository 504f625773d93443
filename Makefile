# make install a virtual environment in .venv with the tested versions
# make demo    installs into .venv and runs the main job on real PPO data
# make test    installs into .venv and runs the tests
# make docs    installs into .venv and builds the documentation into site/, without network; a dead link is an error
# make sweep   nine trainings over SVD rank and context length on the demo's data, compared in MLflow
# make learn   the slow proof that PPO learns: HalfCheetah, 3 trials of 300,000 steps, with a report
# make chaos   kills collections at every publication point and at random, and compares the data sets they leave
# make zero-shot   the Transformer trained on InvertedPendulum, tested on HalfCheetah's networks: half an hour
# make bench   the README's speed figures, next to those of its peers, which get an environment of their own
# make bench-quick   every benchmark at its smallest, to see that it runs
# make lint    format, ruff, mypy, the layers of imports
# make test-slow   the tests that take minutes each

PYTHON ?= python3
STAMP := .venv/installed
PEERS := .venv-bench/installed

.PHONY: install demo sweep learn zero-shot test test-slow chaos lint docs bench bench-quick clean

install: $(STAMP)

demo: $(STAMP)
	.venv/bin/python jobs/pipeline.py --experiment jobs/experiments/demo.toml

sweep: demo
	.venv/bin/python jobs/sweep.py --preset paper-residual

learn: $(STAMP)
	.venv/bin/python jobs/pipeline.py --experiment jobs/experiments/half_cheetah_small.toml

zero-shot: $(STAMP)
	.venv/bin/python jobs/collect.py --experiment jobs/experiments/inverted_pendulum.toml
	.venv/bin/python jobs/pipeline.py --experiment jobs/experiments/zero_shot.toml

test: $(STAMP)
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)
	.venv/bin/python -m pytest -q -m slow

chaos: $(STAMP)
	.venv/bin/python benchmarks/chaos.py

lint: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo --no-cache

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

bench: $(PEERS)
	.venv-bench/bin/python benchmarks/engine.py
	.venv-bench/bin/python benchmarks/returns.py
	.venv-bench/bin/python benchmarks/training.py
	.venv-bench/bin/python benchmarks/scaling.py

bench-quick: $(PEERS)
	printf '%s\n' $(filter-out benchmarks/command.py,$(wildcard benchmarks/*.py)) | xargs -P 2 -I BENCHMARK sh -c \
	    'said=$$(.venv-bench/bin/python BENCHMARK --quick 2>&1); status=$$?; printf "%s --quick\n%s\n" BENCHMARK "$$said"; exit $$status'

clean:
	rm -rf .venv .venv-bench site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Peers and what they need lie in an environment of their own on top of ours, which they never touch.
$(PEERS): $(STAMP) benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	echo "import site; site.addsitedir('$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > "$$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	.venv-bench/bin/python -m pip install -q -c constraints.txt -r benchmarks/peers.txt
	touch $(PEERS)
