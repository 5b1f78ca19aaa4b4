# The two commands of a fresh machine: `make train` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
INSTALL ?= --editable '.[test]'
BIN := $(VENV)/bin
GPU_WHEELS ?= jax-triton tyro docstring-parser typeguard

.PHONY: train test slow lint docs bench gpu-compilers gpu-wheels tpu-compilers

train: $(VENV)/installed
	$(BIN)/python -m experiments.compare $(ARGS)

test slow: export OPENBLAS_NUM_THREADS = 1
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not ci' $(ARGS)

# The long tests that `make test` leaves out: before a release. The networks of flaxmodels are some of their inputs.
slow: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps flaxmodels h5py filelock regex
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal $(ARGS)

# Compile the GPU kernels without a GPU: the compilers, without NVIDIA's libraries. The tests that need them skip otherwise.
gpu-compilers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt jax-triton triton
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps jax-cuda13-plugin jax-cuda13-pjrt

# Packages that experiments/bench/gpu.sh takes along to a GPU machine without a network: in .whl, which git ignores. GPU_WHEELS says which the machine lacks.
gpu-wheels: $(VENV)/installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --constraint constraints.txt --dest .whl $(GPU_WHEELS)

# Compile a training step of the zoo for a described TPU v5e: brings the compiler (0.7 GB) and runs the tests that need it. Kept out of the environment's packages: with libtpu among them, JAX looks for a TPU at every start.
tpu-compilers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(VENV)/tpu libtpu
	$(BIN)/python -m pytest -n 0 tests/kernels/test_tpu_step.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# HTML pages in docs/_build. A warning is an error. Once its packages are installed it needs no network.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt furo myst-parser sphinx
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python -m experiments.bench.kernels --device cpu
	$(BIN)/python -m experiments.bench.training
	$(BIN)/python -m experiments.bench.inference
	$(BIN)/python -m experiments.bench.parts
	$(BIN)/python -m experiments.bench.unchanged
	$(BIN)/python -m experiments.bench.loop
	$(BIN)/python -m experiments.bench.seeds
	$(BIN)/python -m experiments.bench.data
	$(BIN)/python -m experiments.report

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard cpu_kernels/*)
	@echo "installing the project in $(VENV): about 2 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(INSTALL)
	$(BIN)/python -c "import blocksparse_jax as bsj; print('kernels:', {name: reason or 'ready' for name, reason in bsj.available_implementations().items()})"
	touch $@
