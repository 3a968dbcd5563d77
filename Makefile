# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.requirements
PAGE := .dvc/plots.html
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONPATH := src
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
DEMO := -S data.name=digits -S 'model.widths=[16,32,64]' -S train.epochs=8 -S train.batch_size=32 -S train.flip=none
NAME ?= latest
PORT ?= 5000
JOBS ?= 1
REV ?= HEAD

.PHONY: help setup demo repro notebook tiny strong bench bench-quick bench-scaling bench-overhead test lint audit format ui diff study confusion search backprop queue sync verify results lock
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(PAGE)  ## make .venv from requirements.txt (done by every target when missing or stale)
	@echo "ready: source $(VENV)/bin/activate"

$(STAMP): requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; install Python 3.11, or name it: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making $(VENV) from requirements.txt (PyTorch with CUDA is large: a few minutes, 7 GB)"
	$(PYTHON) -m venv $(VENV)
	PYTHONPATH= $(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(PAGE): $(STAMP)
	@$(VENV)/bin/python -m cifarlab page

# An experiment is a commit: Git wants a name for it, which a fresh machine may not have.
demo: export GIT_AUTHOR_NAME = cifarlab demo
demo: export GIT_AUTHOR_EMAIL = demo@localhost
demo: export GIT_COMMITTER_NAME = cifarlab demo
demo: export GIT_COMMITTER_EMAIL = demo@localhost
demo: setup  ## offline, minutes: the pipeline and a variant on handwritten digits, compared
	dvc exp run --quiet --force --temp --name demo-6-layers $(DEMO)
	dvc exp run --quiet --force --temp --name demo-3-layers $(DEMO) -S model.layers=3
	dvc plots diff demo-6-layers demo-3-layers
	@echo && python -m cifarlab compare --last 2
	@echo
	@echo "Look further:"
	@echo "  make ui                                      compare the runs in MLflow"
	@echo "  open dvc_plots/index.html                    confusion matrices and curves side by side"
	@echo "  source .venv/bin/activate                    then, as you like:"
	@echo "  dvc exp show --only-changed                  every experiment, its parameters and metrics"
	@echo "  dvc exp run -S data.name=digits -S train.flip=none -S model.activation=relu"
	@echo "  dvc repro                                    the real thing: CIFAR-10"

repro: setup  ## run what params.yaml asks for (dvc repro)
	dvc repro

notebook tiny strong: setup  ## a variant of variants.yaml as an experiment beside the workspace
	changes=$$(python -m cifarlab options $@) && dvc exp run --temp --force --name $@ $$changes

ui: setup  ## compare runs in MLflow; prints the address (PORT=…)
	@echo "open http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning (Ctrl-C ends the server)"
	mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

diff: setup  ## page with the plots of the last three experiments: dvc_plots/index.html
	dvc plots diff $$(git for-each-ref --sort=-creatordate --count=3 --format='%(refname:lstrip=4)' 'refs/exps/*/*/*')

study: setup  ## ask studies/NAME.yaml, continue where it was, answer in docs/studies/ (NAME=…, JOBS=…)
	python -m cifarlab study $(NAME) --jobs $(JOBS)

confusion: setup  ## which classes the network of the workspace confuses, with examples: docs/studies/confusion.md
	python studies/confusion.py

search: setup  ## look for the best variant in a budget of time, as studies/NAME.yaml says (NAME=search)
	python -m cifarlab search $(NAME)

queue: setup  ## run the queued experiments and name one that stands still (JOBS=…)
	python -m cifarlab queue --jobs $(JOBS)

sync: setup  ## log to MLflow what it lacks of experiments, commits and the workspace; which run is which
	python -m cifarlab sync

verify: setup  ## repeat an experiment or a commit in a scratch copy and compare every byte (REV=…)
	python -m cifarlab verify $(REV)

results: setup  ## keep parameters, lock, metrics and figures of the workspace under docs/results/NAME (NAME=…)
	python -m cifarlab results $(NAME)

bench: setup  ## against the notebook's way, three seeds side by side, an hour: bench/results/full.md
	dvc repro --quiet download
	python -m bench

bench-quick: setup  ## the speeds, in five minutes: bench/results/quick.md
	dvc repro --quiet download
	python -m bench --quick

bench-scaling: setup  ## how speed and memory grow: docs/scaling.csv, docs/scaling.png
	python -m bench.scaling

bench-overhead: setup  ## what checkpoints and tracking cost beside an epoch
	dvc repro --quiet download
	python -m bench.overhead

backprop: setup  ## the pages that need no training, how a convolution back-propagates, how costs do: docs/studies/
	python studies/backprop.py
	python studies/gradient.py

test: setup  ## all tests, on every core (some twenty minutes on two); TESTS=tests/test_models.py for some
	python -m pytest --numprocesses auto --dist loadscope --max-worker-restart 0 $(TESTS)

lint: setup audit  ## ruff, mypy and audit
	ruff check .
	ruff format --check .
	mypy

audit: setup  ## known vulnerabilities of what is pinned, as far as PyPI's advisories can be asked from here
	@mkdir -p .cache
	@uvx pip-audit@2.10.0 --progress-spinner off --requirement requirements.txt --no-deps --disable-pip >.cache/audit.txt 2>&1; \
	if grep -q "^Found .* known vulnerabilit" .cache/audit.txt; then grep -v "could not be audited" .cache/audit.txt; exit 1; fi; \
	grep "^No known" .cache/audit.txt && echo "but $$(grep -c "could not be audited" .cache/audit.txt) of $$(grep -c "==" requirements.txt) could not be asked for" \
	|| echo "PyPI's advisories cannot be asked from here: $$(head -1 .cache/audit.txt)"

format: setup  ## let ruff mend what it can
	ruff check --fix .
	ruff format .

lock: setup  ## compile requirements.in into requirements.txt, for every platform
	uv pip compile --quiet --universal --python-version 3.11 requirements.in --output-file requirements.txt
