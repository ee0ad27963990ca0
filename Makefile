# TokenRelay's tasks. `make serve` and `make test` set everything up first; `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
STAMP  := $(VENV)/.installed
NATIVE := build/native
MODEL  ?=
ARGS   ?=
FUZZ_S ?= 600

NATIVE_SOURCES := CMakeLists.txt $(shell find libscheduler kernels/csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name 'CMakeLists.txt' 2>/dev/null)

.PHONY: test-tools test-compose help setup build serve chat test test-full test-native check check-native fuzz bench proto clean wheel-smoke format
help:            ## this list
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) .typing/.stamp  ## create .venv, install everything, build the native parts
$(STAMP): pyproject.toml
	@sh tools/prerequisites.sh "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --upgrade pip
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check "scikit-build-core>=0.11,<2" "pybind11>=3.0,<4" "cmake>=3.26,<5" "ninja>=1.11,<2"
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	@sh tools/nixl.sh $(BIN)
	@touch $(STAMP) $(VENV)/.built

.typing/.stamp: pyproject.toml tools/typing_farm.py | $(STAMP)
	@$(BIN)/python tools/typing_farm.py && touch $@

$(VENV)/.built: $(NATIVE_SOURCES) | $(STAMP)
	@flock $(VENV) $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . && touch $@
build: setup $(VENV)/.built  ## rebuild the native parts if their sources changed

serve: build     ## serve the bundled model (or MODEL=path) on http://127.0.0.1:8000; ARGS="--port 9000"
	$(BIN)/tokenrelay serve $(MODEL) $(ARGS)
chat: build      ## talk to a running server, or start one
	$(BIN)/tokenrelay chat $(ARGS)

test: build test-tools test-native  ## every test that is not slow
	$(BIN)/python -m pytest -m "not slow" $(ARGS)
test-full: build test-tools test-native  ## the slow suites too
	$(BIN)/python -m pytest $(ARGS)
test-compose: build  ## deploy/docker-compose.yml on the Docker engine that `docker` reaches
	TOKENRELAY_TEST_COMPOSE=1 $(BIN)/python -m pytest tests/compose -x --durations=0 $(ARGS)
test-tools:      # programs that only tests need
	@sh tools/prerequisites.sh "$(PYTHON)" tests
# Not the Python modules: `build` has them, of the same flags.
test-native: setup   ## the C++ tests (CTest), must-not-compile ones included
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake -S . -B $(NATIVE) -G Ninja -DTOKENRELAY_TESTS=ON -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > $(VENV)/cmake.log || (cat $(VENV)/cmake.log; false)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake --build $(NATIVE) --target test_programs && $(BIN)/ctest --test-dir $(NATIVE) -j 2 --output-on-failure --no-tests=error

check: setup check-native  ## formatters, ruff, mypy --strict, clang-format, clang-tidy, sanitizers, stale generated code, tidy tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p tokenrelay
	$(BIN)/python tools/proto.py --check
	$(BIN)/python -m tokenrelay.libscheduler.diagram --check docs/*.md
	$(BIN)/python -m pytest tests/tidy
check-native: setup
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.hpp' '*.h')
	@sh tools/clang_tidy.sh $(BIN) $(NATIVE)
	@sh tools/sanitize.sh $(BIN) build/sanitize
format: setup    ## rewrite the sources as the formatters want them
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . ; $(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.hpp' '*.h')
fuzz:            ## fuzz the scheduler with libFuzzer for FUZZ_S seconds (needs clang)
	@sh tools/fuzz.sh build/fuzz $(FUZZ_S)
proto: setup     ## regenerate the protobuf code
	$(BIN)/python tools/proto.py
bench: build     ## every benchmark, quickly
	$(BIN)/python bench/run.py --quick $(ARGS)
wheel-smoke: setup  ## build the wheel and try it in an empty virtual environment
	sh tools/wheel_smoke.sh $(BIN)
clean:           ## forget every build
	rm -rf build .typing $(VENV)/.installed $(VENV)/.built
