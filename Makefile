export JOINTKV_CACHE ?= $(HOME)/.cache/jointkv

.DEFAULT_GOAL := help
.PHONY: help setup serve test demo asan tsan format check tidy bench-peers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## install, fetch and build all that is needed; steps already done are skipped
	@tools/setup

serve: setup ## chat with the model on the terminal
	@build/jointkv chat

test: setup ## build and run the tests
	@ctest --preset release

demo: setup ## run a batch of prompts and print a table of what it took
	@build/jointkv demo

asan: ## unit tests under AddressSanitizer and UBSan
	@tools/setup --no-build
	@cmake --preset $@ -DJOINTKV_CACHE=$(JOINTKV_CACHE) --log-level=WARNING
	@cmake --build --preset $@
	@ctest --preset $@

tsan: ## unit tests under ThreadSanitizer
	@tools/setup --no-build
	@cmake --preset $@ -DJOINTKV_CACHE=$(JOINTKV_CACHE) --log-level=WARNING
	@cmake --build --preset $@
	@ctest --preset $@

format: ## rewrite the sources in the house format
	@git ls-files -co --exclude-standard '*.cc' '*.h' | xargs -r clang-format -i

check: ## format and include checks, as CI runs them
	@git ls-files -co --exclude-standard '*.cc' '*.h' | xargs -r clang-format --dry-run -Werror
	@tools/check_includes.py

tidy: ## clang-tidy over all sources
	@tools/setup --dev --no-build
	@cmake --preset clang -DJOINTKV_CACHE=$(JOINTKV_CACHE) --log-level=WARNING
	@run-clang-tidy -quiet -p build/clang '/(src|bench|tests)/'

bench-peers: setup ## speed against llama.cpp and OpenVINO GenAI, interleaved on this machine
	@bench/peers/engine

clean: ## remove the build directory; the cache stays
	rm -rf build
