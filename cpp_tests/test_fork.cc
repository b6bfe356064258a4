// Children of a fork: what their parent made is dead in them, and they can begin anew, whatever other
// threads of the parent were doing at that moment.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "harness.h"
#include "values.h"
#include "worker.h"

using namespace harness;

namespace {

/// AddressSanitizer's own locks may be taken when another thread forks; then its child hangs in malloc.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kChildrenMayHang = true;
#else
constexpr bool kChildrenMayHang = false;
#endif

/// Runs `fn` in a forked child, which must end with 0; a child that hangs dies of its alarm.
template <typename Fn>
::testing::AssertionResult child(const Fn &fn) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(30);
    _exit(fn());
  }
  if (pid < 0) {
    return ::testing::AssertionFailure() << "fork: " << std::strerror(errno);
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFSIGNALED(status)) {
    return ::testing::AssertionFailure() << "the child died of signal " << WTERMSIG(status);
  }
  return WEXITSTATUS(status) == 0 ? ::testing::AssertionSuccess()
                                  : ::testing::AssertionFailure() << "the child failed at step " << WEXITSTATUS(status);
}

/// Keeps a counted reference to the result.
void keep(void *user_data, const rsb_result *result) {
  *static_cast<rsb_shard **>(user_data) = rsb_shard_retain(result->shard);
}

/// One reduce-scatter of a comm of one rank, whose result is the input.
bool echoes(rsb_comm *comm, uint64_t seed) {
  float input[50];
  for (size_t i = 0; i < 50; ++i) {
    input[i] = static_cast<float>(values::hash(seed, i) % 1000);
  }
  const void *inputs[] = {input};
  struct Seen {
    const float *input;
    bool right;
  } seen = {input, false};
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.inputs = inputs;
  args.numel = 50;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  args.user_data = &seen;
  args.callback = [](void *user_data, const rsb_result *result) {
    auto *s = static_cast<Seen *>(user_data);
    s->right = result->status == RSB_OK && std::memcmp(result->data, s->input, 50 * sizeof(float)) == 0;
  };
  rsb_config config = RSB_CONFIG_INIT;
  rsb_bucketer *bucketer = nullptr;
  return rsb_bucketer_create(&config, &bucketer, nullptr) == RSB_OK &&
         rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr) == RSB_OK &&
         rsb_bucketer_flush(bucketer, nullptr) == RSB_OK && rsb_bucketer_free(bucketer) == RSB_OK && seen.right;
}

void quiet(void *, int32_t, const char *, const char *) {}

/// Makes comms of a thread and of a process, uses them and frees them. The step that failed; 0: none.
int begin_anew(uint64_t seed) {
  rsb_comm *comm = nullptr;
  if (rsb_comm_create_local(1, nullptr, &comm, nullptr) != RSB_OK) return 1;
  if (!echoes(comm, seed)) return 2;
  rsb_comm_free(comm);
  if (rsb_set_logger(quiet, nullptr, nullptr, RSB_LOG_DEBUG) != RSB_OK) return 3;
  if (rsb_comm_create_shm("alone", 0, 1, nullptr, &comm, nullptr) != RSB_OK) return 4;
  if (!echoes(comm, seed + 1)) return 5;
  rsb_comm_free(comm);
  return 0;
}

/// First of all here: in a process that has not used the library, threads' first calls go on while it forks.
TEST(Fork, AChildBeginsAnewWhileItsParentBegins) {
  if (kChildrenMayHang) {
    GTEST_SKIP() << "skipped: a fork beside other threads is not safe under AddressSanitizer";
  }
  for (uint64_t n = 0; n < 50; ++n) {
    ASSERT_TRUE(child([&] {
      std::atomic<uint32_t> begun{0};
      std::vector<std::thread> threads;
      for (uint64_t t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
          begun += 1;
          begin_anew(t);
        });
      }
      while (begun < 1 + n % 3) {
        std::this_thread::yield();
      }
      const auto began = child([&] { return begin_anew(n); });
      for (std::thread &thread : threads) {
        thread.join();
      }
      return began ? 0 : 1;
    })) << n;
  }
}

TEST(Fork, HandlesOfTheParentAreDeadInTheChild) {
  rsb_comm *comm = nullptr;
  const rsb_comm_config config = comm_config();
  ASSERT_RSB_OK(rsb_comm_create_local(1, &config, &comm, nullptr));
  rsb_shard *shard = nullptr;
  {
    Worker worker(comm, 0);
    worker.submit(Op::f32(4));
    Bucketer other(0);
    const float input[] = {3, 1, 4, 1, 5};
    const void *inputs[] = {input};
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs;
    args.numel = 5;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    args.callback = keep;
    args.user_data = &shard;
    ASSERT_RSB_OK(rsb_bucketer_submit(other, comm, &args, nullptr, nullptr));
    ASSERT_RSB_OK(rsb_bucketer_flush(other, nullptr));
    ASSERT_NE(shard, nullptr);
    EXPECT_TRUE(child([&] {
      rsb_error error;
      if (rsb_comm_status(comm, &error) != RSB_ERR_ABORTED) return 1;
      if (rsb_bucketer_flush(worker, &error) != RSB_ERR_ABORTED) return 2;
      if (rsb_comm_all_gather(comm, nullptr, nullptr, 0, &error) != RSB_ERR_ABORTED) return 3;
      if (rsb_bucketer_free(worker) != RSB_ERR_ABORTED) return 4;
      if (rsb_shard_retain(shard) != nullptr) return 5;
      rsb_shard_release(shard);
      rsb_comm_free(comm);
      return begin_anew(7) == 0 ? 0 : 6;
    }));
    worker.finish();
    EXPECT_EQ(rsb_shard_retain(shard), shard) << "the child's release has changed nothing here";
    rsb_shard_release(shard);
    rsb_shard_release(shard);
  }
  rsb_comm_free(comm);
}

TEST(Fork, ACallWhoseCallbackForksEndsInTheChild) {
  struct Seen {
    rsb_comm *comm;
    bool frees;
    pid_t child;
  };
  const auto split = [](void *user_data, const rsb_result *) {
    auto *seen = static_cast<Seen *>(user_data);
    if (seen->frees) {
      rsb_comm_free(seen->comm);
    }
    seen->child = fork();
  };
  for (const bool direct : {true, false}) {
    for (const bool frees : {true, false}) {
      Seen seen = {nullptr, frees, -1};
      Error error;
      ASSERT_RSB_OK(rsb_comm_create_local(1, nullptr, &seen.comm, error));
      rsb_config config = RSB_CONFIG_INIT;
      config.bucket_bytes = direct ? -1 : 0;
      rsb_bucketer *bucketer = nullptr;
      ASSERT_RSB_OK(rsb_bucketer_create(&config, &bucketer, error));
      const float input[] = {1, 2, 3};
      const void *inputs[] = {input};
      rsb_status status = rsb_bucketer_reduce_scatter_async(bucketer, seen.comm, inputs, 3, RSB_DTYPE_F32, RSB_OP_SUM,
                                                            split, &seen, error);
      if (!direct) {
        ASSERT_EQ(status, RSB_OK) << error.message();
        status = rsb_bucketer_flush(bucketer, error);
      }
      if (seen.child == 0) {
        _exit(status == RSB_ERR_ABORTED ? begin_anew(7) : 90);
      }
      int ended = -1;
      EXPECT_EQ(waitpid(seen.child, &ended, 0), seen.child);
      EXPECT_EQ(ended, 0) << "direct " << direct << ", frees " << frees;
      EXPECT_EQ(status, RSB_OK) << error.message();
      EXPECT_EQ(rsb_bucketer_free(bucketer), RSB_OK);
      rsb_comm_free(seen.comm);
    }
  }
}

TEST(Fork, AChildBeginsAnewWhateverOtherThreadsDo) {
  if (kChildrenMayHang) {
    GTEST_SKIP() << "skipped: a fork beside other threads is not safe under AddressSanitizer";
  }
  std::atomic<bool> over{false};
  std::atomic<uint32_t> failed{0};
  const auto check = [&](bool right) { failed += right ? 0 : 1; };
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t round = 0; !over; ++round) {
        rsb_comm *comm = nullptr;
        check(rsb_comm_create_local(1, nullptr, &comm, nullptr) == RSB_OK);
        check(echoes(comm, t << 32 | round));
        rsb_comm_free(comm);
      }
    });
    // What takes a moment only, all the time; and many at once, so that tables grow.
    threads.emplace_back([&] {
      for (uint64_t round = 0; !over; ++round) {
        std::vector<rsb_bucketer *> bucketers(1 + round % 200, nullptr);
        for (rsb_bucketer *&bucketer : bucketers) {
          check(rsb_bucketer_create(nullptr, &bucketer, nullptr) == RSB_OK);
          check(rsb_set_logger(quiet, nullptr, nullptr, RSB_LOG_DEBUG) == RSB_OK);
        }
        for (rsb_bucketer *bucketer : bucketers) {
          check(rsb_bucketer_free(bucketer) == RSB_OK);
        }
      }
    });
  }
  for (uint64_t n = 0; n < 200; ++n) {
    const ::testing::AssertionResult began = child([&] { return begin_anew(n << 48); });
    EXPECT_TRUE(began) << "child " << n;
    if (!began) {
      break;
    }
  }
  over = true;
  for (std::thread &thread : threads) {
    thread.join();
  }
  EXPECT_EQ(failed, 0u);
  rsb_set_logger(nullptr, nullptr, nullptr, 0);
}

}  // namespace
