// What a CUDA toolkit has in its directory `stubs`, to link programs with where there is no driver.
int cuInit(unsigned flags);

// CUDA_ERROR_STUB_LIBRARY
int cuInit(unsigned flags) {
  (void)flags;
  return 34;
}
