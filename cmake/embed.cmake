# jointkv_embed(TARGET FOLDER SYMBOL): makes the files of FOLDER part of TARGET, as what
#   extern const std::vector<std::pair<std::string_view, std::string_view>> SYMBOL;   // names and bytes
# declares in namespace jointkv. This file is also the script that writes it, when a file of the folder has changed:
#   cmake -DFOLDER=... -DSYMBOL=... -DOUTPUT=... -P embed.cmake
if(CMAKE_SCRIPT_MODE_FILE)
  set(arrays)
  set(entries)
  file(GLOB files ${FOLDER}/*)
  foreach(file ${files})
    get_filename_component(name ${file} NAME)
    string(MAKE_C_IDENTIFIER ${name} array)
    file(READ ${file} bytes HEX)
    string(REGEX REPLACE "(................................)" "\\1\n" bytes "${bytes}")
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "'\\\\x\\1'," bytes "${bytes}")
    string(APPEND arrays "const char ${array}[] = {\n${bytes}};\n")
    string(APPEND entries "    {\"${name}\", {${array}, sizeof(${array})}},\n")
  endforeach()
  file(WRITE ${OUTPUT} "#include <string_view>\n#include <utility>\n#include <vector>\n\nnamespace jointkv {\nnamespace {\n"
                       "${arrays}}  // namespace\n"
                       "extern const std::vector<std::pair<std::string_view, std::string_view>> ${SYMBOL};\n"
                       "const std::vector<std::pair<std::string_view, std::string_view>> ${SYMBOL} = {\n${entries}};\n"
                       "}  // namespace jointkv\n")
  return()
endif()

set(JOINTKV_EMBED ${CMAKE_CURRENT_LIST_FILE})

function(jointkv_embed target folder symbol)
  set(folder ${CMAKE_CURRENT_SOURCE_DIR}/${folder})
  set(output ${CMAKE_CURRENT_BINARY_DIR}/${symbol}.cc)
  file(GLOB files CONFIGURE_DEPENDS ${folder}/*)
  add_custom_command(OUTPUT ${output}
                     COMMAND ${CMAKE_COMMAND} -DFOLDER=${folder} -DSYMBOL=${symbol} -DOUTPUT=${output} -P ${JOINTKV_EMBED}
                     DEPENDS ${files} ${JOINTKV_EMBED}
                     VERBATIM)
  target_sources(${target} PRIVATE ${output})
endfunction()
