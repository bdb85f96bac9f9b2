#!/usr/bin/env bash
# Where fetched and built dependencies live. Sourced by tools/setup and the bench scripts; when run, as by
# cmake/llama_cpp.cmake, it prints the llama.cpp source and build directories.
#
#   $JOINTKV_CACHE/dl                              downloads, as they came
#   $JOINTKV_CACHE/models                          GGUF files
#   $JOINTKV_CACHE/llama.cpp-<version>/src         pinned source
#   $JOINTKV_CACHE/llama.cpp-<version>/<key>/build libraries of one machine type

export JOINTKV_CACHE="${JOINTKV_CACHE:-$HOME/.cache/jointkv}"

llama_cpp_version=0.3.36
llama_cpp_options=(
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=cc -DCMAKE_CXX_COMPILER=c++ -DBUILD_SHARED_LIBS=OFF
  -DGGML_NATIVE=ON -DGGML_CCACHE=OFF
  -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
)

# The libraries are built for the CPU at hand, so the key holds its instruction sets: a cache that several machines
# share never hands out code that one of them cannot run.
llama_cpp_key() {
  { c++ --version; uname -m; grep -m1 -E '^(flags|Features)' /proc/cpuinfo; printf '%s\n' "${llama_cpp_options[@]}"; } |
    sha256sum | cut -c1-12
}

llama_cpp_src() { echo "$JOINTKV_CACHE/llama.cpp-$llama_cpp_version/src"; }
llama_cpp_build() { echo "$JOINTKV_CACHE/llama.cpp-$llama_cpp_version/$(llama_cpp_key)/build"; }

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  llama_cpp_src
  llama_cpp_build
fi
