/* Lets chosen calls to the system fail, for tests/support/faults.py: put before every other library with
 * LD_PRELOAD, so that Python, torch's C++ and safetensors' Rust all pass here.
 *
 * Only calls that concern a path under `prefix` are seen. Each is written to the log, a line each;
 * those whose kind is in `kinds` are counted, and the `at`-th of them is acted upon (with `onwards`
 * every later one too). An action above 0 is the errno to fail with. A line of the log begins with
 * `!` where the call was acted upon, with `+` where it was only counted, with a blank otherwise.
 *
 * Not seen: pages of a mapped file, calls that libc makes inside itself, getdents without readdir.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The order is that of KINDS in tests/support/faults.py. */
enum { OPEN, CREATE, READ, WRITE, SYNC, CLOSE, RENAME, MKDIR, UNLINK, TRUNCATE, STAT, LIST, MAP,
       LOCK, THREAD };
/* Half of what was asked; claimed but not done; the process killed, or stopped, before the call. */
enum { HALF = -1, LOST = -2, KILL = -3, STOP = -4 };

static char prefix[PATH_MAX], only[NAME_MAX];
static unsigned kinds;
static long at, count;
static int action, onwards, log_file = -1, armed;

void faults_arm(const char *prefix_, const char *only_, unsigned kinds_, long at_, int action_,
                int onwards_, int log_file_) {
    strncpy(prefix, prefix_, sizeof prefix - 1);
    strncpy(only, only_, sizeof only - 1);
    kinds = kinds_, at = at_, action = action_, onwards = onwards_, log_file = log_file_;
    armed = 1;
}

/* The action for this call, 0 to let it through. */
static int act(int kind, const char *name, const char *path) {
    if (strncmp(path, prefix, strlen(prefix))) return 0;
    int chosen = 0, counted = (kinds >> kind & 1) && strstr(path, only);
    if (counted) {
        long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
        chosen = n == at || (n > at && onwards);
    }
    char line[2 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%c%s %s\n", chosen ? '!' : counted ? '+' : ' ',
                          name, path);
    int before = errno;
    syscall(SYS_write, log_file, line, length);
    errno = before;
    if (!chosen) return 0;
    if (action == KILL || action == STOP)
        syscall(SYS_kill, getpid(), action == KILL ? SIGKILL : SIGSTOP);
    return action == STOP ? 0 : action;
}

static int on_file(int kind, const char *name, int file) {
    char link[64], path[PATH_MAX];
    if (!armed || file < 0) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return act(kind, name, path);
}

static int on_path(int kind, const char *name, int folder, const char *given) {
    char link[64], path[PATH_MAX];
    if (!armed || !given) return 0;
    if (given[0] == '/') return act(kind, name, given);
    int before = errno;
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    snprintf(path + length, sizeof path - length, "/%s", given);
    return act(kind, name, path);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL(result) if (found > 0) { errno = found; return result; }

/* Calls that fail or happen: what they return, their kind, and how they name the path. */
#define PLAIN(type, bad, kind, name, where, params, args) \
    type name params { \
        REAL(name); \
        int found = where; \
        FAIL(bad) \
        return real args; \
    }
#define BY_PATH(kind, name, folder, path, params, args) \
    PLAIN(int, -1, kind, name, on_path(kind, #name, folder, path), params, args)
#define BY_FILE(kind, name, file, params, args) \
    PLAIN(int, -1, kind, name, on_file(kind, #name, file), params, args)

BY_PATH(RENAME, rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
BY_PATH(RENAME, renameat, b, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
BY_PATH(RENAME, renameat2, b, to, (int a, const char *from, int b, const char *to, unsigned flags),
        (a, from, b, to, flags))
BY_PATH(RENAME, link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
BY_PATH(RENAME, symlink, AT_FDCWD, to, (const char *from, const char *to), (from, to))
BY_PATH(MKDIR, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
BY_PATH(MKDIR, mkdirat, at_, path, (int at_, const char *path, mode_t mode), (at_, path, mode))
BY_PATH(UNLINK, unlink, AT_FDCWD, path, (const char *path), (path))
BY_PATH(UNLINK, unlinkat, at_, path, (int at_, const char *path, int flags), (at_, path, flags))
BY_PATH(UNLINK, rmdir, AT_FDCWD, path, (const char *path), (path))
BY_PATH(TRUNCATE, truncate64, AT_FDCWD, path, (const char *path, off64_t n), (path, n))
BY_FILE(TRUNCATE, ftruncate64, file, (int file, off64_t n), (file, n))
BY_FILE(TRUNCATE, ftruncate, file, (int file, off_t n), (file, n))
BY_FILE(TRUNCATE, fallocate64, file, (int file, int mode, off64_t o, off64_t n), (file, mode, o, n))
BY_FILE(TRUNCATE, fallocate, file, (int file, int mode, off_t o, off_t n), (file, mode, o, n))
BY_FILE(SYNC, fsync, file, (int file), (file))
BY_FILE(SYNC, fdatasync, file, (int file), (file))
BY_FILE(LOCK, flock, file, (int file, int how), (file, how))
BY_PATH(STAT, stat64, AT_FDCWD, path, (const char *path, struct stat64 *out), (path, out))
BY_PATH(STAT, lstat64, AT_FDCWD, path, (const char *path, struct stat64 *out), (path, out))
BY_PATH(STAT, stat, AT_FDCWD, path, (const char *path, struct stat *out), (path, out))
BY_PATH(STAT, lstat, AT_FDCWD, path, (const char *path, struct stat *out), (path, out))
BY_FILE(STAT, fstat64, file, (int file, struct stat64 *out), (file, out))
BY_FILE(STAT, fstat, file, (int file, struct stat *out), (file, out))
BY_PATH(STAT, fstatat64, at_, path, (int at_, const char *path, struct stat64 *out, int flags),
        (at_, path, out, flags))
/* What libraries call that were built with an older libc. */
int __xstat64(int v, const char *path, struct stat64 *out);
int __lxstat64(int v, const char *path, struct stat64 *out);
int __fxstat64(int v, int file, struct stat64 *out);
BY_PATH(STAT, __xstat64, AT_FDCWD, path, (int v, const char *path, struct stat64 *out), (v, path, out))
BY_PATH(STAT, __lxstat64, AT_FDCWD, path, (int v, const char *path, struct stat64 *out), (v, path, out))
BY_FILE(STAT, __fxstat64, file, (int v, int file, struct stat64 *out), (v, file, out))
BY_PATH(STAT, access, AT_FDCWD, path, (const char *path, int mode), (path, mode))
BY_PATH(STAT, faccessat, at_, path, (int at_, const char *path, int mode, int flags),
        (at_, path, mode, flags))

int statx(int folder, const char *path, int flags, unsigned mask, struct statx *out) {
    REAL(statx);
    /* Rust asks with no path at all whether there is such a call, against the declaration. */
    const char *volatile given = path;
    if (!given) return real(folder, path, flags, mask, out);
    int found = !*path ? on_file(STAT, "statx", folder) : on_path(STAT, "statx", folder, path);
    FAIL(-1)
    return real(folder, path, flags, mask, out);
}

/* posix_fallocate returns its error instead of setting errno. */
int posix_fallocate64(int file, off64_t o, off64_t n) {
    REAL(posix_fallocate64);
    int found = on_file(TRUNCATE, "posix_fallocate64", file);
    return found > 0 ? found : real(file, o, n);
}

/* A file is closed even where close says that what was written is lost. */
int close(int file) {
    REAL(close);
    int found = on_file(CLOSE, "close", file), result = real(file);
    FAIL(-1)
    return result;
}

PLAIN(DIR *, NULL, LIST, opendir, on_path(LIST, "opendir", AT_FDCWD, path), (const char *path), (path))
PLAIN(struct dirent64 *, NULL, LIST, readdir64, on_file(LIST, "readdir64", dirfd(folder)), (DIR *folder),
      (folder))

static int open_kind(int flags) { return flags & O_CREAT ? CREATE : OPEN; }
static int open_kind_of(const char *mode) { return *mode == 'r' ? OPEN : CREATE; }

#define OPENS(name, folder, params, ...) \
    int name params { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        int found = on_path(open_kind(flags), #name, folder, path); \
        FAIL(-1) \
        return real(__VA_ARGS__, mode); \
    }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENS(openat, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
OPENS(openat64, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
PLAIN(FILE *, NULL, OPEN, fopen, on_path(open_kind_of(mode), "fopen", AT_FDCWD, path),
      (const char *path, const char *mode), (path, mode))
PLAIN(FILE *, NULL, OPEN, fopen64, on_path(open_kind_of(mode), "fopen64", AT_FDCWD, path),
      (const char *path, const char *mode), (path, mode))

/* Calls that move bytes: they may also move half of them, or only say that they did. */
#define MOVES(kind, name, params, half, lost, ...) \
    ssize_t name params { \
        REAL(name); \
        int found = on_file(kind, #name, file); \
        FAIL(-1) \
        if (found == HALF && n > 1) { half } \
        if (found == LOST) { lost } \
        return real(__VA_ARGS__); \
    }
#define HALF_N n = (n + 1) / 2;
#define LOST_N return n;
#define LOST_HERE lseek64(file, n, SEEK_CUR); return n;
MOVES(READ, read, (int file, void *p, size_t n), HALF_N, , file, p, n)
MOVES(READ, pread, (int file, void *p, size_t n, off_t o), HALF_N, , file, p, n, o)
MOVES(READ, pread64, (int file, void *p, size_t n, off64_t o), HALF_N, , file, p, n, o)
MOVES(WRITE, write, (int file, const void *p, size_t n), HALF_N, LOST_HERE, file, p, n)
MOVES(WRITE, pwrite, (int file, const void *p, size_t n, off_t o), HALF_N, LOST_N, file, p, n, o)
MOVES(WRITE, pwrite64, (int file, const void *p, size_t n, off64_t o), HALF_N, LOST_N, file, p, n, o)
MOVES(WRITE, sendfile, (int file, int from, off_t *o, size_t n), HALF_N, , file, from, o, n)
MOVES(WRITE, sendfile64, (int file, int from, off64_t *o, size_t n), HALF_N, , file, from, o, n)
ssize_t copy_file_range(int from, off64_t *a, int file, off64_t *b, size_t n, unsigned flags) {
    REAL(copy_file_range);
    int found = on_file(WRITE, "copy_file_range", file);
    FAIL(-1)
    if (found == HALF && n > 1) n = (n + 1) / 2;
    return real(from, a, file, b, n, flags);
}

static ssize_t total(const struct iovec *v, int n) {
    ssize_t sum = 0;
    for (int i = 0; i < n; i++) sum += v[i].iov_len;
    return sum;
}
#define LOST_V return total(v, n);
#define VECTORS(kind, name, lost, params, ...) \
    ssize_t name params { \
        REAL(name); \
        int found = on_file(kind, #name, file); \
        FAIL(-1) \
        struct iovec first; \
        if (found == HALF && n > 0) { \
            first = (struct iovec){v->iov_base, (v->iov_len + 1) / 2}; \
            v = &first, n = 1; \
        } \
        if (found == LOST) { lost } \
        return real(__VA_ARGS__); \
    }
typedef const struct iovec *vector;
VECTORS(READ, readv, , (int file, vector v, int n), file, v, n)
VECTORS(READ, preadv, , (int file, vector v, int n, off_t o), file, v, n, o)
VECTORS(READ, preadv64, , (int file, vector v, int n, off64_t o), file, v, n, o)
VECTORS(READ, preadv2, , (int file, vector v, int n, off_t o, int f), file, v, n, o, f)
VECTORS(READ, preadv64v2, , (int file, vector v, int n, off64_t o, int f), file, v, n, o, f)
VECTORS(WRITE, writev, lseek64(file, total(v, n), SEEK_CUR); LOST_V, (int file, vector v, int n),
        file, v, n)
VECTORS(WRITE, pwritev, LOST_V, (int file, vector v, int n, off_t o), file, v, n, o)
VECTORS(WRITE, pwritev64, LOST_V, (int file, vector v, int n, off64_t o), file, v, n, o)
VECTORS(WRITE, pwritev2, LOST_V, (int file, vector v, int n, off_t o, int f), file, v, n, o, f)
VECTORS(WRITE, pwritev64v2, LOST_V, (int file, vector v, int n, off64_t o, int f), file, v, n, o, f)

PLAIN(void *, MAP_FAILED, MAP, mmap, on_file(MAP, "mmap", file),
      (void *p, size_t n, int prot, int flags, int file, off_t o), (p, n, prot, flags, file, o))
PLAIN(void *, MAP_FAILED, MAP, mmap64, on_file(MAP, "mmap64", file),
      (void *p, size_t n, int prot, int flags, int file, off64_t o), (p, n, prot, flags, file, o))

/* No path belongs to a thread: it is seen as one of the folder under test. */
int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *given) {
    REAL(pthread_create);
    int found = armed ? act(THREAD, "pthread_create", prefix) : 0;
    return found > 0 ? found : real(thread, how, run, given);
}
