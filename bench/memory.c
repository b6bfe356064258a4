/* memory.c: what /proc says of this process's memory, beside what the library's own counters say. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "bench.h"

/* The staging is the one mapping of the library that this process may write; those of its peers it may only read. */
bench_memory bench_memory_now(void) {
  bench_memory now = {0};
  FILE *file = fopen("/proc/self/smaps", "r");
  if (!file) bench_die("/proc/self/smaps: cannot be opened");
  bool staging = false;
  char line[4352], access[8];
  while (fgets(line, sizeof line, file)) {
    uint64_t kib;
    if (sscanf(line, "%*x-%*x %7s", access) == 1) {
      staging = access[1] == 'w' && strstr(line, "/memfd:rsbucket");
    } else if (sscanf(line, "Rss: %" SCNu64, &kib) == 1) {
      now.staging_resident += staging ? kib << 10 : 0;
    } else if (sscanf(line, "Anonymous: %" SCNu64, &kib) == 1) {
      now.private_growth += kib << 10;
    }
  }
  fclose(file);
  return now;
}
