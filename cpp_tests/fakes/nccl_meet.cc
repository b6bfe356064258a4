// The ranks' launches carried out. Sums come in a ring's order, in the wire's type, averages of floats are inputs
// times a rounded 1/n, and the least and greatest pass NaNs over: what the real one does, and what an exact library
// must not rely on.
#include "nccl_meet.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "../values.h"

namespace fake {
namespace {

bool mismatch_allowed = false;

uint64_t hang_ms() {
  const char *text = getenv("RSB_FAKE_NCCL_HANG_MS");
  return text == nullptr || *text == 0 ? 20000 : strtoull(text, nullptr, 0);
}

const struct {
  rsb_dtype dtype;
  size_t size;
} TYPES[] = {{RSB_DTYPE_I8, 1},  {RSB_DTYPE_U8, 1},  {RSB_DTYPE_I32, 4}, {0, 4},            {RSB_DTYPE_I64, 8},
             {0, 8},             {RSB_DTYPE_F16, 2}, {RSB_DTYPE_F32, 4}, {RSB_DTYPE_F64, 8}, {RSB_DTYPE_BF16, 2}};

using Bytes = std::vector<char>;

template <class T> T combined(int op, T a, T b) {
  switch (op) {
  case ncclProd: return (T)(a * b);
  case ncclMin: return a != a || b < a ? b : a;
  case ncclMax: return a != a || b > a ? b : a;
  default: return (T)(a + b);
  }
}

// Integers wrap, as unsigned numbers of their size do.
template <class T, class U> void integers(int op, char *into, const char *from, size_t count) {
  for (size_t i = 0; i < count; i++) {
    T a, b;
    memcpy(&a, into + i * sizeof a, sizeof a);
    memcpy(&b, from + i * sizeof b, sizeof b);
    T c = op == ncclProd ? (T)((U)a * (U)b) : op == ncclMin || op == ncclMax ? combined(op, a, b) : (T)((U)a + (U)b);
    memcpy(into + i * sizeof c, &c, sizeof c);
  }
}

template <class T> void floats(int op, char *into, const char *from, size_t count) {
  for (size_t i = 0; i < count; i++) {
    T a, b;
    memcpy(&a, into + i * sizeof a, sizeof a);
    memcpy(&b, from + i * sizeof b, sizeof b);
    T c = combined(op, a, b);
    memcpy(into + i * sizeof c, &c, sizeof c);
  }
}

double loaded(int type, const char *at) { return values::load(TYPES[type].dtype, (const unsigned char *)at); }
void stored(int type, double x, char *at) { values::store(TYPES[type].dtype, x, (unsigned char *)at); }

void combine(int type, int op, char *into, const char *from, size_t count) {
  switch (type) {
  case ncclInt8: return integers<int8_t, uint32_t>(op, into, from, count);
  case ncclUint8: return integers<uint8_t, uint32_t>(op, into, from, count);
  case ncclInt32: return integers<int32_t, uint32_t>(op, into, from, count);
  case ncclInt64: return integers<int64_t, uint64_t>(op, into, from, count);
  case ncclFloat32: return floats<float>(op, into, from, count);
  case ncclFloat64: return floats<double>(op, into, from, count);
  default:
    for (size_t i = 0; i < count; i++) {
      char *at = into + i * 2;
      stored(type, combined(op, loaded(type, at), loaded(type, from + i * 2)), at);
    }
  }
}

void scaled(int type, double by, char *at, size_t count) {
  for (size_t i = 0; i < count; i++, at += type_size(type)) stored(type, loaded(type, at) * by, at);
}

// The combination of what all ranks send from element `from` on, beginning behind rank `last`.
Bytes reduced(const std::vector<const Call *> &ranks, size_t from, int last) {
  const Call &call = *ranks[0];
  size_t size = type_size(call.type), n = ranks.size();
  double by = 1.0;
  bool is_float = call.type >= ncclFloat16;
  if (call.op == ncclAvg && is_float) {
    // 1/n rounded to the wire's type: too large or too small by up to 0.4 % in bf16.
    char rounded[8];
    stored(call.type, 1.0 / (double)n, rounded);
    by = loaded(call.type, rounded);
  } else if (call.op >= ncclNumOps) {
    by = call.comm->scalars[(size_t)(call.op - ncclNumOps)];
  }
  Bytes sum;
  for (size_t k = 0; k < n; k++) {
    const Call &own = *ranks[((size_t)last + 1 + k) % n];
    const char *at = (const char *)reach((uint64_t)own.send) + from * size;
    Bytes next(at, at + call.count * size);
    if (by != 1.0) scaled(call.type, by, next.data(), call.count);
    if (k == 0) sum = next;
    else combine(call.type, call.op, sum.data(), next.data(), call.count);
  }
  return sum;
}

// The calls of all ranks that belong to call `index` of this one. Of point-to-point calls: those between the two.
std::vector<const Call *> partners(const Meeting &meeting, int size, size_t index) {
  std::vector<const Call *> all;
  for (int r = 0; r < size; r++) all.push_back(&(*meeting.come.at(r))[index]);
  return all;
}

// The send that belongs to this receive: as many from that rank to us come before it as receives from it do.
const Call *counterpart(const Meeting &meeting, const std::vector<Call> &calls, const Call &recv, int rank) {
  size_t before = 0;
  for (const Call &call : calls) {
    if (&call == &recv) break;
    if (call.kind == Kind::Recv && call.peer == recv.peer) before++;
  }
  for (const Call &call : *meeting.come.at(recv.peer))
    if (call.kind == Kind::Send && call.peer == rank && before-- == 0) return &call;
  return nullptr;
}

// What this rank receives by its call `index`.
Bytes received(const Meeting &meeting, const Comm *comm, const std::vector<Call> &calls, size_t index) {
  const Call &call = calls[index];
  size_t bytes = call.count * type_size(call.type);
  int size = comm->team->size, rank = comm->rank;
  auto from = [&](const Call &other, size_t at) {
    const char *begin = (const char *)reach((uint64_t)other.send) + at;
    return Bytes(begin, begin + bytes);
  };
  if (call.kind == Kind::Send) return {};
  if (call.kind == Kind::Recv) {
    const Call *send = counterpart(meeting, calls, call, rank);
    if (send == nullptr || send->count * type_size(send->type) != bytes) {
      if (!mismatch_allowed)
        breach("rank %d receives %zu bytes from rank %d, which does not send them", rank, bytes, call.peer);
      return {};
    }
    return from(*send, 0);
  }
  auto ranks = partners(meeting, size, index);
  switch (call.kind) {
  case Kind::ReduceScatter: return reduced(ranks, (size_t)rank * call.count, rank);
  case Kind::AllReduce: return reduced(ranks, 0, 0);
  case Kind::Reduce: return rank == call.peer ? reduced(ranks, 0, call.peer) : Bytes();
  case Kind::Broadcast: return from(*ranks[(size_t)call.peer], 0);
  default: {
    Bytes all;
    for (int r = 0; r < size; r++) {
      Bytes part = from(*ranks[(size_t)r], call.kind == Kind::AlltoAll ? (size_t)rank * bytes : 0);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
  }
}

std::string script_of(const std::vector<Call> &calls) {
  std::string script;
  for (const Call &call : calls) {
    if (call.kind == Kind::Send || call.kind == Kind::Recv) continue;
    int op = call.op < ncclNumOps ? call.op : ncclNumOps;
    script += std::string(call.name) + "(count " + std::to_string(call.count) + ", type " + std::to_string(call.type) +
              ", op " + std::to_string(op) + ", root " + std::to_string(call.peer) + ") ";
  }
  return script;
}

} // namespace

std::set<Comm *> &comms() {
  static auto *all = new std::set<Comm *>;
  return *all;
}

size_t type_size(int type) { return TYPES[type].size; }

double scalar_of(int type, const void *scalar) { return loaded(type, (const char *)scalar); }

ncclResult_t check(const Call &call, int version, std::string *why) {
  *why = std::string(call.name) + ": ";
  bool p2p = call.kind == Kind::Send || call.kind == Kind::Recv;
  if (call.type < ncclInt8 || call.type > ncclBfloat16 || TYPES[call.type].dtype == 0)
    return *why += "type", ncclInvalidArgument;
  if (call.type == ncclBfloat16 && version < 21000) return *why += "bfloat16 needs NCCL 2.10", ncclInvalidArgument;
  if (call.op < 0 || (call.op >= ncclNumOps && (size_t)(call.op - ncclNumOps) >= call.comm->scalars.size()) ||
      (call.op == ncclAvg && version < 21000))
    return *why += "op", ncclInvalidArgument;
  if (call.peer < 0 || call.peer >= call.comm->team->size) return *why += "root or peer", ncclInvalidArgument;
  if (call.count > 0 && ((call.send == nullptr && call.kind != Kind::Recv && call.kind != Kind::Broadcast) ||
                         (call.recv == nullptr && !p2p && call.kind != Kind::Reduce)))
    return *why += "a buffer is NULL", ncclInvalidArgument;
  if (call.kind == Kind::AlltoAll && version < 22803) {
    breach("ncclAlltoAll of NCCL %d", version);
    return *why += "unknown", ncclInvalidUsage;
  }
  return ncclSuccess;
}

bool agree(Comm *comm, uint64_t number, const std::vector<Call> &calls) {
  Team *team = comm->team;
  std::string script = script_of(calls);
  auto first = team->scripts.emplace(number, script).first;
  bool same = first->second == script;
  if (!same) {
    if (!mismatch_allowed)
      breach("ranks differ in launch %lu: rank %d calls %s, the first one %s", (unsigned long)number, comm->rank,
             script.c_str(), first->second.c_str());
    team->failed = true;
    machine().changed.notify_all();
  } else if (++team->read[number] == team->size) {
    team->scripts.erase(first);
    team->read.erase(number);
  }
  return same;
}

void add_accesses(const Call &call, const Comm *comm, std::vector<Access> *accesses) {
  uint64_t bytes = call.count * type_size(call.type), n = (uint64_t)comm->team->size;
  bool root = comm->rank == call.peer;
  uint64_t sends = 0, receives = 0;
  switch (call.kind) {
  case Kind::ReduceScatter: sends = n, receives = 1; break;
  case Kind::Reduce: sends = 1, receives = root; break;
  case Kind::AllReduce: sends = receives = 1; break;
  case Kind::AllGather: sends = 1, receives = n; break;
  case Kind::Broadcast: sends = root, receives = 1; break;
  case Kind::AlltoAll: sends = receives = n; break;
  case Kind::Send: sends = 1; break;
  case Kind::Recv: receives = 1; break;
  }
  // The real one moves whole elements.
  uint64_t at = (sends > 0 ? (uint64_t)call.send : 0) | (receives > 0 ? (uint64_t)call.recv : 0);
  if (bytes > 0 && at % type_size(call.type) != 0)
    breach("%s: memory of rank %d is not aligned to elements of %zu bytes", call.name, comm->rank,
           (size_t)type_size(call.type));
  if (sends > 0) accesses->push_back({(uint64_t)call.send, sends * bytes, false});
  if (receives > 0) accesses->push_back({(uint64_t)call.recv, receives * bytes, true});
}

CUresult meet(Comm *comm, uint64_t number, const std::vector<Call> &calls) {
  Machine &m = machine();
  Team *team = comm->team;
  Lock lock(m.lock);
  if (number == REPLAYED) number = (1ull << 63) + comm->replays++;
  comm->meeting++;
  Meeting &meeting = team->meetings[number];
  meeting.come[comm->rank] = &calls;
  m.changed.notify_all();
  auto over = [&] { return comm->aborted || team->failed; };
  auto together = [&](auto condition) {
    auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(hang_ms());
    if (!m.changed.wait_until(lock, until, [&] { return condition() || over(); })) {
      std::string missing;
      for (int r = 0; r < team->size; r++)
        if (meeting.come.count(r) == 0) missing += " " + std::to_string(r);
      if (!mismatch_allowed)
        breach("rank %d hangs in launch %lu, %s: ranks that never came:%s", comm->rank, (unsigned long)number,
               calls[0].name, missing.c_str());
      team->failed = true;
      m.changed.notify_all();
    }
    return !over();
  };
  bool went_well = together([&] { return (int)meeting.come.size() == team->size; });
  if (went_well) {
    lock.unlock();
    std::vector<Bytes> results;
    for (size_t i = 0; i < calls.size(); i++) results.push_back(received(meeting, comm, calls, i));
    lock.lock();
    meeting.computed++;
    m.changed.notify_all();
    went_well = together([&] { return meeting.computed == team->size; });
    if (went_well) {
      lock.unlock();
      for (size_t i = 0; i < calls.size(); i++)
        if (!results[i].empty()) memcpy(reach((uint64_t)calls[i].recv), results[i].data(), results[i].size());
      lock.lock();
    }
  }
  if (!went_well && team->failed && comm->async == ncclSuccess) comm->async = ncclRemoteError;
  // A meeting that failed is kept: its ranks leave it at different times.
  if (went_well && ++meeting.left == team->size) team->meetings.erase(number);
  comm->meeting--;
  m.changed.notify_all();
  return CUDA_SUCCESS;
}

} // namespace fake

extern "C" void fake_nccl_allow_mismatch(int on) {
  fake::Lock lock(fake::machine().lock);
  fake::mismatch_allowed = on != 0;
}
