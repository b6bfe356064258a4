// What a small op costs when nothing is new: no allocation and no system call, callbacks included.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <rsbucket.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <vector>

namespace {
std::atomic<bool> counting{false};
std::atomic<long> allocations{0};

void note() {
  if (counting.load(std::memory_order_relaxed)) {
    allocations.fetch_add(1, std::memory_order_relaxed);
  }
}
}  // namespace

// The C library's own functions under their other names, so that every allocation of the process is seen.
extern "C" {
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *old, size_t bytes);
void *__libc_memalign(size_t align, size_t bytes);

void *malloc(size_t bytes) {
  note();
  return __libc_malloc(bytes);
}
void *calloc(size_t count, size_t bytes) {
  note();
  return __libc_calloc(count, bytes);
}
void *realloc(void *old, size_t bytes) {
  note();
  return __libc_realloc(old, bytes);
}
void *aligned_alloc(size_t align, size_t bytes) {
  note();
  return __libc_memalign(align, bytes);
}
int posix_memalign(void **out, size_t align, size_t bytes) {
  note();
  *out = __libc_memalign(align, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
}

namespace {

constexpr uint32_t kRanks = 2;

// Two ranks of one thread: each launches before the first waits.
class Pair {
 public:
  Pair() {
    EXPECT_EQ(rsb_comm_create_local(kRanks, nullptr, comms_.data(), nullptr), RSB_OK);
    for (auto &bucketer : bucketers_) {
      EXPECT_EQ(rsb_bucketer_create(nullptr, &bucketer, nullptr), RSB_OK);
    }
    for (size_t i = 0; i < input_.size(); ++i) {
      input_[i] = static_cast<float>(i % 97);
    }
  }
  Pair(const Pair &) = delete;
  Pair &operator=(const Pair &) = delete;
  ~Pair() {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      rsb_bucketer_free(bucketers_[rank]);
      rsb_comm_free(comms_[rank]);
    }
  }

  /// Submits `ops` ops of `numel` elements on both ranks and flushes. Whether all went well.
  bool round(int ops, size_t numel) {
    const long before = done_;
    const void *rows[kRanks] = {input_.data(), input_.data() + numel};
    bool fine = true;
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      for (int op = 0; op < ops; ++op) {
        fine &= rsb_bucketer_reduce_scatter_async(bucketers_[rank], comms_[rank], rows, numel, RSB_DTYPE_F32,
                                                  RSB_OP_SUM, count, this, nullptr) == RSB_OK;
      }
      fine &= rsb_bucketer_launch(bucketers_[rank], nullptr) == RSB_OK;
    }
    for (auto *bucketer : bucketers_) {
      fine &= rsb_bucketer_flush(bucketer, nullptr) == RSB_OK;
    }
    return fine && done_ - before == static_cast<long>(ops) * kRanks;
  }

  /// Rounds of one op, of many, of larger ones, and of ops that fill chunks.
  bool all_rounds() { return round(1, 1) && round(1000, 1) && round(1, 2) && round(100, 1024) && round(7, 40000); }

 private:
  static void count(void *self, const rsb_result *result) {
    static_cast<Pair *>(self)->done_ += result->status == RSB_OK;
  }

  std::array<rsb_comm *, kRanks> comms_{};
  std::array<rsb_bucketer *, kRanks> bucketers_{};
  std::vector<float> input_ = std::vector<float>(80000);
  long done_ = 0;
};

TEST(Cost, NothingIsAllocatedOnceWarm) {
  Pair pair;
  for (int round = 0; round < 4; ++round) {
    ASSERT_TRUE(pair.all_rounds());
  }
  allocations = 0;
  counting = true;
  bool fine = true;
  for (int round = 0; round < 4; ++round) {
    fine &= pair.all_rounds();
  }
  counting = false;
  EXPECT_TRUE(fine);
  EXPECT_EQ(allocations.load(), 0);
}

TEST(Cost, TheCountSeesAllocations) {
  allocations = 0;
  counting = true;
  rsb_bucketer *bucketer = nullptr;
  const rsb_status status = rsb_bucketer_create(nullptr, &bucketer, nullptr);
  counting = false;
  EXPECT_EQ(status, RSB_OK);
  EXPECT_GT(allocations.load(), 0);
  rsb_bucketer_free(bucketer);
}

/// From here on any system call but exit ends this process.
void forbid_system_calls() {
  sock_filter only_exit[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
  };
  const sock_fprog program = {sizeof only_exit / sizeof *only_exit, only_exit};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/// Runs `body` in a child that is killed by its first system call. Whether it lived.
template <typename Body>
bool lives_without_system_calls(const Body &body) {
  const pid_t child = fork();
  if (child == 0) {
    body(forbid_system_calls);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(Cost, NoSystemCallOnceWarm) {
  const bool clock_is_free = lives_without_system_calls([](auto begin) {
    timespec now{};
    begin();
    clock_gettime(CLOCK_MONOTONIC, &now);
    syscall(SYS_exit, 0);
  });
  if (!clock_is_free) {
    GTEST_SKIP() << "here reading the clock is a system call";
  }
  EXPECT_TRUE(lives_without_system_calls([](auto begin) {
    auto *pair = new Pair;
    bool fine = true;
    for (int round = 0; round < 4; ++round) {
      fine &= pair->all_rounds();
    }
    begin();
    for (int round = 0; round < 4; ++round) {
      fine &= pair->all_rounds();
    }
    // Exit alone, not exit_group, is allowed.
    syscall(SYS_exit, fine ? 0 : 1);
  }));
}

}  // namespace
