# Runs PROGRAM with ARGUMENTS and checks it.
#   EXPECTED      a file: stdout is it, to the byte
#   LAST_LINE     a regular expression for the last line of stdout
#   EXIT_CODE     default 0
#   STDERR_LINES  how many lines stderr has
execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS}
  RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE errors)

function(fail text)
  message(FATAL_ERROR "${text}\n--- exit code ${code}, stdout:\n${output}\n--- stderr:\n${errors}")
endfunction()

if(NOT DEFINED EXIT_CODE)
  set(EXIT_CODE 0)
endif()
if(NOT code STREQUAL EXIT_CODE)
  fail("exit code ${code}, expected ${EXIT_CODE}")
endif()

if(DEFINED EXPECTED)
  file(READ "${EXPECTED}" expected)
  if(NOT output STREQUAL expected)
    fail("stdout is not ${EXPECTED}:\n${expected}")
  endif()
endif()

if(DEFINED LAST_LINE)
  string(REGEX REPLACE "\n$" "" lines "${output}")
  string(REGEX REPLACE ".*\n" "" last "${lines}")
  if(NOT last MATCHES "${LAST_LINE}")
    fail("the last line is '${last}', expected ${LAST_LINE}")
  endif()
endif()

if(DEFINED STDERR_LINES)
  string(REGEX MATCHALL "\n" ends "${errors}")
  list(LENGTH ends count)
  if(NOT count EQUAL STDERR_LINES OR NOT errors MATCHES "\n$")
    fail("${count} lines on stderr, expected ${STDERR_LINES}")
  endif()
endif()
