# Compiles FILE with -DMUST_NOT_COMPILE. It must fail, and for the reason that the file itself names:
#   // error: REGEX    matches the compiler's first error line
#   // also: REGEX     matches somewhere in what the compiler says (optional)
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env LC_ALL=C ${COMPILER} -std=c++20 -Werror=unused-result -fsyntax-only -DMUST_NOT_COMPILE
          -I${INCLUDE} ${FILE}
  RESULT_VARIABLE status ERROR_VARIABLE said OUTPUT_QUIET)
if(status EQUAL 0)
  message(FATAL_ERROR "${FILE} compiles with MUST_NOT_COMPILE")
endif()
file(STRINGS ${FILE} wanted REGEX "^// (error|also): ")
string(REGEX MATCH "[^\n]*error:[^\n]*" first "${said}")
set(errors 0)
foreach(line IN LISTS wanted)
  string(REGEX REPLACE "^// (error|also): " "" pattern "${line}")
  if(line MATCHES "^// error: ")
    math(EXPR errors "${errors} + 1")
    set(text "${first}")
  else()
    set(text "${said}")
  endif()
  if(NOT text MATCHES "${pattern}")
    message(FATAL_ERROR "${FILE} fails for another reason than '${pattern}':\n${said}")
  endif()
endforeach()
if(NOT errors EQUAL 1)
  message(FATAL_ERROR "${FILE} must name one '// error: REGEX'")
endif()
