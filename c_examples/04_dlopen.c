/* 04_dlopen.c - rsbucket without linking: load it at run time, check its version, use it.
 *
 * A program that can do without the library asks for it like this. Usage: 04_dlopen [path of librsbucket.so] */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rsbucket.h"

enum { NUMEL = 4 };

/* The functions this program uses, with the types the header gives them. */
static struct {
  uint32_t (*version)(void);
  uint32_t (*abi_version)(void);
  const char *(*status_name)(rsb_status);
  rsb_status (*comm_create_local)(uint32_t, const rsb_comm_config *, rsb_comm **, rsb_error *);
  void (*comm_free)(rsb_comm *);
  rsb_status (*bucketer_create)(const rsb_config *, rsb_bucketer **, rsb_error *);
  rsb_status (*bucketer_submit)(rsb_bucketer *, rsb_comm *, const rsb_submit_args *, rsb_ticket *, rsb_error *);
  rsb_status (*bucketer_flush)(rsb_bucketer *, rsb_error *);
  rsb_status (*bucketer_free)(rsb_bucketer *);
} rsb;

/* Writes a symbol's address into the function pointer at `function`: ISO C has no cast from void * for it. */
static void load(void *library, const char *name, void *function) {
  void *symbol = dlsym(library, name);
  if (symbol == NULL) {
    fprintf(stderr, "%s is missing: %s\n", name, dlerror());
    exit(EXIT_FAILURE);
  }
  memcpy(function, &symbol, sizeof symbol);
}

static void check(rsb_status status, const rsb_error *err, const char *what) {
  if (status == RSB_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, rsb.status_name(status), err->message);
  exit(EXIT_FAILURE);
}

static void on_shard(void *user_data, const rsb_result *result) {
  (void)user_data;
  check(result->status, result->error, "the reduce-scatter failed");
  printf("shard:");
  for (size_t i = 0; i < result->numel; i++) printf(" %g", (double)((const float *)result->data)[i]);
  putchar('\n');
}

int main(int argc, char **argv) {
  const char *path = argc > 1 ? argv[1] : "librsbucket.so";
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "cannot load the library: %s\n", dlerror());
    return EXIT_FAILURE;
  }
  load(library, "rsb_version", &rsb.version);
  load(library, "rsb_abi_version", &rsb.abi_version);
  /* Before anything else: another ABI gives these names another meaning; an older version may lack some of them. */
  if (rsb.abi_version() != RSB_ABI_VERSION) {
    fprintf(stderr, "the library speaks ABI %u, this program %u\n", (unsigned)rsb.abi_version(), RSB_ABI_VERSION);
    return EXIT_FAILURE;
  }
  uint32_t built_for = RSB_VERSION_MAJOR << 16 | RSB_VERSION_MINOR << 8 | RSB_VERSION_PATCH;
  printf("ABI %u, version %s\n", (unsigned)rsb.abi_version(),
         rsb.version() >= built_for ? "as new as this program's header" : "older than this program's header");

  load(library, "rsb_status_name", &rsb.status_name);
  load(library, "rsb_comm_create_local", &rsb.comm_create_local);
  load(library, "rsb_comm_free", &rsb.comm_free);
  load(library, "rsb_bucketer_create", &rsb.bucketer_create);
  load(library, "rsb_bucketer_submit", &rsb.bucketer_submit);
  load(library, "rsb_bucketer_flush", &rsb.bucketer_flush);
  load(library, "rsb_bucketer_free", &rsb.bucketer_free);

  rsb_comm *comm;
  rsb_bucketer *bucketer;
  rsb_error err;
  check(rsb.comm_create_local(1, NULL, &comm, &err), &err, "rsb_comm_create_local");
  check(rsb.bucketer_create(NULL, &bucketer, &err), &err, "rsb_bucketer_create");

  /* One rank: its shard is the whole input, here scaled by a half. */
  const float input[NUMEL] = {3, -1, 4, 10};
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.flat_input = input;
  args.numel = NUMEL;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  args.scale = 0.5;
  args.callback = on_shard;
  check(rsb.bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
  check(rsb.bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
  rsb.bucketer_free(bucketer);
  rsb.comm_free(comm);
  dlclose(library);
  return EXIT_SUCCESS;
}
