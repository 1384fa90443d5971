# demo: the main job. test: what CI runs. The rest are parts of these, or need a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Exactly these files, whatever the index offers. torch is not among them: each machine has its own build of it.
LOCKED := $(PIP) --no-deps --require-hashes --requirement

# What Python compiles is kept, whatever the shell says: tests start processes of their own, and some run at once.
unexport PYTHONDONTWRITEBYTECODE

# The tests that run something on a device; the others do the same on any machine.
ON_A_DEVICE := tests/gpu tests/cpu/verify/test_oracle_block.py $(addprefix tests/cpu/,model numerics kernels \
	checkpoint/test_reader_writer.py engine selftest test_startup.py test_launches.py test_full_layer.py)

.PHONY: demo test lint type cpu interpret aot test-slow test-clients test-guidellm test-schemas test-vllm test-gpu sanitize bench dist size lock

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

# Two lanes: the CPU tests in two processes, and beside them the three others one by one. The first takes longest, so that
# both cores have work to the end.
test: lint
	$(MAKE) --jobs 2 --output-sync=target cpu aot interpret type

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev
	$(BIN)/mypy

# Its output comes at once (+), so that a run that is cut off has told what failed. tests/gpu would only be skipped;
# tests/cpu/test_kernel_configs.py imports it.
cpu: $(VENV)/.dev
	+$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/gpu

# Triton kernels by its interpreter; and kernels compiled for GPUs that are not here. A process does one or the other.
interpret: $(VENV)/.dev
	$(BIN)/python -m pytest tests/interpret -m "not slow"

aot: $(VENV)/.dev
	$(BIN)/python -m pytest tests/aot -m "not slow"

# What `make test` leaves out, for nightly runs: every configuration of the compiled kernels beside a covering set, whole
# prompts one token at a time, the published model's headers in full, what else is marked slow, and more damaged files.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest tests/aot -m slow
	$(BIN)/python -m pytest tests/interpret -m slow
	$(BIN)/python -m pytest -m slow -n 2
	OWNPATH_FUZZ=10 $(BIN)/python -m pytest tests/cpu/inspect/test_inspect_fuzz.py

# Public clients against a real server, in environments of their own: they need no torch, and not all agree on an openai.
# docs/clients.md has what each is asked; the server needs a library for grammars, which .dev has. aiperf, lm-eval and
# inspect-ai are large: 3 GB in all.
test-clients: $(VENV)/.dev
	for set in frameworks llama-index evals load aiperf; do \
		$(PYTHON) -m venv $(VENV)-$$set && \
		$(VENV)-$$set/bin/python -m pip install --quiet --no-deps --requirement tests/clients/$$set.txt && \
		OWNPATH_PYTHON=$(abspath $(BIN))/python $(VENV)-$$set/bin/python -m pytest -rs --confcutdir tests/clients tests/clients \
		|| exit 1; done

# guidellm needs a torch: 1.5 GB with a CPU's.
test-guidellm: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)-guidellm
	$(VENV)-guidellm/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-guidellm/bin/python -m pip install --quiet --no-deps --requirement tests/clients/guidellm.txt
	OWNPATH_PYTHON=$(abspath $(BIN))/python $(VENV)-guidellm/bin/python -m pytest -rs --confcutdir tests/clients \
		tests/clients -k guidellm

# The official JSON-Schema test suite, from the package that ships it; and the embedded model's answers to random schemas.
SUITE := $(abspath $(VENV))/schema-suite
test-schemas: $(VENV)/.dev $(SUITE)/.fetched
	OWNPATH_SCHEMA_SUITE=$(SUITE)/json $(BIN)/python -m pytest tests/schemas

$(SUITE)/.fetched: tests/schemas/suite.txt | $(VENV)/.dev
	rm -rf $(SUITE)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary jsonschema --require-hashes \
		--requirement tests/schemas/suite.txt --dest $(SUITE)
	tar -xzf $(SUITE)/jsonschema-*.tar.gz -C $(SUITE) --strip-components 1
	touch $@

# vLLM on a CPU: the plugin, its proof, and diff against vllm serve. About half an hour of one core, most of it starts.
test-vllm: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest -rs --confcutdir tests/vllm tests/vllm

$(VENV)-vllm/.ready: tests/vllm/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --requirement tests/vllm/requirements.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# On a machine with a CUDA device, with the interpreter that has torch there: make test-gpu PYTHON=python3
# Kernels are compiled first, on all cores. Where pytest-xdist is installed, PYTEST_ARGS="-n 14" runs the tests on 14.
test-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest --device cuda --compile-only $(ON_A_DEVICE)
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest --device cuda $(ON_A_DEVICE) $(PYTEST_ARGS)

# As test-gpu, where the CUDA toolkit has compute-sanitizer.
sanitize:
	PYTHONPATH=src:$$PYTHONPATH compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tools/small_shapes.py
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) tools/hazards.py compute-sanitizer --tool racecheck $(PYTHON) tools/small_shapes.py

bench: $(VENV)/.installed
	$(BIN)/python bench/first_light.py --out bench/results/first_light.jsonl

# An sdist, and the wheel that is built from it, without a network; then the wheel in a fresh environment.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python tools/try_dist.py dist

size: $(VENV)/.dev
	$(BIN)/python tools/size.py

# torch first, alone: whatever depends on it must not choose another build. Nothing is compiled here: of 90 MB of sources
# most is never imported, and an import keeps what it compiles.
$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(LOCKED) requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

# pip unpacks on one core: two of them, with every other package each. None needs another to be unpacked.
$(VENV)/.dev: $(VENV)/.installed requirements-dev.lock
	$(MAKE) --jobs 2 $(VENV)/.half-0 $(VENV)/.half-1
	touch $@

$(VENV)/.half-%: $(VENV)/.installed requirements-dev.lock
	awk '/==/ {n++} n % 2 == $*' requirements-dev.lock > $@.lock
	$(LOCKED) $@.lock
	touch $@

# Writes both lock files anew, from pyproject.toml and constraints.txt; needs uv. The public torch asks for a newer
# Triton than the one whose interpreter the tests use, and brings libraries that belong to its build.
OF_TORCH := torch cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile \
	curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
LOCK := uv pip compile --quiet --generate-hashes --constraint constraints.txt --override tools/lock_overrides.txt \
	--python-version 3.11 --no-header --no-annotate $(addprefix --no-emit-package ,$(OF_TORCH)) pyproject.toml
lock:
	$(LOCK) --no-emit-package triton --output-file requirements.lock
	$(LOCK) --extra dev --output-file requirements-dev.lock
