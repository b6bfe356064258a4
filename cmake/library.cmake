# The target rsbucket::rsbucket: cargo builds the shared library, CMake links to it.
add_library(rsbucket::rsbucket SHARED IMPORTED GLOBAL)
target_include_directories(rsbucket::rsbucket INTERFACE "${RSB_INCLUDE_DIR}")

if(RSB_LIBRARY)
  set(RSB_LIBRARY_FILE "${RSB_LIBRARY}")
else()
  # Cargo's own names: the profile dev writes to debug.
  string(REGEX REPLACE "^dev$" "debug" profile_dir "${RSB_PROFILE}")
  set(RSB_LIBRARY_FILE "${RSB_TARGET_DIR}/${profile_dir}/librsbucket.so")

  find_program(CARGO cargo HINTS "$ENV{HOME}/.cargo/bin" REQUIRED)
  set(soname_env)
  set(soname_link)
  if(RSB_SONAME)
    set(soname_env RSBUCKET_SONAME=1)
    set(soname_link COMMAND "${CMAKE_COMMAND}" -E create_symlink librsbucket.so
                            "${RSB_TARGET_DIR}/${profile_dir}/librsbucket.so.${RSB_ABI_VERSION}")
  endif()
  # Cargo knows what has changed, so it is always asked.
  add_custom_target(rsbucket_cargo ALL
    COMMAND "${CMAKE_COMMAND}" -E env --unset=RSBUCKET_SONAME ${soname_env}
            "${CARGO}" build --lib --locked --profile "${RSB_PROFILE}" --target-dir "${RSB_TARGET_DIR}"
    ${soname_link}
    BYPRODUCTS "${RSB_LIBRARY_FILE}"
    WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
    COMMENT "cargo build (${RSB_PROFILE})"
    USES_TERMINAL)
  add_dependencies(rsbucket::rsbucket rsbucket_cargo)
endif()

set_target_properties(rsbucket::rsbucket PROPERTIES IMPORTED_LOCATION "${RSB_LIBRARY_FILE}")
if(RSB_SONAME)
  set_target_properties(rsbucket::rsbucket PROPERTIES IMPORTED_SONAME "librsbucket.so.${RSB_ABI_VERSION}")
else()
  set_target_properties(rsbucket::rsbucket PROPERTIES IMPORTED_NO_SONAME ON)
endif()
