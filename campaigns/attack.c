/* attack.c - another user of the same host tries to get into a job, or at its memory, while it forms and works.
 *
 * Promises: the attacker gets nothing and the job forms all the same; where an attacker could come first, the job is
 * refused rather than given to it. Needs root, to become two other users. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "campaign.h"
#include "worker.h"

enum { ATTACKER = 65534, SIZE = 3, GUARD_S = 30 };

/* What the two sides share. */
static struct {
  atomic_uint ready, done, placed, attempts;
  pid_t ranks[SIZE];
} *field;

static char job[64], socket_path[600];

static void become_attacker(void) {
  if (setgroups(0, NULL) != 0 || setgid(ATTACKER) != 0 || setuid(ATTACKER) != 0) campaign_die("cannot change user");
}

/* One attempt; `got`: it has got something. */
static void attempt(int got, const char *what) {
  atomic_fetch_add(&field->attempts, 1);
  if (got) violation("the attacker succeeds: %s", what);
}

static void set_path(struct sockaddr_un *address, const char *path) {
  size_t n = strlen(path);
  if (n >= sizeof address->sun_path) campaign_die("the path of the socket is too long: %s", path);
  memcpy(address->sun_path, path, n + 1);
}

/* Talks to whoever listens at the path: sends bytes, hopes for bytes or descriptors. 1: it got some. */
static int pester(const char *path, uint64_t *state, int *connected) {
  struct sockaddr_un to = {.sun_family = AF_UNIX};
  unsigned char bytes[9000], control[1024];
  set_path(&to, path);
  int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), got = 0;
  if (fd < 0) return 0;
  *connected = connect(fd, (struct sockaddr *)&to, sizeof to) == 0;
  if (*connected) {
    struct timeval patience = {0, 100000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    size_t n = below(state, sizeof bytes);
    for (size_t i = 0; i < n; i++) bytes[i] = (unsigned char)next_random(state);
    /* Half of them begin like a true message. */
    if (below(state, 2) != 0 && n > 16) memcpy(bytes, (const char[]){'r', 's', 'b', 'k', 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}, 16);
    if (send(fd, bytes, n, MSG_NOSIGNAL) >= 0) {
      struct iovec part = {bytes, sizeof bytes};
      struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
      got = recvmsg(fd, &message, 0) > 0;
    }
  }
  close(fd);
  return got;
}

/* What a job must come to: it forms; it is refused; its last rank is refused, and rank 0 killed. */
enum fate { FORMS, REFUSED, LAST_REFUSED };

/* A rank of the job. Rank 0 comes first, the others when the attacker has been at work. */
static void rank_of_job(uint32_t rank, enum fate fate) {
  static struct worker worker;
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_comm *comm;
  rsb_error err;
  config.timeout_ns = 10000000000;
  if (fate == LAST_REFUSED && rank != 0 && rank != SIZE - 1) _exit(0);
  if (rank != 0) await(&field->ready, 1);
  rsb_status status = rsb_comm_create_shm(job, rank, SIZE, &config, &comm, &err);
  if (fate == REFUSED || (fate == LAST_REFUSED && rank == SIZE - 1)) {
    if (status != RSB_ERR_PERMISSION) {
      violation("a job under attack: rank %u gets %s, expected RSB_ERR_PERMISSION", rank, rsb_status_name(status));
    }
    _exit(0);
  }
  if (status != RSB_OK) {
    violation("a job under attack does not form: rank %u: %s", rank, err.message);
    _exit(0);
  }
  if (worker_open(&worker, comm, 4096, 3, &err) != RSB_OK) violation("%s", err.message);
  worker_rounds(&worker, 50, "under attack");
  /* The job works on while its memory is looked for. */
  for (;;) {
    unsigned char end = atomic_load(&field->done) != 0, all[SIZE] = {0};
    if (rsb_comm_all_gather(comm, &end, all, 1, &err) != RSB_OK) violation("under attack: %s", err.message);
    if (all[0] != 0) break;
    sleep_ns(1000000);
  }
  worker_close(&worker);
  rsb_comm_free(comm);
  _exit(0);
}

static void start_job(const char *name, pid_t *children, enum fate fate) {
  atomic_store(&field->ready, fate == REFUSED);
  atomic_store(&field->done, 0);
  snprintf(job, sizeof job, "%s", name);
  for (uint32_t r = 0; r < SIZE; r++) {
    children[r] = fork_guarded(GUARD_S);
    if (children[r] == 0) rank_of_job(r, fate);
    field->ranks[r] = children[r];
  }
}

static void end_job(pid_t *children) {
  atomic_store(&field->ready, 1);
  atomic_store(&field->done, 1);
  for (uint32_t r = 0; r < SIZE; r++) reap(children[r], "a rank under attack", 0);
}

/* Looks for the job's socket, as its owner. */
static void find_socket(void) {
  for (int i = 0; i < 5000; i++) {
    DIR *dir = opendir(run_dir());
    for (struct dirent *e; dir != NULL && (e = readdir(dir)) != NULL;) {
      if (e->d_name[0] != '.') snprintf(socket_path, sizeof socket_path, "%s/%s", run_dir(), e->d_name);
    }
    if (dir != NULL) closedir(dir);
    if (socket_path[0] != '\0') return;
    sleep_ns(1000000);
  }
  campaign_die("the job's socket does not come");
}

static void join_as(uint32_t rank, const char *what) {
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_comm *comm;
  rsb_error err;
  config.timeout_ns = 100000000;
  attempt(rsb_comm_create_shm(job, rank, SIZE, &config, &comm, &err) == RSB_OK, what);
}

/* What the other user tries while a job forms: `open_dir`: its directory has been opened by mistake. */
static void attack_forming(uint64_t tries, int open_dir, uint64_t seed) {
  uint64_t state = seed, connections = 0;
  char path[700];
  become_attacker();
  attempt(!open_dir && opendir(run_dir()) != NULL, "lists the run directory");
  for (uint64_t i = 0; i < tries; i++) {
    int connected;
    attempt(pester(socket_path, &state, &connected), "rank 0 answers it");
    connections += (uint64_t)connected;
  }
  attempt(!open_dir && connections != 0, "connects to the socket");
  if (open_dir && connections == 0) violation("the attack did not reach the socket: it proves nothing");
  snprintf(path, sizeof path, "%s/link", run_dir());
  attempt(!open_dir && symlink(run_dir(), path) == 0, "puts a link there");
  attempt(!open_dir && unlink(socket_path) == 0, "removes the socket");
  snprintf(path, sizeof path, "%s.moved", run_dir());
  attempt(rename(run_dir(), path) == 0, "moves the run directory");
  for (uint32_t r = 0; r < SIZE; r++) join_as(r, "joins the job");
  _exit(0);
}

/* What it tries while the job works: the ranks' memory, descriptors, and sockets. */
static void attack_working(void) {
  char path[128], byte;
  become_attacker();
  for (uint32_t r = 0; r < SIZE; r++) {
    static const char *const files[] = {"mem", "maps", "environ", "fd", "map_files", "root/etc"};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
      snprintf(path, sizeof path, "/proc/%d/%s", (int)field->ranks[r], files[i]);
      int fd = open(path, O_RDONLY);
      attempt(fd >= 0 && read(fd, &byte, 1) > 0, files[i]);
      if (fd >= 0) close(fd);
    }
    attempt(kill(field->ranks[r], SIGSTOP) == 0, "stops a rank");
  }
  DIR *shm = opendir("/dev/shm");
  for (struct dirent *e; shm != NULL && (e = readdir(shm)) != NULL;) {
    attempt(strstr(e->d_name, "rsb") != NULL, "finds named shared memory");
  }
  if (shm != NULL) closedir(shm);
  FILE *sockets = fopen("/proc/net/unix", "r");
  char line[512];
  while (sockets != NULL && fgets(line, sizeof line, sockets) != NULL) {
    attempt(strstr(line, run_dir()) != NULL || strstr(line, "@rsb") != NULL, "finds a socket of a formed job");
  }
  if (sockets != NULL) fclose(sockets);
  _exit(0);
}

static void attack(void (*what)(uint64_t, int, uint64_t), uint64_t tries, int open_dir, uint64_t seed) {
  pid_t child = fork_guarded(GUARD_S);
  if (child == 0) what(tries, open_dir, seed);
  reap(child, "the attacker", 0);
}

/* A job that forms and works under attack. */
static void round_of(uint64_t number, int open_dir) {
  char name[64];
  pid_t children[SIZE];
  snprintf(name, sizeof name, "attack-%llu", (unsigned long long)number);
  socket_path[0] = '\0';
  start_job(name, children, FORMS);
  find_socket();
  /* The library checks the directory when it opens it; this is what its check of the peer is for. */
  if (open_dir && (chmod(run_dir(), 0777) != 0 || chmod(socket_path, 0777) != 0)) campaign_die("chmod");
  attack(attack_forming, 100, open_dir, hash64(options.seed, number));
  if (chmod(run_dir(), 0700) != 0) campaign_die("chmod");
  char link[700];
  snprintf(link, sizeof link, "%s/link", run_dir());
  unlink(link);
  atomic_store(&field->ready, 1);
  pid_t child = fork_guarded(GUARD_S);
  if (child == 0) {
    sleep_ns(20000000);
    attack_working();
  }
  reap(child, "the attacker", 0);
  end_job(children);
}

/* Directories that somebody else has made or can enter: the job must be refused. */
static void squatted(const char *what, const char *path) {
  pid_t children[SIZE];
  setenv("RSBUCKET_RUN_DIR", path, 1);
  start_job(what, children, REFUSED);
  end_job(children);
  setenv("RSBUCKET_RUN_DIR", run_dir(), 1);
  atomic_fetch_add(&field->attempts, 1);
}

static void squats(void) {
  char outer[300], inner[400];
  snprintf(outer, sizeof outer, "%s.squat", run_dir());
  snprintf(inner, sizeof inner, "%s/dir", outer);
  if (mkdir(outer, 0755) != 0 || mkdir(inner, 0700) != 0 || chown(inner, ATTACKER, ATTACKER) != 0) campaign_die("mkdir");
  squatted("squat-owner", inner);
  if (chown(inner, 0, 0) != 0 || chmod(inner, 0777) != 0) campaign_die("chmod");
  squatted("squat-open", inner);
  if (chmod(inner, 0750) != 0) campaign_die("chmod");
  squatted("squat-group", inner);
  if (rmdir(inner) != 0 || symlink(run_dir(), inner) != 0) campaign_die("symlink");
  squatted("squat-link", inner);
  if (unlink(inner) != 0 || close(open(inner, O_CREAT | O_WRONLY | O_CLOEXEC, 0600)) != 0) campaign_die("file");
  squatted("squat-file", inner);
  if (unlink(inner) != 0 || rmdir(outer) != 0) campaign_die("rmdir");
}

/* The attacker listens in rank 0's place: the ranks must not talk to it. */
static void false_host(uint64_t number) {
  char name[64];
  pid_t children[SIZE];
  snprintf(name, sizeof name, "host-%llu", (unsigned long long)number);
  socket_path[0] = '\0';
  start_job(name, children, LAST_REFUSED);
  atomic_store(&field->placed, 0);
  find_socket();
  if (chmod(run_dir(), 0777) != 0) campaign_die("chmod");
  pid_t child = fork_guarded(GUARD_S);
  if (child == 0) {
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), heard = 0;
    unsigned char bytes[64];
    become_attacker();
    set_path(&at, socket_path);
    if (unlink(socket_path) != 0 || bind(fd, (struct sockaddr *)&at, sizeof at) != 0 || listen(fd, 9) != 0 ||
        chmod(socket_path, 0777) != 0) {
      campaign_die("the false host cannot listen: %s", strerror(errno));
    }
    atomic_store(&field->placed, 1);
    int guest = accept(fd, NULL, NULL);
    if (guest >= 0) heard = recv(guest, bytes, sizeof bytes, 0) > 0;
    attempt(heard, "a rank says its token to a false rank 0");
    _exit(0);
  }
  await(&field->placed, 1);
  if (chmod(run_dir(), 0700) != 0) campaign_die("chmod");
  atomic_store(&field->ready, 1);
  reap(child, "the false host", 0);
  reap(children[SIZE - 1], "a rank at a false host", 0);
  kill(children[0], SIGKILL);
  for (uint32_t r = 0; r < SIZE - 1; r++) reap(children[r], "a rank", 1);
  unlink(socket_path);
}

int main(int argc, char **argv) {
  campaign_begin("attack", "Another user attacks N jobs while they form and work. Needs root.", NULL, 20, argc, argv);
  if (geteuid() != 0) {
    printf("attack: needs root, skipped\n");
    return campaign_end();
  }
  field = shared(sizeof *field);
  for (uint64_t i = 0; i < options.trials && violations() < 50; i++) round_of(i, i % 2 != 0);
  for (uint64_t i = 0; i < 1 + options.trials / 10; i++) {
    squats();
    false_host(i);
  }
  report_number("jobs_under_attack", options.trials);
  report_number("attempts", field->attempts);
  return campaign_end();
}
