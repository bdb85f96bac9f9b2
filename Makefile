export JOINTKV_CACHE ?= $(HOME)/.cache/jointkv

# An empty JOINTKV_LLAMA_CPP_DIR takes an earlier one out of CMake's cache.
cache_variables = "-DJOINTKV_CACHE=$(JOINTKV_CACHE)" "-DJOINTKV_LLAMA_CPP_DIR=$(JOINTKV_LLAMA_CPP_DIR)"

.DEFAULT_GOAL := help
.PHONY: help setup serve test demo asan tsan format check tidy bench-peers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## install, fetch and build all that is needed; steps already done are skipped
	@tools/setup

serve: ## start the HTTP server with the default model on 127.0.0.1:8080
	@tools/setup --program
	@build/jointkv serve

test: setup ## build and run the tests
	@ctest --preset release

demo: ## run a batch of prompts with fusion off and on, and print a table of what each took
	@tools/setup --program
	@build/jointkv demo

asan: ## unit tests under AddressSanitizer and UBSan
	@tools/setup --no-build
	@cmake --preset $@ $(cache_variables) --log-level=WARNING
	@cmake --build --preset $@
	@ctest --preset $@

tsan: ## unit tests under ThreadSanitizer
	@tools/setup --no-build
	@cmake --preset $@ $(cache_variables) --log-level=WARNING
	@cmake --build --preset $@
	@ctest --preset $@

format: ## rewrite the sources in the house format
	@git ls-files -co --exclude-standard '*.cc' '*.h' | xargs -r clang-format -i

check: ## format and include checks, as CI runs them
	@git ls-files -co --exclude-standard '*.cc' '*.h' | xargs -r clang-format --dry-run -Werror
	@tools/check_includes.py

tidy: ## clang-tidy over all sources
	@tools/setup --dev --no-build
	@cmake --preset clang $(cache_variables) -DJOINTKV_BENCHMARKS=ON --log-level=WARNING
	@run-clang-tidy -quiet -p build/clang '^$(CURDIR)/(src|bench|tests)/'

bench-peers: setup ## speed against llama.cpp and OpenVINO GenAI, in turns; with TEXT=FILE KV quality too
	@bench/peers/engine
	@bench/peers/serve
	@test -z "$(TEXT)" || bench/peers/kv_quality --text "$(TEXT)"

clean: ## remove the build directory; the cache stays
	rm -rf build
