/* Reads of the file whose path ends with $FAULT_EIO fail with EIO, as on a disk that is broken there. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int broken(int fd) {
    const char *wanted = getenv("FAULT_EIO");
    if (wanted == NULL || *wanted == '\0' || fd < 0) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path);
    size_t end = strlen(wanted);
    return length >= (ssize_t)end && memcmp(path + length - end, wanted, end) == 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE(fd, failed) if (broken(fd)) { errno = EIO; return failed; }

ssize_t read(int fd, void *to, size_t n) { REFUSE(fd, -1) return REAL(read)(fd, to, n); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { REFUSE(fd, -1) return REAL(pread)(fd, to, n, at); }
ssize_t pread64(int fd, void *to, size_t n, off64_t at) { REFUSE(fd, -1) return REAL(pread64)(fd, to, n, at); }
ssize_t readv(int fd, const struct iovec *to, int n) { REFUSE(fd, -1) return REAL(readv)(fd, to, n); }

void *mmap(void *at, size_t n, int how, int flags, int fd, off_t from) {
    REFUSE(fd, MAP_FAILED) return REAL(mmap)(at, n, how, flags, fd, from);
}

void *mmap64(void *at, size_t n, int how, int flags, int fd, off64_t from) {
    REFUSE(fd, MAP_FAILED) return REAL(mmap64)(at, n, how, flags, fd, from);
}
