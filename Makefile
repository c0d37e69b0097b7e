# Needs Python >= 3.11, make and a package index, nothing else.
#   make demo      turn a tiny language model into a diffusion model and report what it buys
#   make check     formatting, lint, types, import contracts, docstrings
#   make test      check, then the suite against the installed wheel
#   make docs      README and docs/ as a site in site/; warnings are errors
#   make test-all  the same with the tests marked slow
#   make test-newest, make test-oldest   the suite with today's releases, and with the lower bounds of pyproject.toml
#   make test-kernels  golden, solver, conformance and generation tests under five sets of a processor's kernels

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
WORKERS ?= 2
PYTEST_ARGS ?=
# Holds torch in test-newest and test-oldest, as in TORCH=torch==2.13.0; their rule decides where it is empty.
TORCH ?=

# Tested versions; a constraint of the caller's own wins.
export PIP_CONSTRAINT ?= $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# It would put a working tree before the installed wheel.
unexport PYTHONPATH

.PHONY: demo check docs wheel install-wheel test test-all test-newest test-oldest test-kernels clean

demo: .venv/.demo
	.venv/bin/l2d demo

check: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/pydoclint --quiet l2d_framework plugins bench

# Not --quiet, under which --strict counts no warning; mkdocs-material speaks of MkDocs 2, which is not installed.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

test: check install-wheel
	$(call run-suite,.venv-test)

test-all: check install-wheel
	$(call run-suite,.venv-test) -m ""

test-newest: wheel
	echo "$(TORCH)" > dist/newest.txt
	$(call suite-in-new,newest)

test-oldest: wheel
	.venv/bin/python .ci/floors.py $(TORCH) > dist/oldest.txt
	$(call suite-in-new,oldest)

# Other kernels round otherwise; what the caller of make has set is the sixth.
kernel-tests = $(addprefix $(CURDIR)/tests/,golden testing/test_conformance.py generation/test_loop.py plugins/test_solvers.py plugins/test_solvers_rk.py)
test-kernels: install-wheel
	$(call run-kernels)
	$(call run-kernels,MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2)
	$(call run-kernels,ATEN_CPU_CAPABILITY=avx2)
	$(call run-kernels,ATEN_CPU_CAPABILITY=default)
	$(call run-kernels,MKL_CBWR=COMPATIBLE)

clean:
	rm -rf .venv .venv-test .venv-newest .venv-oldest dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache site

# From an empty folder, so that only the installed wheel can be imported.
run-suite = $(call run-tests,$(1),,$(CURDIR)/tests)
run-kernels = $(call run-tests,.venv-test,$(1),$(kernel-tests))
run-tests = folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" && \
	env $(2) L2D_EXPECT_INSTALLED=1 OMP_NUM_THREADS=1 $(CURDIR)/$(1)/bin/python -m pytest \
	-c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) $(3)

wheels = "$$(echo dist/l2d_framework-*.whl)[all,text-metrics]" dist/l2d_bench-*.whl

# In a fresh environment .venv-NAME whose only constraints are those of dist/NAME.txt.
define suite-in-new
	$(call create-environment,.venv-$(1))
	PIP_CONSTRAINT=$(CURDIR)/dist/$(1).txt .venv-$(1)/bin/python -m pip install --quiet \
		$(wheels) --group test
	.venv-$(1)/bin/python -m pip freeze
	$(call run-suite,.venv-$(1))
endef

# pip 25.1 is the first that reads dependency groups.
define create-environment
	$(if $(PYTHON),,$(error Python >= 3.11 was not found; set PYTHON to one))
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
endef

.venv/.created:
	$(call create-environment,.venv)
	touch $@

.venv/.demo: .venv/.created pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet --editable ".[plots]"
	touch $@

.venv/.dev: .venv/.created pyproject.toml bench/pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet --editable ".[all,text-metrics]" --editable bench --group dev
	touch $@

# The reference is made of what is installed, so that it needs all of the development environment.
.venv/.docs: .venv/.dev
	.venv/bin/python -m pip install --quiet --group docs
	touch $@

# By way of the source distributions, which must be complete too.
wheel: .venv/.dev
	rm -rf dist
	.venv/bin/python -m build --no-isolation --outdir dist .
	.venv/bin/python -m build --no-isolation --outdir dist bench

.venv-test/.created: pyproject.toml bench/pyproject.toml constraints.txt | wheel
	$(call create-environment,.venv-test)
	.venv-test/bin/python -m pip install --quiet $(wheels) --group test
	touch $@

install-wheel: wheel .venv-test/.created
	.venv-test/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
