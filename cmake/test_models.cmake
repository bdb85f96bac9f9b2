# jointkv_use_test_models(NAME)
#
# Gives NAME_test the random models of tools/make_test_models, made by the test `test_models` before it runs, and splits
# off its RealModelTest suite: the test `NAME_e2e`, label e2e, with an f32 copy of the default model that the test
# `f32_model` makes. The program learns of their folder by the definition JOINTKV_TEST_MODELS.
function(jointkv_use_test_models name)
  if(NOT TARGET ${name}_test)
    return()
  endif()
  set(directory ${CMAKE_BINARY_DIR}/test_models)
  target_compile_definitions(${name}_test PRIVATE JOINTKV_TEST_MODELS="${directory}"
                                                  JOINTKV_SOURCE_DIR="${CMAKE_SOURCE_DIR}")

  # The first python3 on the path need not be the one that the system's packages belong to.
  set(python python3)
  foreach(candidate python3 /usr/bin/python3)
    execute_process(COMMAND ${candidate} -c "import numpy, yaml" RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
    if(result EQUAL 0)
      set(python ${candidate})
      break()
    endif()
  endforeach()
  set(environment PYTHON=${python} PYTHONPATH=${JOINTKV_GGUF_PY})
  if(JOINTKV_CACHE)
    list(APPEND environment JOINTKV_CACHE=${JOINTKV_CACHE})
  endif()

  add_test(NAME test_models COMMAND ${CMAKE_SOURCE_DIR}/tools/make_test_models ${directory})
  set_tests_properties(test_models PROPERTIES ENVIRONMENT "${environment}" FIXTURES_SETUP test_models)
  add_test(NAME f32_model COMMAND ${CMAKE_SOURCE_DIR}/tools/make_test_models --f32-copy ${directory})
  set_tests_properties(f32_model PROPERTIES ENVIRONMENT "${environment}" FIXTURES_SETUP f32_model LABELS e2e
                       SKIP_RETURN_CODE 77)

  set_tests_properties(${name} PROPERTIES ENVIRONMENT GTEST_FILTER=-RealModelTest.* FIXTURES_REQUIRED test_models)
  add_test(NAME ${name}_e2e COMMAND ${name}_test --gtest_filter=RealModelTest.*)
  set_tests_properties(${name}_e2e PROPERTIES FIXTURES_REQUIRED f32_model LABELS e2e TIMEOUT 1800)
  if(JOINTKV_CACHE)
    set_tests_properties(${name}_e2e PROPERTIES ENVIRONMENT JOINTKV_CACHE=${JOINTKV_CACHE})
  endif()
endfunction()
