# Runs every C example and compares what it prints with c_examples/expected, to the byte.
if(NOT BUILD_TESTING)
  return()
endif()

set(run_program "${CMAKE_CURRENT_LIST_DIR}/run_program.cmake")

# rsb_example_test(name target [ARGS argument...] [CHECK -DKEY=VALUE...]): KEYs are run_program.cmake's.
function(rsb_example_test name target)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "ARGS;CHECK")
  add_test(NAME ${name}
    COMMAND "${CMAKE_COMMAND}" "-DPROGRAM=$<TARGET_FILE:${target}>" "-DARGUMENTS=${arg_ARGS}" ${arg_CHECK}
            -P "${run_program}")
  set_tests_properties(${name} PROPERTIES TIMEOUT 120 LABELS example ENVIRONMENT "${RSB_TEST_ENVIRONMENT}")
endfunction()

file(GLOB expected_files CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/c_examples/expected/*.txt")
foreach(file IN LISTS expected_files)
  get_filename_component(example "${file}" NAME_WE)
  set(arguments)
  if(example STREQUAL "04_dlopen")
    set(arguments "${RSB_LIBRARY_FILE}")
  endif()
  rsb_example_test(example_${example} ${example} ARGS ${arguments} CHECK "-DEXPECTED=${file}")
endforeach()

if(TARGET train_digits)
  set(data "${PROJECT_SOURCE_DIR}/data/digits.csv")
  set(last_line "-DLAST_LINE=^final test accuracy: [0-9.]+ %$")
  rsb_example_test(example_train_digits train_digits ARGS --data "${data}" --epochs 2 CHECK "${last_line}")
  rsb_example_test(example_train_digits_one_rank train_digits
    ARGS --data "${data}" --epochs 1 --ranks 1 --bucket-kb 1 CHECK "${last_line}")
  foreach(rank 0 2)
    rsb_example_test(example_train_digits_loses_rank_${rank} train_digits
      ARGS --data "${data}" --ranks 3 --epochs 2 --kill-rank ${rank} --at-step 20 CHECK "${last_line}")
  endforeach()

  # Bad options: exit code 2 and one line that says why.
  set(bad -DEXIT_CODE=2 -DSTDERR_LINES=1)
  rsb_example_test(example_train_digits_bad_option train_digits ARGS --no-such-option CHECK ${bad})
  rsb_example_test(example_train_digits_no_value train_digits ARGS --ranks CHECK ${bad})
  rsb_example_test(example_train_digits_no_number train_digits ARGS --ranks four CHECK ${bad})
  rsb_example_test(example_train_digits_no_ranks train_digits ARGS --ranks 0 CHECK ${bad})
  rsb_example_test(example_train_digits_negative train_digits ARGS --epochs -3 CHECK ${bad})
  rsb_example_test(example_train_digits_small_batch train_digits ARGS --ranks 4 --batch 3 CHECK ${bad})
  rsb_example_test(example_train_digits_no_data train_digits ARGS --data no/such/file.csv CHECK ${bad})
  rsb_example_test(example_train_digits_damaged_data train_digits
    ARGS --data "${PROJECT_SOURCE_DIR}/CMakeLists.txt" CHECK ${bad})
endif()
