/* Opens what the dentry cache knows, without asking the device: openat2(2) with RESOLVE_CACHED, Linux 5.12. */
#ifndef DISKREAD_OPEN_CACHED_H
#define DISKREAD_OPEN_CACHED_H

#include <fcntl.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Stable kernel ABI (linux/openat2.h), spelled out for older build machines. */
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#define DISKREAD_NO_XDEV 0x01
#define DISKREAD_NO_MAGICLINKS 0x02
#define DISKREAD_BENEATH 0x08
#define DISKREAD_CACHED 0x20

struct diskread_cached_how { uint64_t flags; uint64_t mode; uint64_t resolve; };

/* A descriptor, or -1 and errno: EAGAIN when the device would have to be asked. */
static inline int diskread_open_cached(int directory, const char *path, int flags, uint64_t resolve) {
    struct diskread_cached_how how = {
        .flags = (uint64_t)(O_CLOEXEC | flags),
        .mode = 0,
        .resolve = resolve | DISKREAD_NO_MAGICLINKS | DISKREAD_CACHED,
    };
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
}

#endif
