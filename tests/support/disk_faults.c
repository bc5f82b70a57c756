/* Preloaded into a process (LD_PRELOAD): counts its writes to some files, and at one of them fills the disk, or dies.

   Writes of every library go through it, whatever they are written in: Python's, torch's, safetensors'. Nothing happens
   until arm() is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum Fault { NONE, FULL, KILL };

static volatile enum Fault fault = NONE;
static volatile long left = 0; /* writes until it happens */
static char marks[8][128];     /* a write counts if its file's path has the first mark, and one of the others */
static int marks_count = 0;
static int trace = -1; /* file descriptor: the path of every write that counts, a line each */

void arm(int what, long count, int trace_to) {
  left = count;
  trace = trace_to;
  fault = (enum Fault)what;
}

void mark(const char* part) { snprintf(marks[marks_count++], sizeof marks[0], "%s", part); }

static int counts(int fd, char* path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  if (marks_count == 0 || !strstr(path, marks[0])) return 0;
  for (int i = 1; i < marks_count; ++i)
    if (strstr(path, marks[i])) return 1;
  return marks_count == 1;
}

/* 0 to go on, 1 for a full disk; a process that is to die writes half, and does. */
static int strikes(int fd, const void* data, size_t size) {
  if (trace < 0 || fd == trace) return 0;
  int before = errno;
  char path[PATH_MAX];
  if (!counts(fd, path)) {
    errno = before;
    return 0;
  }
  long now = __sync_sub_and_fetch(&left, 1);
  if (fault == NONE || now <= 0) {
    syscall(SYS_write, trace, path, strlen(path));
    syscall(SYS_write, trace, "\n", 1);
  }
  if (fault == KILL && now == 0) {
    syscall(SYS_write, fd, data, size / 2);
    kill(getpid(), SIGKILL);
  }
  errno = before;
  return fault == FULL && now <= 0;
}

#define FAIL_IF_STRUCK(fd, data, size) \
  if (strikes(fd, data, size)) {       \
    errno = ENOSPC;                    \
    return -1;                         \
  }
#define FIND(next, name) \
  if (!next) next = (__typeof__(next))dlsym(RTLD_NEXT, name);

ssize_t write(int fd, const void* data, size_t size) {
  static ssize_t (*next)(int, const void*, size_t);
  FIND(next, "write")
  FAIL_IF_STRUCK(fd, data, size)
  return next(fd, data, size);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  static ssize_t (*next)(int, const void*, size_t, off64_t);
  FIND(next, "pwrite64")
  FAIL_IF_STRUCK(fd, data, size)
  return next(fd, data, size, offset);
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  static ssize_t (*next)(int, const void*, size_t, off_t);
  FIND(next, "pwrite")
  FAIL_IF_STRUCK(fd, data, size)
  return next(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  static ssize_t (*next)(int, const struct iovec*, int);
  FIND(next, "writev")
  FAIL_IF_STRUCK(fd, parts[0].iov_base, count ? parts[0].iov_len : 0)
  return next(fd, parts, count);
}
