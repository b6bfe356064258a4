// A stand-in for libnccl.so.2 on the driver's stand-in: ranks are threads of one process. Calls are checked
// and put on streams here; nccl_meet.cc carries them out there, when all ranks have come.
#include "nccl_meet.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

using namespace fake;

namespace {

int version() {
  static int v = [] {
    const char *text = getenv("RSB_FAKE_NCCL_VERSION");
    return text == nullptr || *text == 0 ? 23007 : atoi(text);
  }();
  return v;
}

// What a thread has put into its group and not ended.
struct Grouped {
  int depth = 0;
  ncclResult_t failed = ncclSuccess;
  std::vector<Call> calls;
  std::vector<Comm *> births;
  ~Grouped() {
    if (depth != 0) breach("a thread ended inside of ncclGroupStart");
  }
};
Grouped &grouped() {
  static thread_local Grouped g;
  return g;
}

std::map<std::string, Team *> &teams() {
  static auto *all = new std::map<std::string, Team *>;
  return *all;
}

thread_local std::string last_error;

ncclResult_t wrong(ncclResult_t code, const std::string &text) {
  last_error = text;
  return code;
}

ncclResult_t begin_nccl(const char *name, CUresult *later) {
  CUresult ignored = 0;
  if (self().in_host_function) breach("%s inside a host function", name);
  return ordered_error(name, "nccl*", later != nullptr ? later : &ignored);
}

#define BEGIN_NCCL()                                              \
  do {                                                            \
    ncclResult_t begun = begin_nccl(__func__, nullptr);           \
    if (begun != ncclSuccess) return wrong(begun, "ordered error"); \
  } while (0)

bool living(Comm *comm) {
  Lock lock(machine().lock);
  return comms().count(comm) != 0;
}

// One comm, one thread at a time.
struct Using {
  Comm *comm;
  explicit Using(Comm *c) : comm(c) {
    if (comm->users++ != 0) breach("two threads use rank %d's communicator at the same time", comm->rank);
  }
  ~Using() { comm->users--; }
};

// All calls of one comm in a group are one launch.
ncclResult_t launch(Comm *comm, const std::vector<Call> &calls, CUresult later) {
  Lock lock(machine().lock);
  Context *context = machine().primaries[(size_t)comm->device];
  auto shared = std::make_shared<std::vector<Call>>(calls);
  uint64_t number = comm->launches++;
  if (!agree(comm, number, calls)) return wrong(ncclInvalidUsage, "ranks differ in their calls");
  Stream *s = (Stream *)calls[0].stream;
  comm->streams.insert(s);
  bool captured = s->capture != nullptr;
  for (const Call &call : calls) {
    // Several streams: the launch comes after all of them, and they go on after it.
    if ((Stream *)call.stream == s) continue;
    Event before;
    before.context = ((Stream *)call.stream)->context;
    if (record_event(lock, &before, (Stream *)call.stream) != CUDA_SUCCESS) return ncclUnhandledCudaError;
    if (wait_event(lock, s, &before) != CUDA_SUCCESS) return ncclUnhandledCudaError;
  }
  if (s->context != context && s->context->device != comm->device) {
    breach("rank %d's communicator is of device %d, its stream of device %d", comm->rank, comm->device,
           s->context->device);
    return wrong(ncclInvalidArgument, "stream of another device");
  }
  Work work;
  work.name = calls[0].name;
  for (const Call &call : calls) add_accesses(call, comm, &work.accesses);
  work.run = [=]() -> CUresult { return meet(comm, captured ? REPLAYED : number, *shared); };
  self().later = later;
  if (enqueue(lock, s, std::move(work)) != CUDA_SUCCESS) return wrong(ncclUnhandledCudaError, "cuda failure");
  for (const Call &call : calls) {
    if ((Stream *)call.stream == s) continue;
    Event after;
    after.context = s->context;
    if (record_event(lock, &after, s) != CUDA_SUCCESS) return ncclUnhandledCudaError;
    if (wait_event(lock, (Stream *)call.stream, &after) != CUDA_SUCCESS) return ncclUnhandledCudaError;
  }
  return ncclSuccess;
}

ncclResult_t put(Call call, CUresult later) {
  if (call.comm == nullptr || !living(call.comm)) return wrong(ncclInvalidArgument, "comm does not live");
  Using use(call.comm);
  ncclResult_t result = check(call, version(), &last_error);
  {
    Lock lock(machine().lock);
    Thread &t = self();
    // As the real one does: the comm's device, whatever is current.
    bool pushed = t.current() == nullptr || t.current()->device != call.comm->device;
    if (pushed) t.stack.push_back({machine().primaries[(size_t)call.comm->device], true});
    CUresult error = CUDA_SUCCESS;
    call.stream = stream_of((CUstream)call.stream, &error);
    if (pushed) t.stack.pop_back();
    if (error != CUDA_SUCCESS && result == ncclSuccess) result = wrong(ncclInvalidArgument, "stream does not live");
  }
  Grouped &g = grouped();
  if (result != ncclSuccess) {
    if (g.depth > 0) g.failed = result;
    return result;
  }
  if (g.depth > 0) {
    call.later = later;
    g.calls.push_back(call);
    return ncclSuccess;
  }
  return launch(call.comm, {call}, later);
}

ncclResult_t wait_for_births(const std::vector<Comm *> &births) {
  Lock lock(machine().lock);
  for (Comm *comm : births) {
    Team *team = comm->team;
    bool all = machine().changed.wait_for(lock, std::chrono::seconds(60), [&] { return team->born >= team->size; });
    if (!all) return wrong(ncclSystemError, "not all ranks came to ncclCommInitRank");
  }
  return ncclSuccess;
}

Comm *bear(Team *team, int size, int rank, int device) {
  auto *comm = kept(new Comm);
  comm->team = team;
  comm->rank = rank;
  comm->device = device;
  Lock lock(machine().lock);
  team->size = size;
  team->born++;
  machine().comms++;
  comms().insert(comm);
  machine().changed.notify_all();
  return comm;
}

ncclResult_t bury(const char *name, ncclComm_t handle, bool abort) {
  auto *comm = (Comm *)handle;
  if (!living(comm)) {
    breach("%s of a communicator that does not live", name);
    return ncclInvalidArgument;
  }
  Lock lock(machine().lock);
  if (abort) comm->aborted = true;
  machine().changed.notify_all();
  // What is under way is finished, or given up, first.
  for (Stream *s : comm->streams)
    if (!abort) drain(lock, s);
  machine().changed.wait(lock, [&] { return comm->meeting == 0; });
  comms().erase(comm);
  machine().comms--;
  return ncclSuccess;
}

} // namespace

#define COMM(handle)             \
  auto *comm = (Comm *)(handle); \
  if (comm == nullptr || !living(comm)) return wrong(ncclInvalidArgument, "comm does not live")

extern "C" {

ncclResult_t ncclGetVersion(int *v) {
  BEGIN_NCCL();
  if (v == nullptr) return ncclInvalidArgument;
  *v = version();
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  BEGIN_NCCL();
  if (id == nullptr) return ncclInvalidArgument;
  Lock lock(machine().lock);
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "stand-in %zu", teams().size());
  teams()[id->internal] = new Team;
  return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t code) {
  switch (code) {
  case ncclSuccess: return "no error";
  case ncclUnhandledCudaError: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
  case ncclSystemError: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
  case ncclInternalError: return "internal error - please report this issue to the NCCL developers";
  case ncclInvalidArgument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
  case ncclInvalidUsage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
  case ncclRemoteError: return "remote process exited or there was a network error";
  case ncclInProgress: return "NCCL operation in progress";
  case ncclTimeout: return "operation timed out";
  default: return "unknown result code";
  }
}

const char *ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

ncclResult_t ncclCommInitRank(ncclComm_t *out, int size, ncclUniqueId id, int rank) {
  BEGIN_NCCL();
  Context *current = self().current();
  if (out == nullptr || size < 1 || rank < 0 || rank >= size) return wrong(ncclInvalidArgument, "size or rank");
  Team *team = nullptr;
  {
    Lock lock(machine().lock);
    auto found = teams().find(id.internal);
    if (found != teams().end()) team = found->second;
  }
  if (team == nullptr) return wrong(ncclInvalidArgument, "unique id");
  Comm *comm = bear(team, size, rank, current == nullptr ? 0 : current->device);
  *out = (ncclComm_t)comm;
  if (grouped().depth > 0) return grouped().births.push_back(comm), ncclSuccess;
  return wait_for_births({comm});
}

ncclResult_t ncclCommInitAll(ncclComm_t *out, int count, const int *devices) {
  BEGIN_NCCL();
  if (out == nullptr || count < 1) return wrong(ncclInvalidArgument, "count");
  auto *team = kept(new Team);
  for (int r = 0; r < count; r++) out[r] = (ncclComm_t)bear(team, count, r, devices == nullptr ? r : devices[r]);
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t handle) {
  BEGIN_NCCL();
  COMM(handle);
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  BEGIN_NCCL();
  return bury("ncclCommDestroy", handle, false);
}

ncclResult_t ncclCommAbort(ncclComm_t handle) {
  BEGIN_NCCL();
  return bury("ncclCommAbort", handle, true);
}

ncclResult_t ncclCommCount(ncclComm_t handle, int *count) {
  BEGIN_NCCL();
  COMM(handle);
  *count = comm->team->size;
  return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(ncclComm_t handle, int *device) {
  BEGIN_NCCL();
  COMM(handle);
  *device = comm->device;
  return ncclSuccess;
}

ncclResult_t ncclCommUserRank(ncclComm_t handle, int *rank) {
  BEGIN_NCCL();
  COMM(handle);
  *rank = comm->rank;
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t *error) {
  BEGIN_NCCL();
  COMM(handle);
  Lock lock(machine().lock);
  *error = comm->async;
  return ncclSuccess;
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type, int residence,
                                      ncclComm_t handle) {
  BEGIN_NCCL();
  COMM(handle);
  if (op == nullptr || scalar == nullptr || residence != ncclScalarHostImmediate) return ncclInvalidArgument;
  Lock lock(machine().lock);
  comm->scalars.push_back(scalar_of(type, scalar));
  *op = ncclNumOps + (int)comm->scalars.size() - 1;
  return ncclSuccess;
}

ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t handle) {
  BEGIN_NCCL();
  COMM(handle);
  return op < ncclNumOps ? ncclInvalidArgument : ncclSuccess;
}

// ---- Groups -----------------------------------------------------------------------------------------------

ncclResult_t ncclGroupStart(void) {
  BEGIN_NCCL();
  grouped().depth++;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
  Grouped &g = grouped();
  if (g.depth == 0) {
    breach("ncclGroupEnd without ncclGroupStart");
    return wrong(ncclInvalidUsage, "ncclGroupEnd: not in a group call");
  }
  // Whatever goes wrong, the group is over.
  ncclResult_t result = begin_nccl(__func__, nullptr);
  if (--g.depth > 0) return result;
  std::vector<Call> calls;
  std::vector<Comm *> births;
  calls.swap(g.calls);
  births.swap(g.births);
  if (result == ncclSuccess) result = g.failed;
  g.failed = ncclSuccess;
  if (result != ncclSuccess) return result;
  result = wait_for_births(births);
  while (!calls.empty() && result == ncclSuccess) {
    Comm *comm = calls[0].comm;
    std::vector<Call> own, rest;
    for (Call &call : calls) (call.comm == comm ? own : rest).push_back(call);
    calls.swap(rest);
    Using use(comm);
    CUresult later = CUDA_SUCCESS;
    for (Call &call : own)
      if (call.later != CUDA_SUCCESS) later = call.later;
    result = launch(comm, own, later);
  }
  return result;
}

// ---- Collectives ------------------------------------------------------------------------------------------

#define PUT(...)                                                                \
  CUresult later = CUDA_SUCCESS;                                                \
  ncclResult_t begun = begin_nccl(__func__, &later);                            \
  if (begun != ncclSuccess) {                                                   \
    if (grouped().depth > 0) grouped().failed = begun;                          \
    return wrong(begun, "ordered error");                                       \
  }                                                                             \
  return put(Call{__func__, __VA_ARGS__, (void *)stream, (Comm *)comm}, later)

ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, ncclStream_t stream) {
  PUT(Kind::ReduceScatter, send, recv, count, type, op, 0);
}

ncclResult_t ncclReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, ncclStream_t stream) {
  PUT(Kind::Reduce, send, recv, count, type, op, root);
}

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, ncclStream_t stream) {
  PUT(Kind::AllReduce, send, recv, count, type, op, 0);
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           ncclStream_t stream) {
  PUT(Kind::AllGather, send, recv, count, type, ncclSum, 0);
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           ncclStream_t stream) {
  PUT(Kind::Broadcast, send, recv, count, type, ncclSum, root);
}

ncclResult_t ncclAlltoAll(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                          ncclStream_t stream) {
  PUT(Kind::AlltoAll, send, recv, count, type, ncclSum, 0);
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      ncclStream_t stream) {
  PUT(Kind::Send, send, nullptr, count, type, ncclSum, peer);
}

ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, ncclStream_t stream) {
  PUT(Kind::Recv, nullptr, recv, count, type, ncclSum, peer);
}

void fake_nccl_async_error(ncclComm_t handle, ncclResult_t code) {
  Lock lock(machine().lock);
  if (comms().count((Comm *)handle) != 0) ((Comm *)handle)->async = code;
}

} // extern "C"
