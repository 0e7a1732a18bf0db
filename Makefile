# One target for each thing a person does. Everything is installed into .venv; nothing else on the machine is touched, with one
# exception: make test, run as root where there is no browser, installs Chromium with apt-get.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
KERNELS := setup.py $(wildcard lowmem/optim/kernels/csrc/*)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DELETE_ON_ERROR:
.PHONY: help demo test test-fast deepspeed-ops lint bench clean
help:
	@echo "make demo       train a small model on this machine's own Python library and let it write (set-up included)"
	@echo "make test       every test that needs no GPU (set-up included)"
	@echo "make test-fast  only the unit tests"
	@echo "make deepspeed-ops  compile the DeepSpeed operators that CPU offload uses (about two minutes, once)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the committed measurements, again (an hour)"

demo: $(VENV)/.core
	lowmem pretrain --config configs/cpu/demo.yaml
	lowmem generate --run runs/demo --prompt "def read_file(path):" --max_new_tokens 120 --temperature 0.7 --seed 1

test: $(VENV)/.test $(VENV)/.browser deepspeed-ops
	ruff check .
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 -m "not slow and not memory"
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile -m "slow and not memory"
	python -m pytest -q -m memory

deepspeed-ops: $(VENV)/.test
	python -m lowmem.engine.deepspeed.operators

test-fast: $(VENV)/.test
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 -m "not slow and not memory"

lint: $(VENV)/.test
	ruff check .
	ruff format --check .
	mypy

bench: $(VENV)/.test
	python profiling/bench_step.py --out profiling/results
	python profiling/data_memory.py --sizes 10 150 1000 --out profiling/results

# Set-up. A stamp file is as new as the last install, so it runs again when pyproject.toml, constraints.txt or the kernels change.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lowmem needs Python 3.10 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@echo "set-up: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "set-up: python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt $(KERNELS)
	@echo "set-up: installing lowmem and PyTorch into $(VENV), and compiling the optimizer kernels (a few minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "set-up: installing DeepSpeed, bitsandbytes, datasets, matplotlib and the test tools into $(VENV)"
	@$(PIP) -e '.[test]'
	@touch $@

# A browser for the test that opens a report in one. Without the right to install it that test is skipped, and says so.
$(VENV)/.browser: $(BIN)/python
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "set-up: installing Chromium with apt-get, for the test that opens a report in a browser"; \
		export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >$(VENV)/browser.log 2>&1 || \
			echo "set-up: that failed (see $(VENV)/browser.log); the test will be skipped"; \
	else echo "set-up: no browser here and no right to install one; the test that opens a report in it will be skipped"; fi
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
