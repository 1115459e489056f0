# Each target installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
export GOMP_SPINCOUNT ?= 10000

.PHONY: install demo table test slow soak lint check docs bench bench-all bench-quick bench-scaling engines clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "srppo needs Python 3.11 or newer; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The whole method on the embedded miniature: two to five minutes on two cores.
demo: install
	$(BIN)/srppo run recipes/miniature.yaml

# The demo's table over seeds, each with a base model pretrained from scratch, one core each: 27
# minutes on two cores. `srppo reproduce miniature-table` has rows, seeds and places to choose.
JOBS ?= 2
table: install
	$(BIN)/srppo reproduce miniature-table --jobs $(JOBS)

# As many processes as cores, one thread each; of the fast tests a file to a process, of the slow
# ones half of them to begin with, so that what a file's tests share is mostly made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --durations 10

test: install
	$(PYTEST) --dist loadfile -m 'not slow'

slow: install
	$(PYTEST) --dist worksteal -m slow

# A hundred kills, a failing disk at every write, damaged checkpoints, garbage: ten minutes to half an
# hour on two cores. Another SEED kills, breaks and makes up others.
SEED ?= 0
soak: install
	PYTHONPATH=tests $(BIN)/python tests/soak.py --seed $(SEED)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test slow

# The documentation as a site, in site/.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Our engine beside its peers, interleaved: 12 to 35 minutes on an idle machine.
bench: install .bench/installed
	$(BIN)/python bench/same_work.py
	$(BIN)/python bench/run.py

# Every size, with and without early ends: hours.
bench-all: install .bench/installed
	$(BIN)/python bench/same_work.py
	$(BIN)/python bench/run.py --sizes 9m 28m 9m-32k 28m-32k --ends early full \
	  --out runs/bench/all.jsonl

# That it runs and does the same work, without TRL 1.12: a minute.
bench-quick: install
	$(BIN)/python bench/same_work.py --peers rloo grpo
	$(BIN)/python bench/run.py --sizes tiny --engines trl-rloo ours-ppo ours-rloo --rounds 1 \
	  --out runs/bench/quick.jsonl

# Time and memory against docs/cost.md.
bench-scaling: install
	$(BIN)/python bench/scaling.py

# TRL 1.12 has the last PPOTrainer and needs an environment of its own.
.bench/installed: bench/trl-1.12.txt
	$(PYTHON) -m venv .bench
	.bench/bin/pip install --quiet --disable-pip-version-check -c $< torch
	.bench/bin/pip install --quiet --disable-pip-version-check -c $< trl
	touch $@

# OpenRLHF and verl as far as their reward code goes: tests/plugins then runs against them too.
engines: .engines/installed

.engines/installed: tests/engines.txt | install
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .engines -r $<
	touch $@

clean:
	rm -rf .venv .bench .engines runs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
