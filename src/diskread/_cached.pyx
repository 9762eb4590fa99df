# cython: language_level=3, freethreading_compatible=True, embedsignature=True
"""What the page cache has, without asking the device: for the hub's own thread.

Three rules keep a read here from hanging on a disk that has stopped answering (found out on ext4 and xfs with Linux 6.18):

* A path is resolved with RESOLVE_CACHED: what is not in the dentry cache is a miss (openat2(2), Linux 5.12).
* preadv2(2) with RWF_NOWAIT alone can hang: in the file system's own metadata (the extents of a page that is not there),
  and in read-ahead that it starts, even from a page that is there, when that carries the kernel's marker. So it is called
  only for ranges of which cachestat(2) (Linux 6.5) says that every page is in the cache, and with them as many pages
  behind as the kernel would read ahead: then there is nothing to be read.
* Descriptors have O_NOATIME, since an update of the access time waits for the journal.

The GIL is held throughout: a call takes microseconds, releasing and retaking the GIL could take longer. A miss or an error
is a value, never an exception.
"""

cimport cython
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EBADF, EINTR, EISDIR, errno
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/stat.h>
    #include <sys/statfs.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #include "_open_cached.h"

    /* Stable kernel ABI (linux/mman.h, linux/fs.h), spelled out for older build machines. */
    #ifndef RWF_NOWAIT
    #define RWF_NOWAIT 0x00000008
    #endif
    #ifndef AT_STATX_DONT_SYNC
    #define AT_STATX_DONT_SYNC 0x4000
    #endif

    static int diskread_open_beneath(int directory, const char *path, int flags) {
        flags |= O_RDONLY | O_NONBLOCK | O_NOCTTY;
        return diskread_open_cached(directory, path, flags, DISKREAD_NO_XDEV | DISKREAD_BENEATH);
    }

    static int diskread_statx(int descriptor, uint32_t *mode, uint64_t *device, uint64_t *inode, int64_t *size,
                              int64_t *mtime_sec, int64_t *mtime_nsec, uint32_t *links) {
        struct statx found;
        if (statx(descriptor, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC,
                  STATX_TYPE | STATX_MODE | STATX_SIZE | STATX_INO | STATX_MTIME | STATX_NLINK, &found) != 0) return -1;
        *mode = found.stx_mode;
        *device = makedev(found.stx_dev_major, found.stx_dev_minor);
        *inode = found.stx_ino;
        *size = (int64_t)found.stx_size;
        *mtime_sec = found.stx_mtime.tv_sec;
        *mtime_nsec = found.stx_mtime.tv_nsec;
        *links = found.stx_nlink;
        return 0;
    }

    /* Who reads on from this descriptor does so in a worker, which asks for read-ahead itself: see _syscalls.pyx. */
    static void diskread_cached_no_read_ahead(int descriptor) {
        int result = posix_fadvise(descriptor, 0, 0, POSIX_FADV_RANDOM);
        (void)result; /* an advice */
    }

    static ssize_t diskread_pread_nowait(int descriptor, char *buffer, size_t size, int64_t offset) {
        struct iovec vector = {.iov_base = buffer, .iov_len = size};
        return preadv2(descriptor, &vector, 1, offset, RWF_NOWAIT);
    }

    static int diskread_statfs(int descriptor, int64_t *type, int64_t *flags) {
        struct statfs found;
        if (fstatfs(descriptor, &found) != 0) return -1;
        *type = (int64_t)(unsigned long)found.f_type & 0xffffffff;
        *flags = found.f_flags;
        return 0;
    }

    static int diskread_cached_is_regular(uint32_t mode) { return S_ISREG(mode); }
    """
    int open_file "diskread_open_beneath"(int directory, const char *path, int flags) nogil
    int stat_file "diskread_statx"(int descriptor, uint32_t *mode, uint64_t *device, uint64_t *inode, int64_t *size,
                                   int64_t *mtime_sec, int64_t *mtime_nsec, uint32_t *links) nogil
    ssize_t pread_now "diskread_pread_nowait"(int descriptor, char *buffer, size_t size, int64_t offset) nogil
    void no_read_ahead "diskread_cached_no_read_ahead"(int descriptor) nogil
    int statfs_of "diskread_statfs"(int descriptor, int64_t *kind, int64_t *flags) nogil
    bint is_regular "diskread_cached_is_regular"(uint32_t mode) nogil
    int c_close "close"(int descriptor) nogil
    int O_NOATIME

cdef extern from "_page_cache.h":
    int all_cached "diskread_all_cached"(int descriptor, int64_t offset, int64_t size) nogil

cdef int NOT_HERE = 0  # instead of errno: only the slow way can say what is wrong with the parameters

# A range that is cached in part is served up to the first piece of so many bytes that is not.
cdef int64_t PIECE = 64 * 1024

# Bytes after which other greenlets have their turn, each read counting for COST_OF_READ more: some 0.3 ms of a hub.
cdef int64_t TURN = 2 * 1024 * 1024
cdef int64_t COST_OF_READ = 16 * 1024

# For how long the pages behind a range are taken to be still there. They only matter where the first one carries a marker
# and the device's queue is full in the very same moment.
cdef int64_t VERDICT_NS = 1_000_000


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    if clock_gettime(CLOCK_MONOTONIC, &now) != 0:
        return 0
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef struct Found:
    uint32_t mode
    uint64_t device
    uint64_t inode
    int64_t size
    int64_t mtime_sec
    int64_t mtime_nsec
    uint32_t links


cdef int open_regular(int root_fd, const char *path, int flags, int *descriptor, Found *found) noexcept nogil:
    """Open a regular file that is in the dentry cache; 0, or errno with nothing left open."""
    cdef int fd, error
    while True:
        fd = open_file(root_fd, path, flags)
        if fd >= 0:
            break
        if errno != EINTR:
            return errno
    error = 0
    if stat_file(fd, &found.mode, &found.device, &found.inode, &found.size, &found.mtime_sec, &found.mtime_nsec,
                 &found.links) != 0:
        error = errno
    elif not is_regular(found.mode):
        error = EISDIR
    elif not found.links:
        # A file without a name goes with its last descriptor, and that is work for the journal: a miss. (The rest of a
        # race, deleted while it is open here, is as short as this call.)
        error = EAGAIN
    if error:
        c_close(fd)
        return error
    descriptor[0] = fd
    return 0


# What was cached a moment ago, read-ahead window included.
cdef struct Verdict:
    int64_t start
    int64_t stop
    int64_t until_ns


cdef int is_cached(int fd, int64_t offset, int64_t size, int64_t file_size, int64_t window,
                   Verdict *verdict) noexcept nogil:
    """Whether a range can be read without waiting: 1, 0, or -1 and errno.

    All of its pages have to be in the page cache; and as many behind it as the kernel would read ahead. For a page may
    carry the marker at which the kernel reads ahead (whoever has read the file before has left it there), and that
    waits when the device's queue is full, also with RWF_NOWAIT and POSIX_FADV_RANDOM; but not when there is nothing to
    be read within the window (mm/readahead.c, page_cache_async_ra; seen on Linux 6.18).
    """
    cdef int64_t stop = offset + size
    cdef int64_t end = file_size if window > file_size - stop else stop + window
    cdef int64_t now
    # The range itself is asked for each time, and first: it is small, and a miss should cost little.
    cdef int result = all_cached(fd, offset, size)
    if result != 1 or end <= stop:
        return result
    now = now_ns()
    if now < verdict.until_ns and offset >= verdict.start and end <= verdict.stop:
        return 1
    result = all_cached(fd, stop, end - stop)
    if result == 1:
        verdict.start, verdict.stop, verdict.until_ns = offset, end, now + VERDICT_NS
    return result


cdef int64_t read_pieces(int fd, char *buffer, int64_t offset, int64_t size, int64_t file_size, int64_t window,
                         Verdict *verdict, int *error) noexcept nogil:
    """Read what is cached from the beginning of the range on; the number of bytes."""
    cdef int64_t count = 0, piece = size
    cdef ssize_t got
    cdef int cached
    error[0] = 0
    while count < size:
        if piece > size - count:
            piece = size - count
        cached = is_cached(fd, offset + count, piece, file_size, window, verdict)
        if cached == 0 and piece > PIECE:
            piece = PIECE  # not all of it; see how far it goes
            continue
        if cached <= 0:
            error[0] = errno if cached < 0 else EAGAIN
            break
        got = pread_now(fd, buffer + count, <size_t>piece, offset + count)
        if got <= 0:
            # 0 is no end of the file but a miss: Linux 5.9 and 5.10 said so instead of EAGAIN.
            error[0] = errno if got < 0 and errno != EINTR else EAGAIN
            break
        count += got
        if got < piece:
            error[0] = EAGAIN
            break
    return count


@cython.final
cdef class Tally:
    """What was read inline; kept here because a Python integer costs as much as a system call.

    Attributes:
        hits: Reads of which everything was in the page cache.
        partial: Reads of which the beginning was; the rest was read in a worker.
        misses: Reads of which nothing was.
        bytes: Bytes that were read inline.
        due: So much was read in a row that other greenlets should have their turn.
    """

    cdef readonly int64_t hits, partial, misses, bytes
    cdef readonly bint due
    cdef int64_t _spent

    cdef void spend(self, int64_t count) noexcept:
        self.bytes += count
        self._spent += count + COST_OF_READ
        if self._spent >= TURN:
            self.due = True

    cdef void hit(self, int64_t count) noexcept:
        self.hits += 1
        self.spend(count)

    cdef void miss(self, int64_t count) noexcept:
        self.spend(count)
        if count:
            self.partial += 1
        else:
            self.misses += 1

    def turn(self):
        """Other greenlets have their turn now: begin anew."""
        self._spent = 0
        self.due = False


cdef bytes shortened(bytes data, int64_t count):
    return data if count == len(data) else data[:count]


@cython.final
cdef class CachedFile:
    """A file that was opened from the dentry cache. Its owner takes the descriptor, else it is closed with it.

    Attributes:
        prefix: What was read of it from the beginning of the range; empty if nothing.
        error: errno of what ended that before the end of the range (EAGAIN: it is not cached), 0 if nothing did.
    """

    cdef int _descriptor
    cdef Found _found
    cdef readonly bytes prefix
    cdef readonly int error

    def __cinit__(self):
        self._descriptor = -1

    def take_descriptor(self):
        """Hand the descriptor over to the caller, who closes it; -1 when the file was closed already."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    @property
    def stat(self):
        """(size in bytes, mtime in nanoseconds, inode, device), as `Job.stat` has it."""
        mtime_ns = <object>self._found.mtime_sec * 1000000000 + <object>self._found.mtime_nsec
        return self._found.size, mtime_ns, self._found.inode, self._found.device

    def __dealloc__(self):
        if self._descriptor >= 0:
            c_close(self._descriptor)


cdef object encoded(path):
    """The path as bytes, None where only the slow way can say what is wrong with it."""
    cdef bytes name
    if type(path) is str:
        try:
            name = path.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return None
    elif type(path) is bytes:
        name = path
    else:
        return None
    if not name or name[0] == c"/" or b"\0" in name:
        return None
    return name


def read_path(int root_fd, path, Py_ssize_t offset, size, Py_ssize_t limit, Py_ssize_t window, int flags,
              Tally tally not None):
    """Read a range of a file if all of it is cached: open, stat, read, close. Microseconds; never waits for the device.

    Args:
        root_fd: Descriptor of the directory that the path is relative to.
        path: The file, str or bytes.
        offset: First byte.
        size: Bytes at most; None for all.
        limit: Bytes to read in one call at most.
        window: Bytes after the range that have to be cached as well: as far as the kernel reads ahead.
        flags: O_NOATIME, or 0 on a file system that keeps no access times.
        tally: Counts it.

    Returns:
        The bytes, up to the end of the range or the file; or a `CachedFile`, whose `prefix` is what was read before
        something was not cached (or the limit was reached); or errno as an int when nothing could be opened.
    """
    cdef Found found
    cdef Verdict verdict
    cdef int fd = -1, error
    cdef int64_t wanted, count
    cdef bytes buffer
    verdict.until_ns = 0
    cdef Py_ssize_t most = PY_SSIZE_T_MAX if size is None else size  # the C type that refuses floats (__index__)
    name = encoded(path)
    if name is None or offset < 0 or most < 0 or size is not None and most > INT64_MAX - offset:
        return NOT_HERE
    error = open_regular(root_fd, PyBytes_AS_STRING(name), flags, &fd, &found)
    if error:
        return error
    wanted = found.size - offset
    if wanted > most:
        wanted = most
    if wanted <= 0:
        c_close(fd)
        tally.hit(0)
        return b""
    buffer = b""
    count = 0
    if wanted <= limit:
        buffer = PyBytes_FromStringAndSize(NULL, wanted)
        count = read_pieces(fd, PyBytes_AS_STRING(buffer), offset, wanted, found.size, window, &verdict, &error)
        if count == wanted:
            c_close(fd)
            tally.hit(count)
            return buffer
        tally.miss(count)
    return new_file(fd, &found, shortened(buffer, count), error)


cdef CachedFile new_file(int fd, Found *found, bytes prefix, int error):
    cdef CachedFile file = CachedFile()
    if fd >= 0:
        no_read_ahead(fd)
    file._descriptor = fd
    file._found = found[0]
    file.prefix = prefix
    file.error = error
    return file


def open_path(int root_fd, path, int flags, Py_ssize_t offset, Py_ssize_t size, Py_ssize_t limit, Py_ssize_t window,
              Tally tally not None):
    """Open a regular file from the dentry cache and read a first piece of it.

    Args:
        size: Bytes at most; 0 for none. A file that ends within a piece from its beginning is closed already, if all of
            it is cached.
        tally: Counts the piece, if there is one.
        root_fd, path, flags, offset, limit, window: As `read_path` has them.

    Returns:
        A `CachedFile`, or errno as an int.
    """
    cdef Found found
    cdef Verdict verdict
    cdef int fd = -1, error
    cdef int64_t wanted, count
    cdef bytes buffer = b""
    verdict.until_ns = 0
    name = encoded(path)
    if name is None or offset < 0 or size < 0 or size > INT64_MAX - offset:
        return NOT_HERE
    error = open_regular(root_fd, PyBytes_AS_STRING(name), flags, &fd, &found)
    if error:
        return error
    wanted = found.size - offset
    if wanted > size:
        wanted = size
    if wanted > limit:
        wanted = limit
    if wanted > 0:
        buffer = PyBytes_FromStringAndSize(NULL, wanted)
        count = read_pieces(fd, PyBytes_AS_STRING(buffer), offset, wanted, found.size, window, &verdict, &error)
        if count < wanted:
            tally.miss(count)
            buffer = shortened(buffer, count)
        else:
            tally.hit(count)
            if offset == 0 and count == found.size:
                c_close(fd)
                fd = -1
    return new_file(fd, &found, buffer, error)


def read_whole(int root_fd, path, int flags, Py_ssize_t largest, Py_ssize_t window, Tally tally not None):
    """Read a whole file if that can be done at once: it is cached, and not larger than `largest` bytes.

    Only then it is counted. Other parameters as `read_path` has them.

    Returns:
        A `CachedFile` that is closed, its `prefix` being all of it; or None.
    """
    cdef Found found
    cdef Verdict verdict
    cdef int fd = -1, error
    cdef int64_t count
    cdef bytes buffer
    verdict.until_ns = 0
    name = encoded(path)
    if name is None or open_regular(root_fd, PyBytes_AS_STRING(name), flags, &fd, &found):
        return None
    if found.size > largest:
        c_close(fd)
        return None
    try:
        buffer = PyBytes_FromStringAndSize(NULL, found.size)
        count = read_pieces(fd, PyBytes_AS_STRING(buffer), 0, found.size, found.size, window, &verdict, &error)
    finally:
        c_close(fd)
    if count < found.size:
        return None
    tally.hit(count)
    return new_file(-1, &found, buffer, 0)


@cython.final
cdef class CachedReader:
    """Reads what is cached through an open descriptor of a regular file that has O_NOATIME. The descriptor is borrowed.

    Args:
        descriptor: The descriptor.
        file_size: Size of the file as far as it is known. Of one that has become shorter no more pages are cached.
        limit, window: See `read_path`.
        tally: Counts what is read.
    """

    cdef int _descriptor
    cdef int64_t _file_size
    cdef int64_t _limit
    cdef int64_t _window
    cdef Verdict _verdict
    cdef Tally _tally

    def __cinit__(self, int descriptor, int64_t file_size, int64_t limit, int64_t window, Tally tally not None):
        self._descriptor, self._file_size, self._limit, self._window = descriptor, file_size, limit, window
        self._tally = tally

    def read(self, Py_ssize_t offset=0, size=None):
        """Read a range. Microseconds; never waits for the device.

        Args:
            offset: First byte.
            size: Bytes at most; None for all that the file had when it was opened.

        Returns:
            The bytes, when they go to the end of the range or of the file. Else (bytes, errno): what was read before
            something was not cached (EAGAIN), or something else was in the way; 0 when nothing was, but others should
            have their turn now (`Tally.due`). None when nothing was tried: the range is no range, or beyond the limit.
        """
        cdef Found found
        cdef int error = 0
        cdef int64_t count, file_size = self._file_size
        cdef bytes buffer
        cdef int64_t wanted = file_size - offset if size is None else <Py_ssize_t>size
        if offset < 0 or wanted < 0 or wanted > self._limit or wanted > INT64_MAX - offset:
            return None
        if wanted > file_size - offset:
            if stat_file(self._descriptor, &found.mode, &found.device, &found.inode, &found.size, &found.mtime_sec,
                         &found.mtime_nsec, &found.links) != 0:
                return b"", errno
            file_size = found.size
            if wanted > file_size - offset:
                wanted = file_size - offset
        if wanted <= 0:
            self._tally.hit(0)
            return b""
        buffer = PyBytes_FromStringAndSize(NULL, wanted)
        count = read_pieces(self._descriptor, PyBytes_AS_STRING(buffer), offset, wanted, file_size, self._window,
                            &self._verdict, &error)
        if count == wanted:
            self._tally.hit(count)
            return (buffer, 0) if self._tally.due else buffer
        self._tally.miss(count)
        return shortened(buffer, count), error


def unlinked(int descriptor):
    """Whether the file has no name any more: closing the last descriptor deletes it, which is no work for the hub."""
    cdef Found found
    return stat_file(descriptor, &found.mode, &found.device, &found.inode, &found.size, &found.mtime_sec,
                     &found.mtime_nsec, &found.links) != 0 or not found.links


def file_system(int descriptor):
    """(type, mount flags) of the file system, as statfs(2) has them. Asks the file system, and may block.

    Raises:
        OSError: What fstatfs(2) says.
    """
    cdef int64_t kind = 0, flags = 0
    cdef int error
    with nogil:
        # Whoever takes the GIL back may lose errno.
        error = errno if statfs_of(descriptor, &kind, &flags) != 0 else 0
    if error:
        raise OSError(error, "fstatfs failed")
    return kind, flags


def kernel_lacks(int root_fd):
    """Which system call the kernel (or a seccomp filter) refuses, and with which errno; None when all are there."""
    cdef char byte[1]
    cdef int fd = open_file(root_fd, b".", 0)
    if fd >= 0:
        c_close(fd)
    elif errno != EAGAIN:
        return "openat2(RESOLVE_CACHED)", errno
    # No descriptor has the number -1: whoever knows the call says EBADF.
    if all_cached(-1, 0, 1) >= 0 or errno != EBADF:
        return "cachestat", errno
    if pread_now(-1, byte, 1, 0) >= 0 or errno != EBADF:
        return "preadv2(RWF_NOWAIT)", errno
    return None
