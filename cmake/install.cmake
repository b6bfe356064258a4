# Installs the header, the library, rsbucket.pc and the CMake package.
include(CMakePackageConfigHelpers)

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")

if(RSB_SONAME)
  # librsbucket.so (for the linker) -> librsbucket.so.ABI (the SONAME) -> librsbucket.so.VERSION.
  set(real "librsbucket.so.${PROJECT_VERSION}")
  set(soname "librsbucket.so.${RSB_ABI_VERSION}")
  install(PROGRAMS "${RSB_LIBRARY_FILE}" DESTINATION "${CMAKE_INSTALL_LIBDIR}" RENAME "${real}")
  set(links "${PROJECT_BINARY_DIR}/install_links")
  file(MAKE_DIRECTORY "${links}")
  file(CREATE_LINK "${real}" "${links}/${soname}" SYMBOLIC)
  file(CREATE_LINK "${soname}" "${links}/librsbucket.so" SYMBOLIC)
  install(FILES "${links}/${soname}" "${links}/librsbucket.so" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
  set(RSB_CONFIG_SONAME "IMPORTED_SONAME ${soname}")
else()
  install(PROGRAMS "${RSB_LIBRARY_FILE}" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
  set(RSB_CONFIG_SONAME "IMPORTED_NO_SONAME ON")
endif()

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/rsbucket")
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/rsbucketConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/rsbucketConfig.cmake"
  INSTALL_DESTINATION "${package_dir}"
  PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/rsbucketConfigVersion.cmake"
  VERSION "${PROJECT_VERSION}" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/rsbucketConfig.cmake" "${PROJECT_BINARY_DIR}/rsbucketConfigVersion.cmake"
        DESTINATION "${package_dir}")

# pkg-config wants absolute directories, which the install variables may or may not be.
foreach(kind LIBDIR INCLUDEDIR)
  if(IS_ABSOLUTE "${CMAKE_INSTALL_${kind}}")
    set(RSB_PC_${kind} "${CMAKE_INSTALL_${kind}}")
  else()
    set(RSB_PC_${kind} "\${prefix}/${CMAKE_INSTALL_${kind}}")
  endif()
endforeach()
configure_file("${CMAKE_CURRENT_LIST_DIR}/rsbucket.pc.in" "${PROJECT_BINARY_DIR}/rsbucket.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/rsbucket.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
