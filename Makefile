# Every target does its own set-up: a machine needs Python 3.11 or later, pip and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint wheel

demo: .venv/ready
	mkdir -p build
	$(BIN)/onnxcomp optimize models/digits.onnx --calib models/digits_calib.npz --eval models/digits_eval.npz \
		-o build/digits.opt.onnx --overwrite

test: .venv/ready
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Builds the wheel, installs it elsewhere and imports every pass from there.
wheel: .venv/ready
	$(BIN)/python -m pytest -m slow tests/test_package.py

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
