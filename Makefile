# Everything a person needs: `make run` (a confidential chat) and `make test`. Both set up .venv and the engine themselves.
PYTHON ?= python3
PORT ?= 8484
MODEL ?= default
BIN := .venv/bin
POOL := -n 4 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-system test-peers test-image test-image-twice test-app-image image check lint fix bench setup page lock clean

run: setup
	@exec $(BIN)/cloister up --port $(PORT) "$(MODEL)"

test: setup
	$(BIN)/pytest -q -m "not system" $(POOL)

NODE_MODULES := $(patsubst %,web/%/node_modules/.package-lock.json,chat client interop)
test-system: setup .venv-interop/.installed $(NODE_MODULES)  # needs Node.js and the packages of tools/ci-packages.txt; a missing one fails
	$(BIN)/pytest -q -m "system and not peer and not image and not app_image" $(POOL)

test-peers: setup  # builds llama-server first: minutes, once
	$(BIN)/pytest -q -m peer

image: setup  # the measured image, from Debian's packages: as root; minutes the first time
	@$(BIN)/python packaging/image/build.py

test-app-image: setup  # the image for Python apps, and an app in it: as root; needs the packages of tools/ci-packages.txt
	$(BIN)/pytest -q -m app_image

test-image-twice: setup  # two builds of that image, each from nothing, give the same bytes: as root; minutes
	rm -rf build/twice
	for n in 1 2; do XDG_CACHE_HOME=$(CURDIR)/build/twice/$$n $(BIN)/python packaging/image/build.py --no-engine --packages any --output build/twice/image-$$n || exit 1; done
	cmp build/twice/image-1/cloister.json build/twice/image-2/cloister.json

test-image: setup  # builds the image, then boots it under QEMU without KVM: minutes
	$(BIN)/pytest -q -m image

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

fix: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	exec $(BIN)/cloister bench overhead

page: web/chat/node_modules/.package-lock.json  # the web chat's files in the package, from web/chat
	@cd web/chat && npm run check && npm run build

web/%/node_modules/.package-lock.json: web/%/package-lock.json
	@cd web/$* && npm ci --ignore-scripts --no-audit --no-fund && touch node_modules/.package-lock.json

setup: .venv/.installed .venv/.engine

.venv/.installed: pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "cloister needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "setting up .venv (once; about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/.engine: .venv/.installed requirements/engine.txt tools/build_engine.py tools/engine.patch
	@$(BIN)/python tools/build_engine.py
	@touch $@

.venv-interop/.installed: requirements/interop.txt  # other people's tools, apart from ours
	@test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	@.venv-interop/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/interop.txt
	@touch $@

LOCK := $(BIN)/pip-compile -q --generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --strip-extras --no-header --allow-unsafe
lock:
	$(LOCK) -o requirements/client.txt pyproject.toml
	$(LOCK) --extra server -c requirements/client.txt -o requirements/server.txt pyproject.toml
	$(LOCK) --extra server,bench,rim,sigstore -c requirements/server.txt -o requirements/dev.txt pyproject.toml requirements/dev.in
	$(LOCK) -c requirements/server.txt -o requirements/peers.txt requirements/peers.in
	$(LOCK) -o requirements/interop.txt requirements/interop.in
	$(LOCK) --no-emit-options --pip-args "--no-binary llama-cpp-python" -o requirements/engine.txt requirements/engine.in

clean:
	rm -rf .venv .venv-interop build dist *.egg-info src/*.egg-info
