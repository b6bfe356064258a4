// How the ranks of NCCL's stand-in meet: what a call is, how calls of ranks are compared, and the carrying out
// on the threads of their streams.
#ifndef RSB_FAKES_NCCL_MEET_H
#define RSB_FAKES_NCCL_MEET_H

#include <atomic>

#include "machine.h"

namespace fake {

enum class Kind { ReduceScatter, Reduce, AllReduce, AllGather, Broadcast, AlltoAll, Send, Recv };

struct Comm;

struct Call {
  const char *name;
  Kind kind;
  const void *send;
  void *recv;
  size_t count;
  int type;
  int op;
  int peer; // or root
  void *stream;
  Comm *comm;
  CUresult later = CUDA_SUCCESS; // an ordered error
};

// One launch of all ranks.
struct Meeting {
  std::map<int, const std::vector<Call> *> come; // by rank
  int computed = 0, left = 0;
};

struct Team {
  int size = 0, born = 0;
  bool failed = false;
  std::map<uint64_t, std::string> scripts; // what the first rank to come calls in a launch
  std::map<uint64_t, int> read;
  std::map<uint64_t, Meeting> meetings;
};

struct Comm {
  Team *team = nullptr;
  int rank = 0, device = 0;
  bool aborted = false;
  ncclResult_t async = ncclSuccess;
  uint64_t launches = 0, replays = 0;
  int meeting = 0;
  std::set<Stream *> streams;
  std::atomic<int> users{0};
  std::vector<double> scalars; // of PreMulSum
};

std::set<Comm *> &comms();
size_t type_size(int type);
double scalar_of(int type, const void *scalar);
// What NCCL refuses at once.
ncclResult_t check(const Call &call, int version, std::string *why);
// Whether this launch of a rank is what the others launch; the machine is locked.
bool agree(Comm *comm, uint64_t number, const std::vector<Call> &calls);
void add_accesses(const Call &call, const Comm *comm, std::vector<Access> *accesses);
// The number of a launch that a graph repeats: they are counted as they run.
const uint64_t REPLAYED = UINT64_MAX;
// Carries out a launch; returns when its buffers are not used any more.
CUresult meet(Comm *comm, uint64_t number, const std::vector<Call> &calls);

} // namespace fake

#endif
