// The engine: the last rank to start a request carries it out for all, while all their requests are open.
#include "fake_engine.h"

#include <cstdio>
#include <cstring>

namespace harness {
namespace {

const char *kind_text(uint32_t kind) {
  return kind == RSB_COLL_REDUCE_SCATTER ? "REDUCE_SCATTER"
         : kind == RSB_COLL_ALL_TO_ALL   ? "ALL_TO_ALL"
                                         : "ALL_GATHER";
}

}  // namespace

FakeEngine::FakeEngine(uint32_t size, const Options &options)
    : size_(size), options_(options), endpoints_(size) {
  for (uint32_t rank = 0; rank < size; ++rank) {
    endpoints_[rank].engine = this;
    endpoints_[rank].rank = rank;
  }
}

rsb_transport FakeEngine::transport(uint32_t rank) {
  rsb_transport transport = {};
  transport.struct_size = sizeof transport;
  transport.flags = options_.flags;
  transport.ctx = &endpoints_[rank];
  transport.start = &FakeEngine::start;
  transport.test = &FakeEngine::test;
  transport.abort = options_.with_abort ? &FakeEngine::abort : nullptr;
  transport.release = &FakeEngine::release;
  transport.reduce_dtypes = options_.reduce_dtypes;
  transport.max_count = options_.max_count;
  transport.describe = options_.with_describe ? &FakeEngine::describe : nullptr;
  return transport;
}

std::vector<std::string> FakeEngine::breaches() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return breaches_;
}

std::vector<FakeEngine::Request> FakeEngine::requests() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Request> all;
  for (const Slot &slot : slots_) {
    all.push_back(slot.what);
  }
  return all;
}

uint32_t FakeEngine::releases(uint32_t rank) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return endpoints_[rank].releases;
}

uint32_t FakeEngine::aborts(uint32_t rank) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return endpoints_[rank].aborts;
}

void FakeEngine::fail_from_now() {
  const std::lock_guard<std::mutex> lock(mutex_);
  failing_ = true;
}

void FakeEngine::breach(const Endpoint &endpoint, const std::string &text) {
  breaches_.push_back("rank " + std::to_string(endpoint.rank) + ": " + text);
}

/// The scope of one call of the library: holds the lock, and notes a second call at the same time.
class FakeEngine::Call {
 public:
  explicit Call(Endpoint &endpoint)
      : endpoint_(endpoint), alone_(!endpoint.inside.exchange(true)), lock_(endpoint.engine->mutex_) {
    if (!alone_) {
      endpoint.engine->breach(endpoint, "two calls at the same time");
    }
    if (endpoint.releases != 0) {
      endpoint.engine->breach(endpoint, "a call after release");
    }
  }
  ~Call() { endpoint_.inside.store(false); }
  Call(const Call &) = delete;
  Call &operator=(const Call &) = delete;

 private:
  Endpoint &endpoint_;
  const bool alone_;
  const std::lock_guard<std::mutex> lock_;
};

int32_t FakeEngine::start(void *ctx, const rsb_coll *coll, void **request) {
  auto &endpoint = *static_cast<Endpoint *>(ctx);
  const Call call(endpoint);
  return endpoint.engine->do_start(endpoint, *coll, request);
}

int32_t FakeEngine::test(void *ctx, void *request, int32_t *done) {
  auto &endpoint = *static_cast<Endpoint *>(ctx);
  const Call call(endpoint);
  return endpoint.engine->do_test(endpoint, request, done);
}

void FakeEngine::abort(void *ctx) {
  auto &endpoint = *static_cast<Endpoint *>(ctx);
  const std::lock_guard<std::mutex> lock(endpoint.engine->mutex_);
  endpoint.aborted = true;
  endpoint.aborts += 1;
}

void FakeEngine::release(void *ctx) {
  auto &endpoint = *static_cast<Endpoint *>(ctx);
  const Call call(endpoint);
  endpoint.releases += 1;
  for (const auto &open : endpoint.open) {
    endpoint.engine->slots_[open.second->number].dead = true;  // its memory is the library's again
  }
  endpoint.open.clear();
}

void FakeEngine::describe(void *, int32_t code, char *text, size_t size) {
  std::snprintf(text, size, "the fake engine failed with %d", code);
}

void FakeEngine::check(const Endpoint &endpoint, const rsb_coll &coll) {
  const bool reduce = coll.kind == RSB_COLL_REDUCE_SCATTER;
  const uint64_t needed = reduce                                ? RSB_TRANSPORT_REDUCE_SCATTER
                          : coll.kind == RSB_COLL_ALL_TO_ALL ? RSB_TRANSPORT_ALL_TO_ALL
                                                             : RSB_TRANSPORT_ALL_GATHER;
  if ((options_.flags & needed) == 0) {
    breach(endpoint, std::string("cannot do ") + kind_text(coll.kind));
  }
  if (coll.struct_size < sizeof(rsb_coll)) {
    breach(endpoint, "rsb_coll is too small");
  }
  if (values::size_of(coll.dtype) == 0) {
    breach(endpoint, "unknown dtype " + std::to_string(coll.dtype));
  }
  if (reduce && coll.op != RSB_OP_SUM && coll.op != RSB_OP_MIN && coll.op != RSB_OP_MAX &&
      coll.op != RSB_OP_PROD) {
    breach(endpoint, "op " + std::to_string(coll.op));
  }
  if (reduce && options_.reduce_dtypes != 0 && (options_.reduce_dtypes >> coll.dtype & 1) == 0) {
    breach(endpoint, "REDUCE_SCATTER does not take " + values::dtype_name(coll.dtype));
  }
  if (options_.max_count != 0 && coll.count > options_.max_count) {
    breach(endpoint, "count " + std::to_string(coll.count) + " is above max_count");
  }
  if (endpoint.open.size() >= 4) {
    breach(endpoint, "more than 4 open requests");
  }
}

int32_t FakeEngine::do_start(Endpoint &endpoint, const rsb_coll &coll, void **request) {
  check(endpoint, coll);
  if (endpoint.aborted) {
    return options_.code;
  }
  const uint64_t number = endpoint.started++;
  if (failing_ || number == options_.fail_start_at) {
    return options_.code;
  }
  while (slots_.size() <= number) {
    slots_.emplace_back();
    slots_.back().parts.resize(size_);
  }
  Slot &slot = slots_[number];
  if (slot.dead) {
    return options_.code;
  }
  if (slot.arrived == 0) {
    slot.what = {coll.kind, coll.dtype, coll.op, coll.count, nullptr};
  } else if (slot.what.kind != coll.kind || slot.what.dtype != coll.dtype || slot.what.count != coll.count ||
             (coll.kind == RSB_COLL_REDUCE_SCATTER && slot.what.op != coll.op)) {
    breach(endpoint, std::string("another collective than its peers: ") + kind_text(coll.kind));
    return options_.code;
  }
  if (endpoint.rank == 0) {
    slot.what.send = coll.send;
  }
  slot.parts[endpoint.rank] = {static_cast<const unsigned char *>(coll.send),
                               static_cast<unsigned char *>(coll.recv), true};
  slot.arrived += 1;
  if (slot.arrived == size_) {
    execute(slot);
  }
  auto open = std::make_unique<Open>(Open{&endpoint, number, 0});
  *request = open.get();
  endpoint.open.emplace(open.get(), std::move(open));
  return 0;
}

int32_t FakeEngine::do_test(Endpoint &endpoint, void *request, int32_t *done) {
  const auto found = endpoint.open.find(request);
  if (found == endpoint.open.end()) {
    breach(endpoint, "test of a request that is not open");
    return options_.code;
  }
  if (endpoint.aborted) {
    breach(endpoint, "test after abort");
  }
  Open &open = *found->second;
  open.tests += 1;
  Slot &slot = slots_[open.number];
  if (failing_ || slot.dead || open.number == options_.fail_test_at) {
    slot.dead = true;
    endpoint.open.erase(found);
    return options_.code;
  }
  *done = ready(endpoint, open) ? 1 : 0;
  if (*done != 0) {
    endpoint.open.erase(found);
  }
  return 0;
}

bool FakeEngine::ready(const Endpoint &endpoint, Open &open) {
  if (!slots_[open.number].done) {
    open.tests = 0;
    return false;
  }
  switch (options_.order) {
    case Order::kAtOnce:
      return true;
    case Order::kDelayed:
      return open.tests > values::hash(open.number, endpoint.rank) % 24;
    default:
      break;
  }
  // Newest first, but a request that is asked for again and again does end.
  for (const auto &other : endpoint.open) {
    if (other.second->number > open.number && slots_[other.second->number].done) {
      return open.tests > 64;
    }
  }
  return open.tests > 1;
}

void FakeEngine::execute(Slot &slot) const {
  const size_t width = values::size_of(slot.what.dtype);
  const size_t bytes = slot.what.count * width;
  std::vector<values::Bytes> results(size_);
  for (uint32_t rank = 0; rank < size_; ++rank) {
    values::Bytes &result = results[rank];
    if (bytes == 0) {
      continue;
    }
    if (slot.what.kind == RSB_COLL_REDUCE_SCATTER) {
      result.resize(bytes);
      values::Reduction reduction;
      reduction.dtype = slot.what.dtype;
      reduction.op = slot.what.op;
      std::vector<const unsigned char *> inputs(size_);
      for (size_t i = 0; i < slot.what.count; ++i) {
        for (uint32_t from = 0; from < size_; ++from) {
          inputs[from] = slot.parts[from].send + rank * bytes + i * width;
        }
        values::reduce(reduction, inputs, nullptr, result.data() + i * width);
      }
    } else {
      const size_t begin = slot.what.kind == RSB_COLL_ALL_TO_ALL ? rank * bytes : 0;
      for (const Part &part : slot.parts) {
        result.insert(result.end(), part.send + begin, part.send + begin + bytes);
      }
    }
  }
  for (uint32_t rank = 0; rank < size_; ++rank) {
    if (!results[rank].empty()) {
      std::memcpy(slot.parts[rank].recv, results[rank].data(), results[rank].size());
    }
  }
  slot.done = true;
}

void run_custom(FakeEngine &engine, uint32_t size, uint64_t comm_flags, const EngineFn &fn,
                uint64_t timeout_ns) {
  std::vector<rsb_comm *> comms(size, nullptr);
  rsb_comm_config config = comm_config(timeout_ns);
  config.flags = comm_flags;
  for (uint32_t rank = 0; rank < size; ++rank) {
    const rsb_transport transport = engine.transport(rank);
    Error error;
    const rsb_status status =
        rsb_comm_create_custom(&transport, rank, size, &config, &comms[rank], error);
    ASSERT_TRUE(answers(RSB_OK, status, error));
  }
  run_threads(
      size, [&](uint32_t rank) { fn(rank, comms[rank]); },
      [&](uint32_t) { engine.fail_from_now(); });
  for (uint32_t rank = 0; rank < size; ++rank) {
    rsb_comm_free(comms[rank]);
    EXPECT_EQ(engine.releases(rank), 1u) << "rank " << rank;
  }
  for (const std::string &breach : engine.breaches()) {
    ADD_FAILURE() << breach;
  }
}

}  // namespace harness
