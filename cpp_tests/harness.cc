// The runners: threads for local and custom comms, forked processes for shm.
#include "harness.h"

#include <gtest/gtest-spi.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <sstream>
#include <thread>

namespace harness {
namespace {

/// A private rendezvous directory, so that no test depends on the user's home, and what is left behind
/// shows.
class RunDirectory : public ::testing::Environment {
 public:
  void SetUp() override {
    std::string path = ::testing::TempDir() + "rsbXXXXXX";
    ASSERT_NE(mkdtemp(path.data()), nullptr) << std::strerror(errno);
    path_ = path;
    ASSERT_EQ(setenv("RSBUCKET_RUN_DIR", path_.c_str(), 1), 0);
  }
  void TearDown() override {
    if (!path_.empty()) {
      EXPECT_EQ(rmdir(path_.c_str()), 0) << path_ << " is not empty: " << std::strerror(errno);
    }
  }

 private:
  std::string path_;
};

const ::testing::Environment *const kRunDirectory =
    ::testing::AddGlobalTestEnvironment(new RunDirectory);

/// Runs `fn` and says whether it came to its end without a fatal failure or an exception.
bool completes(const std::function<void()> &fn) {
  bool done = false;
  try {
    [&] {
      ASSERT_NO_FATAL_FAILURE(fn());
      done = true;
    }();
  } catch (const std::exception &e) {
    ADD_FAILURE() << "exception: " << e.what();
  }
  return done;
}

void write_all(int fd, const std::string &text) {
  size_t sent = 0;
  while (sent < text.size()) {
    const ssize_t n = write(fd, text.data() + sent, text.size() - sent);
    if (n > 0) {
      sent += static_cast<size_t>(n);
    } else if (errno != EINTR) {
      return;
    }
  }
}

std::string read_all(int fd) {
  std::string text;
  char block[4096];
  for (;;) {
    const ssize_t n = read(fd, block, sizeof block);
    if (n > 0) {
      text.append(block, static_cast<size_t>(n));
    } else if (n == 0 || errno != EINTR) {
      return text;
    }
  }
}

/// The child's part: failures go to the parent as text, the exit code says whether there were any.
[[noreturn]] void be_child(const std::function<void()> &fn, int fd) {
  alarm(30);
  ::testing::TestPartResultArray results;
  {
    ::testing::ScopedFakeTestPartResultReporter reporter(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ALL_THREADS, &results);
    completes(fn);
  }
  std::ostringstream text;
  bool failed = false;
  for (int i = 0; i < results.size(); ++i) {
    const ::testing::TestPartResult &result = results.GetTestPartResult(i);
    failed = failed || result.failed();
    if (result.failed()) {
      text << result << "\n";
    }
  }
  write_all(fd, text.str());
  close(fd);
  _exit(failed ? 1 : 0);
}

}  // namespace

rsb_comm_config comm_config(uint64_t timeout_ns) {
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.timeout_ns = timeout_ns;
  return config;
}

void run_threads(uint32_t size, const std::function<void(uint32_t)> &fn,
                 const std::function<void(uint32_t)> &on_failure) {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      SCOPED_TRACE("rank " + std::to_string(rank) + " of " + std::to_string(size));
      if (!completes([&] { fn(rank); })) {
        on_failure(rank);
      }
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
}

void run_ranks(uint32_t size, const RankFn &fn, const rsb_comm_config *config) {
  const rsb_comm_config standard = comm_config();
  std::vector<rsb_comm *> comms(size, nullptr);
  Error error;
  const rsb_status status =
      rsb_comm_create_local(size, config != nullptr ? config : &standard, comms.data(), error);
  ASSERT_TRUE(answers(RSB_OK, status, error));
  run_threads(
      size, [&](uint32_t rank) { fn(rank, comms[rank]); },
      [&](uint32_t rank) { rsb_comm_abort(comms[rank]); });
  for (rsb_comm *comm : comms) {
    rsb_comm_free(comm);
  }
}

void run_processes(uint32_t size, const std::function<void(uint32_t)> &fn,
                   const std::set<uint32_t> &killed) {
  struct Child {
    pid_t pid;
    int fd;
  };
  std::vector<Child> children;
  for (uint32_t rank = 0; rank < size; ++rank) {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0) << std::strerror(errno);
    const pid_t pid = fork();
    if (pid == 0) {
      for (const Child &other : children) {
        close(other.fd);
      }
      // Nothing of this frame is destroyed in a child: valgrind would call it lost.
      std::vector<Child>().swap(children);
      close(ends[0]);
      be_child([&] { fn(rank); }, ends[1]);
    }
    close(ends[1]);
    ASSERT_GT(pid, 0) << std::strerror(errno);
    children.push_back({pid, ends[0]});
  }
  for (uint32_t rank = 0; rank < size; ++rank) {
    const std::string text = read_all(children[rank].fd);
    close(children[rank].fd);
    int status = 0;
    while (waitpid(children[rank].pid, &status, 0) < 0 && errno == EINTR) {
    }
    if (killed.count(rank) != 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
      continue;
    }
    if (WIFSIGNALED(status)) {
      ADD_FAILURE() << "rank " << rank << " died of signal " << WTERMSIG(status) << "\n" << text;
    } else if (WEXITSTATUS(status) != 0 || killed.count(rank) != 0) {
      ADD_FAILURE() << "rank " << rank << " ended with code " << WEXITSTATUS(status) << "\n" << text;
    }
  }
}

void run_shm(uint32_t size, const RankFn &fn, const rsb_comm_config *config,
             const std::set<uint32_t> &killed) {
  const rsb_comm_config standard = comm_config();
  const std::string name = unique_name();
  run_processes(
      size,
      [&](uint32_t rank) {
        rsb_comm *comm = nullptr;
        Error error;
        const rsb_status status = rsb_comm_create_shm(
            name.c_str(), rank, size, config != nullptr ? config : &standard, &comm, error);
        ASSERT_TRUE(answers(RSB_OK, status, error));
        fn(rank, comm);
        rsb_comm_free(comm);
      },
      killed);
}

std::string kind_name(Kind kind) { return kind == Kind::kLocal ? "local" : "shm"; }

void run_group(Kind kind, uint32_t size, const RankFn &fn, const rsb_comm_config *config) {
  if (kind == Kind::kLocal) {
    run_ranks(size, fn, config);
  } else {
    run_shm(size, fn, config);
  }
}

std::string unique_name() {
  static int count = 0;
  return "test." + std::to_string(getpid()) + "-" + std::to_string(count++);
}

Gate::Gate() {
  void *memory = mmap(nullptr, sizeof *count_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  count_ = new (memory) std::atomic<uint32_t>(0);
}

Gate::~Gate() { munmap(static_cast<void *>(count_), sizeof *count_); }

void Gate::open() { count_->fetch_add(1); }

uint32_t Gate::count() const { return count_->load(); }

bool Gate::wait(uint32_t count, double seconds) const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (count_->load() < count) {
    if (std::chrono::steady_clock::now() > end) {
      return false;
    }
    std::this_thread::yield();
  }
  return true;
}

Error::Error() { std::memset(static_cast<void *>(&frame_), 0xA5, sizeof frame_); }

bool Error::untouched() const {
  const auto *bytes = reinterpret_cast<const unsigned char *>(&frame_);
  for (size_t i = 0; i < sizeof frame_; ++i) {
    if (bytes[i] != 0xA5) {
      return false;
    }
  }
  return true;
}

::testing::AssertionResult Error::full(rsb_status status) const {
  const rsb_error &e = frame_.error;
  for (size_t i = 0; i < sizeof frame_.before; ++i) {
    if (frame_.before[i] != 0xA5 || frame_.after[i] != 0xA5) {
      return ::testing::AssertionFailure() << "bytes beside the error were written";
    }
  }
  if (e.status != status) {
    return ::testing::AssertionFailure() << "err->status is " << e.status << ", not " << status;
  }
  if (e.reserved == 0xA5A5A5A5u || static_cast<uint32_t>(e.native_code) == 0xA5A5A5A5u ||
      static_cast<uint32_t>(e.peer) == 0xA5A5A5A5u) {
    return ::testing::AssertionFailure() << "a field was not written";
  }
  if (std::memchr(e.message, 0, sizeof e.message) == nullptr) {
    return ::testing::AssertionFailure() << "the message does not end";
  }
  if (e.message[0] == '\0') {
    return ::testing::AssertionFailure() << "the message is empty";
  }
  return ::testing::AssertionSuccess();
}

std::string Error::message() const {
  return std::string(frame_.error.message, strnlen(frame_.error.message, sizeof frame_.error.message));
}

::testing::AssertionResult answers(rsb_status expected, rsb_status actual, const Error &error) {
  if (actual != expected) {
    auto result = ::testing::AssertionFailure()
                  << "got " << rsb_status_name(actual) << ", not " << rsb_status_name(expected);
    return error.untouched() ? result : result << ": " << error.message();
  }
  if (actual == RSB_OK) {
    return error.untouched() ? ::testing::AssertionSuccess()
                             : ::testing::AssertionFailure() << "err was written on RSB_OK";
  }
  return error.full(actual);
}

::testing::AssertionResult refuses(const std::set<rsb_status> &expected, rsb_status actual,
                                   const Error &error, const std::vector<std::string> &names) {
  if (expected.count(actual) == 0) {
    auto result = ::testing::AssertionFailure() << "got " << rsb_status_name(actual);
    return error.untouched() ? result : result << ": " << error.message();
  }
  const ::testing::AssertionResult full = error.full(actual);
  if (!full) {
    return full;
  }
  if (error->native_code != 0 || error->peer != -1) {
    return ::testing::AssertionFailure() << "an argument error blames peer " << error->peer << ", native "
                                         << error->native_code;
  }
  for (const std::string &name : names) {
    if (error.message().find(name) != std::string::npos) {
      return ::testing::AssertionSuccess();
    }
  }
  return ::testing::AssertionFailure() << "the message does not name \"" << names.front()
                                       << "\": " << error.message();
}

Bucketer::Bucketer(int64_t bucket_bytes, const rsb_allocator *allocator) {
  rsb_config config = RSB_CONFIG_INIT;
  config.bucket_bytes = bucket_bytes;
  config.allocator = allocator;
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_create(&config, &handle_, error), error));
}

Bucketer::~Bucketer() {
  if (handle_ != nullptr) {
    free();
  }
}

rsb_status Bucketer::free() {
  rsb_bucketer *handle = handle_;
  handle_ = nullptr;
  return rsb_bucketer_free(handle);
}

rsb_stats Bucketer::stats() const {
  rsb_stats stats = {};
  EXPECT_RSB_OK(rsb_bucketer_stats(handle_, &stats, sizeof stats));
  return stats;
}

}  // namespace harness
