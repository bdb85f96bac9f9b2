# jointkv_room(NAME LINKS rooms... LIBS libraries... TEST_LIBS libraries...)
#
# One static library `jointkv_NAME` from src/NAME/*.cc and one test program `NAME_test` from src/NAME/*_test.cc. The
# sources are globbed, so no file can be forgotten. A room may include headers of the rooms in LINKS and its own.
function(jointkv_room name)
  cmake_parse_arguments(ROOM "" "" "LINKS;LIBS;TEST_LINKS;TEST_LIBS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${name}/*.cc)
  set(tests ${sources})
  list(FILTER sources EXCLUDE REGEX "_test\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")

  add_library(jointkv_${name} STATIC ${sources})
  target_include_directories(jointkv_${name} PUBLIC ${CMAKE_SOURCE_DIR}/src)
  foreach(room ${ROOM_LINKS})
    target_link_libraries(jointkv_${name} PUBLIC jointkv_${room})
  endforeach()
  target_link_libraries(jointkv_${name} PUBLIC ${ROOM_LIBS})

  if(JOINTKV_TESTS AND tests)
    add_executable(${name}_test ${tests})
    target_link_libraries(${name}_test PRIVATE jointkv_${name} GTest::gtest GTest::gtest_main ${ROOM_TEST_LIBS})
    foreach(room ${ROOM_TEST_LINKS})
      target_link_libraries(${name}_test PRIVATE jointkv_${room})
    endforeach()
    add_test(NAME ${name} COMMAND ${name}_test)
    set_tests_properties(${name} PROPERTIES TIMEOUT 900)
  endif()
endfunction()
