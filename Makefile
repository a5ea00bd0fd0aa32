# Everything is set up on demand: each target makes the environment and the build that it needs.
#   PYTHON=python3.12 make test     another interpreter, 3.11 or newer

ifeq ($(filter oneshell,$(.FEATURES)),)
$(error this Makefile needs GNU make 3.82 or newer and this is $(MAKE_VERSION); macOS: brew install make, then gmake. `pip install .` needs no make)
endif

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet install --disable-pip-version-check
ORACLES := .venv-oracles
PEERS := .venv-peers
CTEST := $(MAKE) -C tests/c
# Processes of pytest, a file of tests at a time: JOBS=0 is none beside make's own, which a debugger needs.
JOBS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
ASAN_TREE := build/asan/kimi_linear

.PHONY: help system venv build lib ctest test hip-host hip hip-nvidia hip-resources hip-system gpu-check demo oracles peers lint format asan tsan aarch64 macos long fuzz bench clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/^([a-z0-9-]+):.*## */  make \1\t/' | expand -t 18

system:
	@sh tools/setup-system.sh

# One environment in two steps: what running needs, then what tests need.

$(VENV)/.runtime: pyproject.toml tools/requirements.py | system
	@echo "venv: $(VENV), with what the package needs to build and run"
	python=$$(sh tools/setup-system.sh --python)
	test -x $(PY) || $$python -m venv $(VENV)
	$(PIP) --upgrade pip
	$$python tools/requirements.py | $(PIP) -r /dev/stdin
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "venv: $(VENV), with what the tests need"
	$(PY) tools/requirements.py test lint | $(PIP) -r /dev/stdin
	touch $@

$(VENV)/.installed: $(VENV)/.runtime setup.py pyproject.toml
	@$(PY) setup.py -q build_ext --inplace
	PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --no-deps -e .
	touch $@

venv: $(VENV)/.test  ## .venv with everything that building, running, testing and linting need

build: $(VENV)/.installed  ## the extension module, in place, and `kimi-linear` in .venv/bin
	@$(PY) setup.py -q build_ext --inplace

lib: $(VENV)/.runtime  ## the C library in build/lib: static, shared, header, pkg-config file
	@$(PY) setup.py -q lib

ctest: lib  ## the C programs of tests/c against build/lib, and what the library exports
	@sh tools/setup-system.sh pkg-config
	$(CTEST) LIB=../../build/lib

test: venv build ctest hip-host  ## everything that needs no torch; opens pages in Chromium
	@sh tools/setup-system.sh chromium
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

hip-host:  ## the GPU's kernels for the CPU (a C++ compiler): device="hip-host", and the faults that its tests plant
	@sh tools/setup-system.sh g++
	$(MAKE) -s -j2 -C csrc/hip host faults

hip:  ## for AMD GPUs, by hipcc; AMD_ARCHS="gfx90a gfx1030" names others
	@$(MAKE) -j2 -C csrc/hip amd

hip-nvidia:  ## for NVIDIA GPUs, by nvcc; NVIDIA_ARCHS="80 90" names others
	@$(MAKE) -j2 -C csrc/hip nvidia

hip-resources:  ## registers, spills and shared memory of each kernel, beside csrc/hip/resources.txt: what hipcc, clang-19 and nvcc are here for
	$(VENV)/bin/python tools/hip_resources.py

gpu-check: venv build  ## build for the GPU that is here, test and time all of it: build/gpu-check.txt; DEVICE=hip-host for none
	@sh tools/setup-system.sh g++
	$(PY) tools/gpu_check.py $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

hip-system:  ## as root: Debian's hipcc, its runtime and device libraries, which `make hip` needs (1.4 GiB)
	@sh tools/setup-system.sh hipcc

demo: build  ## the packaged model writes text and shows its cost and its errors
	@$(PY) -m kimi_linear demo

$(ORACLES)/.ready: pyproject.toml tools/requirements.py | $(VENV)/.runtime
	@echo "venv: $(ORACLES), with torch, transformers and mlx-lm (1.3 GiB; more where pip finds no CPU build)"
	test -x $(ORACLES)/bin/python || $$(sh tools/setup-system.sh --python) -m venv $(ORACLES)
	$(PY) tools/requirements.py oracles > $(ORACLES)/requirements.txt
	$(ORACLES)/bin/python -m pip install -q --disable-pip-version-check -r $(ORACLES)/requirements.txt
	touch $@

oracles: $(ORACLES)/.ready build  ## compare live with torch, transformers and mlx-lm, in an environment of their own
	@PYTHONPATH=$(CURDIR) $(ORACLES)/bin/python -m pytest tests/oracles $(ARGS)

# llama.cpp has no build for a processor on PyPI: llama-cpp-python's is compiled here, with what this one has, or for
# another (docs/performance.md#avx2). pip keeps what it has built without a look at these options: hence --no-cache-dir.
GGML := -DGGML_NATIVE=ON
$(PEERS)/.ready: pyproject.toml tools/requirements.py | $(VENV)/.runtime
	@echo "venv: $(PEERS), with torch, transformers and llama.cpp, which is compiled (5 to 20 minutes)"
	sh tools/setup-system.sh g++
	test -x $(PEERS)/bin/python || $$(sh tools/setup-system.sh --python) -m venv $(PEERS)
	$(PY) tools/requirements.py oracles peers > $(PEERS)/requirements.txt
	export CMAKE_ARGS="$(GGML)"
	pip="$(PEERS)/bin/python -m pip install -q --disable-pip-version-check"
	$$pip --no-cache-dir --no-binary llama-cpp-python -r $(PEERS)/requirements.txt
	PYTHONWARNINGS=ignore $$pip --no-build-isolation --no-deps -e .
	touch $@

peers: $(PEERS)/.ready build  ## other engines, to measure beside: .venv-peers/bin/python benchmarks/run.py delta_rule
	@KL_PEERS=ggml,torch_delta,naive_chunk $(PEERS)/bin/python -m pytest tests/bench $(ARGS)

lint: venv  ## ruff, clang-format, and a build in which warnings are errors
	@$(VENV)/bin/ruff check .
	find csrc tests/c tests/hip benchmarks -name '*.[ch]' -o -name '*.inc' -o -name '*.cpp' -o -name '*.hip' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	KL_WERROR=1 $(PY) setup.py -q lib build_ext --build-lib build/werror
	echo "lint: clean"

format: venv  ## bring C and Python into the form that `make lint` asks for
	@find csrc tests/c tests/hip benchmarks -name '*.[ch]' -o -name '*.inc' -o -name '*.cpp' -o -name '*.hip' | xargs $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff check --fix --quiet .

# A copy of the tree with a build of its own: the tests run there unchanged, but for the leak tests, which count
# what the C library's malloc holds: here the sanitizer's stands in its place (and looks for leaks in tests/c).
asan: venv  ## the test suite under AddressSanitizer and UndefinedBehaviorSanitizer
	@sh tools/setup-system.sh chromium
	rm -rf $(addprefix $(ASAN_TREE)/,csrc kimi_linear tests tools benchmarks notebooks docs)
	mkdir -p $(ASAN_TREE)
	for item in csrc kimi_linear tests tools benchmarks notebooks docs *.py *.toml *.md Makefile; do
	    if [ -e $$item ]; then cp -a $$item $(ASAN_TREE)/; fi
	done
	rm -f $(ASAN_TREE)/kimi_linear/*.so
	export KL_SANITIZE=address,undefined UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
	$(PY) setup.py -q lib
	ASAN_OPTIONS=detect_leaks=1 $(CTEST) LIB=../../build/lib-address-undefined-debug SANITIZE=$$KL_SANITIZE
	python=$(CURDIR)/$(PY)
	cd $(ASAN_TREE)
	$$python setup.py -q build_ext --inplace
	export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)"
	export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 PYTHONPATH=$$PWD PYTHONMALLOC=malloc
	$$python -m pytest -p no:cacheprovider --ignore tests/laws/test_leaks.py $(ARGS)

tsan: lib  ## the C programs of tests/c under ThreadSanitizer
	@export KL_SANITIZE=thread
	$(PY) setup.py -q lib
	$(CTEST) LIB=../../build/lib-thread-debug SANITIZE=thread

# CPU=cortex-a53 emulates a processor without sdot, which the default has.
AARCH64 := aarch64-linux-gnu-
aarch64: $(VENV)/.runtime  ## the C library for aarch64 by a cross compiler, and its C programs under emulation (5 minutes)
	@for tool in $(AARCH64)gcc qemu-aarch64; do
	    command -v $$tool >/dev/null && continue
	    echo "aarch64: there is no $$tool here; as root: sh tools/setup-system.sh $(AARCH64)gcc qemu-aarch64" >&2
	    exit 1
	done
	export CC=$(AARCH64)gcc KL_BLAS=none
	$(PY) setup.py -q lib
	root=$$(dirname $$(dirname $$(realpath $$($$CC -print-file-name=ld-linux-aarch64.so.1))))
	$(CTEST) LIB=../../build/lib-aarch64 CC=$$CC NM=$(AARCH64)nm \
	    RUN="qemu-aarch64 $(if $(CPU),-cpu $(CPU)) -L $$root"

# Compiled and linked by another system's compiler, never run. zig, which brings the headers and the library stubs of
# macOS, is installed for this target alone. Python's headers are this system's: the stable ABI hardly differs.
ZIG := build/zig
MACS := aarch64-macos x86_64-macos
$(ZIG)/.ready:
	@python=$$(sh tools/setup-system.sh --python)
	echo "venv: $(ZIG), with zig (100 MiB)"
	$$python -m venv $(ZIG)
	$(ZIG)/bin/python -m pip install -q --disable-pip-version-check "ziglang>=0.17,<0.18"
	touch $@

macos: $(VENV)/.runtime $(ZIG)/.ready  ## compile and link for macOS by zig: C library, its C programs, extension; nothing is run
	@sh tools/setup-system.sh pkg-config
	zig="$(CURDIR)/$(ZIG)/bin/python -m ziglang"
	export KL_BLAS=none KL_WERROR=1 AR="$$zig ar"
	for mac in $(MACS); do
	    export CC="$$zig cc -target $$mac.11.0"
	    $(PY) setup.py -q lib build_ext --build-lib build/macos/$$mac
	    what=programs
	    if command -v llvm-nm >/dev/null; then what="programs exports"; fi
	    $(CTEST) LIB=../../build/lib-$$mac-werror CC="$$CC" NM=llvm-nm SYSTEM=Darwin $$what
	    echo "macos: $$mac: compiled without a warning and linked; never run"
	done

long: build  ## what takes minutes: 131,072 tokens through one state, thousands of calls without a leak
	@for script in tests/long/*.py; do $(PY) $$script; done

# atheris is not among the tests' requirements: only this target installs it, and only fuzzing needs it.
fuzz: build  ## state files and GGUF by coverage-guided fuzzing, ten minutes each; FUZZ="-max_total_time=60" for others
	@$(PIP) "atheris>=3,<4"
	$(PY) tools/requirements.py test | $(PIP) -r /dev/stdin
	mkdir -p build/fuzz
	export PYTHONPATH=$(CURDIR)
	cd build/fuzz  # what it finds is left here: crash-...
	for target in statefile gguf; do
	    $(abspath $(PY)) $(CURDIR)/tests/fuzz/fuzz_$$target.py inputs-$$target $(or $(FUZZ),-max_total_time=600)
	done

bench: build  ## tokens/s, time and rate of every op beside the machine's roof
	@$(PY) -m kimi_linear bench $(ARGS)

clean:  ## remove everything that was built; environments stay
	rm -rf build dist *.egg-info kimi_linear/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed
