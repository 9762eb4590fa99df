/* What the page cache has of a file: cachestat(2), Linux 6.5. It never waits for the device. */
#ifndef DISKREAD_PAGE_CACHE_H
#define DISKREAD_PAGE_CACHE_H

#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Stable kernel ABI (linux/mman.h), spelled out for older build machines. */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

struct diskread_cachestat_range { uint64_t offset; uint64_t length; };
struct diskread_cachestat { uint64_t cached, dirty, writeback, evicted, recently_evicted; };

/* Whether all pages of a range are in the page cache, or on their way: 1, 0, or -1 and errno. */
static inline int diskread_all_cached(int descriptor, int64_t offset, int64_t size) {
    static int64_t page;
    if (page == 0) page = sysconf(_SC_PAGESIZE) > 0 ? sysconf(_SC_PAGESIZE) : 4096;
    int64_t first = offset / page, last = (offset + size - 1) / page;
    struct diskread_cachestat_range range = {
        .offset = (uint64_t)(first * page), .length = (uint64_t)((last - first + 1) * page),
    };
    struct diskread_cachestat found = {0};
    if (syscall(SYS_cachestat, descriptor, &range, &found, 0) != 0) return -1;
    return found.cached >= (uint64_t)(last - first + 1);
}

#endif
