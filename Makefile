# Every target sets up what it needs. `make help` lists them.
VENV := .venv
STAMP := $(VENV)/.requirements
LAUNCHER := $(VENV)/bin/cifarlab
PAGE := .dvc/plots.html
PYTHONS := 3.13 3.12 3.11
SPACE := $(subst ,, )
# Values that a person gives. They reach programs through the environment, as single arguments:
# $(value …) keeps make from expanding them, "$$NAME" keeps the shell from reading them.
override PYTHON := $(value PYTHON)
override TORCH := $(value TORCH)
# NAME counts on the command line only: under WSL, the environment has the computer's name in it.
override NAME := $(if $(filter command,$(origin NAME)),$(value NAME))
override REV := $(value REV)
override BASE := $(value BASE)
override JOBS := $(value JOBS)
override PORT := $(value PORT)
override TESTS := $(value TESTS)
override WITHOUT := $(value WITHOUT)
override WORKERS := $(value WORKERS)
export PYTHON TORCH NAME REV BASE JOBS PORT TESTS WITHOUT WORKERS
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH := src
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export MPLBACKEND := agg
unexport FREETYPE_PROPERTIES PYTHONSAFEPATH PYTHONWARNINGS
DEMO := -S data.name=digits -S 'model.widths=[16,32,64]' -S train.epochs=8 \
	-S train.batch_size=32 -S train.flip=none
PYTEST := python -m pytest --numprocesses auto --dist worksteal --max-worker-restart 0

.PHONY: help setup demo repro notebook tiny strong gpu gpu-strong photos bench bench-quick bench-scaling gpu-check same-bytes experiments test \
	test-all cluster cluster-test lint audit format ui study studies confusion search backprop queue sync verify \
	report results reference lock lock-check screenshots
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  make %-14s%s %s\n", $$1, \
		(length($$1) > 14 ? sprintf("\n%21s", "") : ""), $$2}' Makefile

setup: $(LAUNCHER) $(PAGE)  ## make .venv, as every target does (PYTHON=python3.12, TORCH=cpu)
	@[ -z "$$TORCH" ] || [ "$$TORCH" = "$$(cat $(STAMP))" ] || { echo "error: $(VENV) was made" \
		"without TORCH=$$TORCH; remove $(VENV) and try again"; exit 1; }
	@echo "ready: source $(VENV)/bin/activate"

# The newest Python that requirements.txt was locked for, or the one that the user names. A program
# python3.13 may be there and not work (pyenv), so each one is tried.
$(STAMP): requirements.txt
	@set -- $(PYTHONS:%=python%) python3 python; [ -z "$$PYTHON" ] || set -- "$$PYTHON"; \
	for python; do \
		case "$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1)" in \
			$(subst $(SPACE),|,$(PYTHONS))) exec "$$python" bench/install.py;; esac; done; \
	echo "error: $${PYTHON:-python3} is not Python $(subst $(SPACE), or ,$(PYTHONS)); install" \
		"one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1

$(LAUNCHER): src/cifarlab/launcher.py $(STAMP)
	@install -m 755 $< $@

$(PAGE): $(LAUNCHER)
	@cifarlab page

# An experiment is a commit. Git wants a name for it, which a fresh machine may not have.
demo: export GIT_AUTHOR_NAME = cifarlab demo
demo: export GIT_AUTHOR_EMAIL = demo@localhost
demo: export GIT_COMMITTER_NAME = cifarlab demo
demo: export GIT_COMMITTER_EMAIL = demo@localhost
demo: setup  ## offline, minutes: two variants on handwritten digits, compared
	dvc exp run --quiet --force --temp --name demo-6-layers $(DEMO)
	dvc exp run --quiet --force --temp --name demo-3-layers $(DEMO) -S model.layers=3
	dvc plots diff demo-6-layers demo-3-layers
	@echo && dvc metrics diff --all demo-6-layers demo-3-layers
	@echo
	@echo "Look further:"
	@echo "  make ui                                      compare the runs in MLflow"
	@echo "  open dvc_plots/index.html                    confusion matrices and curves"
	@echo "  source .venv/bin/activate                    then, as you like:"
	@echo "  make experiments                             every experiment in one table"
	@echo "  dvc exp diff demo-6-layers demo-3-layers     what differs: parameters and metrics"
	@echo "  dvc metrics diff --targets metrics/per_class.json -- demo-6-layers demo-3-layers"
	@echo "  dvc exp run -S data.name=digits -S train.flip=none -S model.activation=relu"
	@echo "  dvc repro                                    the whole pipeline on CIFAR-10"
	@echo "  make photos                                  a network for your images in images/"

repro: setup  ## run what params.yaml asks for (dvc repro)
	dvc repro

notebook tiny strong gpu gpu-strong photos: setup  ## a variant of variants.yaml, as an experiment beside the workspace
	cifarlab variant $@

# Not shown: hashes of outputs, times, and the metrics with _ in their names, for which there is no room.
experiments: setup  ## all experiments in one table that fits a terminal (dvc exp show)
	dvc exp show --only-changed --drop '[^.]*[/_]|data$$|models$$|images$$|Created'

ui: setup  ## compare runs in MLflow; prints the address (PORT=…)
	cifarlab ui --port "$${PORT:-5000}"

study: setup  ## ask studies/NAME.yaml; the answer is docs/studies/NAME.md (NAME=…, JOBS=…, WORKERS=…)
	cifarlab study --jobs "$${JOBS:-1}" --workers "$$WORKERS" -- "$$NAME"

studies: setup  ## list the studies, and how many of their results are valid for the present code
	cifarlab studies

confusion: setup  ## which classes the network in the workspace confuses: docs/studies/confusion.md
	python studies/confusion.py

search: setup  ## look for the best variant within a time limit: studies/NAME.yaml (NAME=…)
	cifarlab search -- "$$NAME"

queue: setup  ## run the queued experiments (JOBS=…, WORKERS=…)
	cifarlab queue --jobs "$${JOBS:-1}" --workers "$$WORKERS"

sync: setup  ## log to MLflow what it misses of experiments, commits and the workspace
	cifarlab sync

verify: setup  ## train an experiment or a commit again and compare every byte (REV=…)
	cifarlab verify -- "$${REV:-HEAD}"

# The names are split at spaces, but the shell neither expands nor runs anything in them.
report: setup  ## a page to show: of the workspace, or NAME="REVISION…" compared; report.html
	set -f; cifarlab report -- $$NAME

results: setup  ## keep parameters, metrics and figures of the workspace in docs/results/NAME
	python -m bench.keep "$${NAME:-latest}"

same-bytes: setup  ## do a commit and the workspace train the same bytes? (BASE=HEAD)
	python -m bench.same_bytes --without="$$WITHOUT" -- "$${BASE:-HEAD}"

bench: setup  ## compare with the notebook's way, three seeds, an hour: bench/results/full.md
	dvc repro --quiet download
	python -m bench

bench-quick: setup  ## speeds, and the accuracy of tiny, in five minutes: bench/results/quick.md
	dvc repro --quiet download
	python -m bench --quick

bench-scaling: setup  ## how time and memory grow: docs/scaling.csv, docs/scaling.png
	python -m bench.scaling

gpu-check: setup  ## what a GPU gives, in six minutes: bench/results/gpu.md
	python -m bench.gpu

screenshots: setup  ## pictures of MLflow, a report and dvc plots, of what the demo made
	python -m bench.screenshots

backprop: setup  ## the pages that need no training: docs/studies/backprop.md and gradient.md
	python studies/backprop.py
	python studies/gradient.py

test: setup  ## the tests but the slow ones, on every core; TESTS=tests/nn for some
	$(PYTEST) -m "not slow" "$${TESTS:-tests}"

test-all: setup  ## also the slow tests: more kills, more draws, long stalls
	$(PYTEST) "$${TESTS:-tests}"

cluster: setup  ## what many machines need: Ray, S3, PostgreSQL (docs/scale.md)
	python -m pip install --quiet --requirement requirements-cluster.txt

cluster-test: cluster  ## the tests of Ray, S3 and PostgreSQL, which `make test-all` skips without them
	python -m pytest tests/cluster

lint: setup audit  ## ruff, mypy, import order, size, known vulnerabilities
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	python -m bench.size

audit: setup  ## known vulnerabilities of the pinned packages, if PyPI's advisories are reachable
	@mkdir -p .cache
	@uvx pip-audit@2.10.0 --progress-spinner off --requirement requirements.txt --no-deps \
		--disable-pip >.cache/audit.txt 2>&1; \
	if grep -q "^Found .* known vulnerabilit" .cache/audit.txt; then \
		grep -v "could not be audited" .cache/audit.txt; exit 1; fi; \
	grep "^No known" .cache/audit.txt \
	&& echo "not checked: $$(grep -c "could not be audited" .cache/audit.txt) packages" \
	|| echo "PyPI's advisories cannot be reached: $$(head -1 .cache/audit.txt)"

format: setup  ## let ruff correct what it can
	ruff check --fix .
	ruff format .

reference: setup  ## write docs/parameters.md from params.yaml and its types
	python -m bench.reference

lock: setup  ## compile requirements.in into requirements.txt, for every platform
	uv pip compile --quiet --universal --python-version $(lastword $(PYTHONS)) requirements.in \
		--output-file requirements.txt
	uv pip compile --quiet --universal --python-version $(lastword $(PYTHONS)) --constraint \
		requirements.txt requirements-cluster.in --output-file requirements-cluster.txt
	@$(MAKE) --no-print-directory lock-check

# antlr4-python3-runtime has no wheel. Nothing is installed.
lock-check: setup  ## is there a wheel of each locked package for each version of Python?
	@for version in $(PYTHONS); do uv pip install --quiet --dry-run --no-deps --target .cache/none \
		--python-version $$version --only-binary :all: --no-binary antlr4-python3-runtime \
		--requirement requirements.txt && echo "Python $$version: every package is there" || exit 1; \
	done
