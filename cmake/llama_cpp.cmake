# Two INTERFACE targets over llama.cpp:
#   jointkv_ggml          ggml: GGUF files, quantised dot products, dequantisation
#   jointkv_llama_common  jointkv_ggml, libllama and its `common` library: tokenizer, samplers, chat templates;
#                         defines JOINTKV_LLAMA_VERSION
# and JOINTKV_GGUF_PY, the folder of the `gguf` Python module.
#
# The pinned source and its libraries come from the cache that tools/setup fills. With JOINTKV_LLAMA_CPP_DIR, that
# checkout is built as a part of this build instead, under the same sanitizers.
set(JOINTKV_CACHE "$ENV{JOINTKV_CACHE}" CACHE PATH "downloads and built dependencies (default ~/.cache/jointkv)")
set(JOINTKV_LLAMA_CPP_DIR "" CACHE PATH "a llama.cpp checkout to use instead of the pinned one")

add_library(jointkv_ggml INTERFACE)
add_library(jointkv_llama_common INTERFACE)
target_link_libraries(jointkv_ggml INTERFACE ggml ggml-cpu Threads::Threads)
target_link_libraries(jointkv_llama_common INTERFACE llama-common llama jointkv_ggml)

# jointkv_import_archive(NAME DIRECTORY DEPENDENCIES...)
function(jointkv_import_archive name directory)
  add_library(${name} STATIC IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES IMPORTED_LOCATION ${directory}/lib${name}.a)
  target_link_libraries(${name} INTERFACE ${ARGN})
endfunction()

function(jointkv_use_pinned_llama_cpp)
  set(environment)
  if(JOINTKV_CACHE)
    set(environment JOINTKV_CACHE=${JOINTKV_CACHE})
  endif()
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env ${environment} bash ${CMAKE_SOURCE_DIR}/tools/cache_paths.sh
    OUTPUT_VARIABLE paths OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" paths "${paths}")
  list(GET paths 0 source)
  list(GET paths 1 build)
  cmake_path(GET build PARENT_PATH stamp)
  cmake_path(APPEND stamp built)
  if(NOT EXISTS ${source} OR NOT EXISTS ${stamp})
    message(FATAL_ERROR "The llama.cpp libraries are not in ${build}. Run `make setup`, which fetches and builds them, "
                        "or point JOINTKV_LLAMA_CPP_DIR at a llama.cpp checkout.")
  endif()

  # The libraries' own build says which OpenMP they were compiled for.
  load_cache(${build} READ_WITH_PREFIX LLAMA_ OpenMP_CXX_LIB_NAMES)
  jointkv_import_archive(ggml-base ${build}/ggml/src ${LLAMA_OpenMP_CXX_LIB_NAMES} m Threads::Threads)
  jointkv_import_archive(ggml-cpu ${build}/ggml/src ggml-base)
  jointkv_import_archive(ggml ${build}/ggml/src ggml-cpu ${CMAKE_DL_LIBS})
  jointkv_import_archive(llama ${build}/src ggml)
  jointkv_import_archive(cpp-httplib ${build}/vendor/cpp-httplib Threads::Threads)
  jointkv_import_archive(llama-common-base ${build}/common)
  jointkv_import_archive(llama-common ${build}/common llama-common-base cpp-httplib llama)

  target_include_directories(jointkv_ggml SYSTEM INTERFACE ${source}/ggml/include)
  target_include_directories(jointkv_llama_common SYSTEM INTERFACE ${source}/include ${source}/common ${source}/vendor)
  set(source ${source} PARENT_SCOPE)
endfunction()

function(jointkv_use_llama_cpp_checkout source)
  set(BUILD_SHARED_LIBS OFF)
  set(GGML_NATIVE ON)
  set(GGML_CCACHE OFF)
  set(LLAMA_BUILD_COMMON ON)
  set(LLAMA_OPENSSL OFF)
  set(LLAMA_USE_PREBUILT_UI OFF)
  foreach(part TOOLS SERVER TESTS EXAMPLES APP)
    set(LLAMA_BUILD_${part} OFF)
  endforeach()
  unset(CMAKE_CXX_STANDARD)
  unset(CMAKE_CXX_EXTENSIONS)
  # Our warnings are not theirs.
  get_directory_property(compile_options COMPILE_OPTIONS)
  set(their_options ${compile_options})
  list(FILTER their_options EXCLUDE REGEX "^-W")
  set_directory_properties(PROPERTIES COMPILE_OPTIONS "${their_options};-w")
  set(CMAKE_COMPILE_WARNING_AS_ERROR OFF)
  add_subdirectory(${source} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL SYSTEM)
  set_directory_properties(PROPERTIES COMPILE_OPTIONS "${compile_options}")
  target_include_directories(jointkv_llama_common SYSTEM INTERFACE ${source}/vendor)
endfunction()

if(JOINTKV_LLAMA_CPP_DIR)
  cmake_path(ABSOLUTE_PATH JOINTKV_LLAMA_CPP_DIR OUTPUT_VARIABLE source)
  if(NOT EXISTS ${source}/ggml/CMakeLists.txt)
    message(FATAL_ERROR "JOINTKV_LLAMA_CPP_DIR '${source}' is not a llama.cpp checkout")
  endif()
  jointkv_use_llama_cpp_checkout(${source})
else()
  jointkv_use_pinned_llama_cpp()
endif()

file(STRINGS ${source}/CMakeLists.txt version_lines REGEX "^set\\(LLAMA_VERSION_(MAJOR|MINOR|PATCH) +[0-9]+\\)")
list(TRANSFORM version_lines REPLACE "^.* ([0-9]+)\\)$" "\\1")
list(JOIN version_lines "." version)
target_compile_definitions(jointkv_llama_common INTERFACE JOINTKV_LLAMA_VERSION="${version}")
set(JOINTKV_GGUF_PY ${source}/gguf-py)
