# cython: language_level=3, freethreading_compatible=True, embedsignature=True
"""The blocking system calls of a disk read, made with the GIL released.

A `Job` is one visit to the disk: everything that it needs goes in as data, everything that it found out comes back as
data, errors included. `Job.run` makes all its system calls in one section without the GIL; the C function behind it,
`visit_disk`, touches no Python object at all.

Nothing in this module knows gevent. Calling any of these functions on the hub's thread blocks the hub for as long as
the disk takes: that is what `diskread.workers` is there to prevent.
"""

from operator import index

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, EISDIR, EINVAL, ENOMEM, ESTALE, errno
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec
from posix.types cimport off_t

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident()


cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* openat2(2) is Linux 5.6 and has no wrapper in glibc before 2.43. The numbers below are its stable kernel ABI
       (linux/openat2.h), spelled out here because the header is missing on older build machines. */
    #ifndef SYS_openat2
    #define SYS_openat2 437
    #endif

    struct diskread_open_how { uint64_t flags; uint64_t mode; uint64_t resolve; };

    #define DISKREAD_RESOLVE_NO_XDEV        0x01
    #define DISKREAD_RESOLVE_NO_MAGICLINKS  0x02
    #define DISKREAD_RESOLVE_BENEATH        0x08

    _Static_assert(sizeof(off_t) == 8, "diskread needs 64-bit file offsets");

    /* O_NONBLOCK: opening a FIFO must not wait for its writer; regular files ignore it (open(2)).
       O_NOCTTY: opening a terminal must not make it ours. Both kinds of file are refused right after fstat. */
    static int diskread_open_beneath(int directory, const char *path) {
        struct diskread_open_how how = {
            .flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY,
            .mode = 0,
            .resolve = DISKREAD_RESOLVE_BENEATH | DISKREAD_RESOLVE_NO_MAGICLINKS | DISKREAD_RESOLVE_NO_XDEV,
        };
        return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
    }

    static int diskread_open_root(const char *path) {
        return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    }

    static int diskread_fstat(int descriptor, uint32_t *mode, uint64_t *device, uint64_t *inode, int64_t *size,
                              int64_t *mtime_sec, int64_t *mtime_nsec) {
        struct stat result;
        if (fstat(descriptor, &result) != 0) return -1;
        *mode = result.st_mode;
        *device = result.st_dev;
        *inode = result.st_ino;
        *size = result.st_size;
        *mtime_sec = result.st_mtim.tv_sec;
        *mtime_nsec = result.st_mtim.tv_nsec;
        return 0;
    }

    static int diskread_device(int descriptor, uint64_t *device) {
        struct stat result;
        if (fstat(descriptor, &result) != 0) return -1;
        *device = result.st_dev;
        return 0;
    }

    static int diskread_is_regular(uint32_t mode) { return S_ISREG(mode); }
    static int diskread_is_directory(uint32_t mode) { return S_ISDIR(mode); }

    /* The kernel's own read-ahead is switched off, and asked for where it is wanted: what it reads ahead for a caller
       that has left, half a MiB at a time, keeps a slow disk busy with what nobody waits for. */
    static void diskread_no_read_ahead(int descriptor) {
        int result = posix_fadvise(descriptor, 0, 0, POSIX_FADV_RANDOM);
        (void)result; /* an advice */
    }
    static void diskread_read_ahead(int descriptor, int64_t offset, int64_t size) {
        int result = posix_fadvise(descriptor, offset, size, POSIX_FADV_WILLNEED);
        (void)result;
    }

    static int diskread_load(int *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
    static void diskread_store(int *flag, int value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
    static int64_t diskread_load_time(int64_t *time) { return __atomic_load_n(time, __ATOMIC_RELAXED); }
    static void diskread_store_time(int64_t *time, int64_t value) { __atomic_store_n(time, value, __ATOMIC_RELAXED); }
    static int diskread_advance(int *flag, int from, int to) {
        return __atomic_compare_exchange_n(flag, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    """
    int open_beneath "diskread_open_beneath"(int directory, const char *path) nogil
    int open_root "diskread_open_root"(const char *path) nogil
    int fstat_into "diskread_fstat"(int descriptor, uint32_t *mode, uint64_t *device, uint64_t *inode, int64_t *size,
                                    int64_t *mtime_sec, int64_t *mtime_nsec) nogil
    int device_of "diskread_device"(int descriptor, uint64_t *device) nogil
    bint is_regular "diskread_is_regular"(uint32_t mode) nogil
    bint is_directory "diskread_is_directory"(uint32_t mode) nogil
    void no_read_ahead "diskread_no_read_ahead"(int descriptor) nogil
    void ask_ahead "diskread_read_ahead"(int descriptor, int64_t offset, int64_t size) nogil
    int load "diskread_load"(int *flag) nogil
    void store "diskread_store"(int *flag, int value) nogil
    int64_t load_time "diskread_load_time"(int64_t *time) nogil
    void store_time "diskread_store_time"(int64_t *time, int64_t value) nogil
    bint advance "diskread_advance"(int *flag, int before, int after) nogil
    ssize_t c_pread "pread"(int descriptor, void *buffer, size_t size, off_t offset) nogil
    int c_close "close"(int descriptor) nogil

cdef extern from "_page_cache.h":
    int all_cached "diskread_all_cached"(int descriptor, int64_t offset, int64_t size) nogil


# CloseMode: when the visit closes the descriptor that it opened or was given.
cpdef enum CloseMode:
    CLOSE_ALWAYS = 0    # at the end of the visit
    CLOSE_AT_EOF = 1    # when the visit read up to the end of the file; else it stays open
    CLOSE_NEVER = 2     # it stays open, unless the visit failed or was abandoned after it had opened it

# Step: which part of the visit failed.
cpdef enum Step:
    STEP_NONE = 0
    STEP_STALL = 1      # nanosleep(2)
    STEP_ROOT = 2       # open(2) of the root directory
    STEP_OPEN = 3       # openat2(2) of the file
    STEP_STAT = 4       # fstat(2)
    STEP_TYPE = 5       # the file is not a regular file
    STEP_READ = 6       # pread(2)
    STEP_MEMORY = 7     # no memory for the buffer
    STEP_ABANDONED = 8  # nobody waits for the result any more

cdef enum JobState:
    REFUSED = 0     # its parameters were wrong: nothing but zeros in it (tp_alloc), and nothing to clean up
    NEW = 1
    RUNNING = 2
    FINISHED = 3

# Bytes of one pread(2). A large read makes progress that can be seen in between: on a disk that is slow, but not stuck,
# eight reads of some MiB would complete nothing for minutes. As much as the kernel reads ahead by default (128 KiB,
# /sys/block/*/queue/read_ahead_kb): less would cost more calls and gain nothing.
cdef size_t MAX_READ = 128 * 1024

# Read-ahead within a range of several such pieces, and behind the range when its caller will go on there: so many bytes,
# and only while the disk is seen to bring a piece in this time (from the page cache it comes quickly from any disk).
cdef int64_t READ_AHEAD = 1024 * 1024
cdef int64_t QUICK_NS = 50_000_000
cdef int MAX_RESOLVE_ATTEMPTS = 64

cdef double MAX_STALL = 1e9  # seconds; keeps the arithmetic in nanoseconds far from overflow


cdef int64_t now_ns() noexcept nogil:
    # CLOCK_MONOTONIC with a valid pointer cannot fail (clock_gettime(2)); 0 marks the impossible.
    cdef timespec now
    if clock_gettime(CLOCK_MONOTONIC, &now) != 0:
        return 0
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef int sleep_ns(int64_t duration, timespec *remaining) noexcept nogil:
    """Sleep once; -1 and errno when it failed. On EINTR `remaining` says how long is left."""
    cdef timespec wanted
    wanted.tv_sec = duration // 1_000_000_000
    wanted.tv_nsec = duration % 1_000_000_000
    return nanosleep(&wanted, remaining)


cdef int fail(Visit *visit, int step, int error) noexcept nogil:
    visit.step = step
    visit.error = error
    return -1


cdef bint given_up(Visit *visit) noexcept nogil:
    return load(&visit.abandoned) != 0


cdef int do_stall(Visit *visit) noexcept nogil:
    cdef int64_t left = visit.stall_ns
    cdef timespec remaining
    while left > 0 and sleep_ns(left, &remaining) != 0:
        if errno != EINTR:
            return fail(visit, STEP_STALL, errno)
        left = <int64_t>remaining.tv_sec * 1_000_000_000 + remaining.tv_nsec
    return 0


cdef int do_open_root(Visit *visit) noexcept nogil:
    """Open the root and see that it is on the device that it was on: an empty mount point is no empty disk."""
    cdef uint64_t device = 0
    while True:
        visit.opened_root = open_root(visit.root)
        if visit.opened_root >= 0:
            break
        if errno != EINTR or given_up(visit):
            return fail(visit, STEP_ROOT, errno)
    if device_of(visit.opened_root, &device) != 0:
        return fail(visit, STEP_ROOT, errno)
    if visit.knows_device and device != visit.root_device:
        return fail(visit, STEP_ROOT, ESTALE)
    visit.root_device = device
    visit.root_fd = visit.opened_root
    return 0


cdef int do_open(Visit *visit) noexcept nogil:
    cdef int attempts = 0
    if visit.root_fd < 0 and do_open_root(visit) != 0:
        return -1
    while True:
        visit.descriptor = open_beneath(visit.root_fd, visit.path)
        if visit.descriptor >= 0:
            no_read_ahead(visit.descriptor)
            return 0
        # EAGAIN: a rename or mount raced with the resolution of "..", which RESOLVE_BENEATH cannot judge then;
        # openat2(2) says to try again. Bounded, so that somebody who renames in a loop cannot hold the thread.
        attempts += 1
        if errno != EINTR and (errno != EAGAIN or attempts >= MAX_RESOLVE_ATTEMPTS) or given_up(visit):
            return fail(visit, STEP_OPEN, errno)


cdef int do_stat(Visit *visit) noexcept nogil:
    if fstat_into(visit.descriptor, &visit.mode, &visit.device, &visit.inode, &visit.file_size, &visit.mtime_sec,
                  &visit.mtime_nsec) != 0:
        return fail(visit, STEP_STAT, errno)
    visit.has_stat = 1
    if not is_regular(visit.mode):
        return fail(visit, STEP_TYPE, EISDIR if is_directory(visit.mode) else EINVAL)
    return 0


cdef int do_read(Visit *visit) noexcept nogil:
    """Read until `size` bytes are there or the file ends; a short read is continued."""
    cdef size_t wanted
    cdef ssize_t got
    cdef int64_t began = 0, at, ahead
    cdef bint cached = False
    cdef int64_t asked = visit.offset   # up to where read-ahead was asked for
    cdef int64_t end = visit.offset + <int64_t>visit.size
    if end <= INT64_MAX - visit.read_ahead:
        end += visit.read_ahead
    while visit.count < visit.size:
        wanted = visit.size - visit.count
        if wanted > MAX_READ:
            wanted = MAX_READ
        at = visit.offset + <int64_t>visit.count
        if end - visit.offset > <int64_t>MAX_READ:
            cached = all_cached(visit.descriptor, at, <int64_t>wanted) == 1
            began = now_ns()
        got = c_pread(visit.descriptor, visit.buffer + visit.count, wanted, visit.offset + <int64_t>visit.count)
        if got == 0:
            return 0
        if got > 0:
            visit.count += got
            if began:
                at += got
                if now_ns() - began >= QUICK_NS:
                    visit.quick = 0
                elif not cached:
                    visit.quick = 1
                if asked < at:
                    asked = at
                ahead = end - asked if end - asked < READ_AHEAD else READ_AHEAD
                if visit.quick and ahead > 0 and asked - at < READ_AHEAD // 2:
                    ask_ahead(visit.descriptor, asked, ahead)
                    asked += ahead
            if visit.count < visit.size:
                store_time(&visit.progress_ns, now_ns())
        elif errno != EINTR:
            return fail(visit, STEP_READ, errno)
        if visit.count < visit.size and given_up(visit):
            return fail(visit, STEP_ABANDONED, 0)
    return 0


cdef int do_steps(Visit *visit) noexcept nogil:
    if given_up(visit):
        return fail(visit, STEP_ABANDONED, 0)
    if do_stall(visit) != 0:
        return -1
    if given_up(visit):
        return fail(visit, STEP_ABANDONED, 0)
    if visit.path != NULL:
        if do_open(visit) != 0:
            return -1
        if given_up(visit):
            return fail(visit, STEP_ABANDONED, 0)
        if do_stat(visit) != 0:
            return -1
        if given_up(visit):
            return fail(visit, STEP_ABANDONED, 0)
    if visit.size > 0:
        return do_read(visit)
    return 0


cdef void do_close(Visit *visit) noexcept nogil:
    if visit.descriptor < 0 or visit.borrowed:
        return
    if visit.step == STEP_NONE and not given_up(visit):
        if visit.close_mode == CLOSE_NEVER:
            return
        if visit.close_mode == CLOSE_AT_EOF and visit.offset + <int64_t>visit.count < visit.file_size:
            return
    # Never repeated: Linux frees the descriptor even when close(2) says EINTR. A failed close of a descriptor that
    # was only read from loses nothing, so it is kept apart from the error of the read.
    if c_close(visit.descriptor) != 0:
        visit.close_error = errno
    visit.descriptor = -1


cdef void visit_disk(Visit *visit) noexcept nogil:
    """The whole visit: stall, open, stat, read, close. No Python, no exception, any thread.

    When there was no memory for the buffer (STEP_MEMORY) it is a visit all the same: to close what there is to close.
    """
    store_time(&visit.started_ns, now_ns())
    if visit.step == STEP_NONE:
        do_steps(visit)
    do_close(visit)
    store_time(&visit.finished_ns, now_ns())
    store(&visit.state, FINISHED)


cdef int check_range(offset, size) except -1:
    if not 0 <= offset <= INT64_MAX:
        raise ValueError(f"offset must be between 0 and {INT64_MAX} bytes, not {offset}")
    if not 0 <= size <= INT64_MAX - offset:
        raise ValueError(f"size must be between 0 and {INT64_MAX - offset} bytes at offset {offset}, not {size}")
    return 0


@cython.final
cdef class Job:
    """One visit to the disk: wait (simulated), open, stat, read, close, in one section without the GIL.

    A Job runs once. Its buffer belongs to it alone, so a read that nobody waits for any more writes into memory that
    nobody else uses. All parameters are keywords.

    Args:
        root: Directory to resolve `path` under, opened by the visit itself when `root_fd` is -1.
        root_fd: Descriptor of that directory (an O_PATH descriptor does), or -1.
        root_device: Device number that the root has to be on when the visit opens it, else ESTALE; None for any.
        path: File to open, relative to the root: bytes without NUL. It is resolved by openat2(2) with
            RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS and RESOLVE_NO_XDEV: it cannot leave the root, nor the file
            system that the root is on. None when `descriptor` is given or when there is nothing to read.
        descriptor: Open descriptor to read from (and to close, unless `borrowed`), or -1.
        borrowed: The descriptor belongs to somebody else; the visit never closes it.
        offset: First byte to read.
        size: Bytes to read at most; the result is shorter only where the file ends.
        stall_ns: Simulated stall before everything else, in nanoseconds.
        read_ahead: Bytes behind the range that will be asked for next: the device is told to bring them, if it is quick.
        quick: Whether the device was seen to be quick, in the visit before.
        close_mode: CLOSE_ALWAYS, CLOSE_AT_EOF or CLOSE_NEVER. A visit that fails or is abandoned closes what it opened
            in any case.

    Raises:
        TypeError: A number that is no integer.
        ValueError: A negative or overflowing number, a path with a NUL byte, a path without a root, a path together
            with a descriptor.
    """

    def __cinit__(self, *, bytes root=None, int root_fd=-1, root_device=None, bytes path=None, int descriptor=-1,
                  bint borrowed=False, offset=0, size=0, stall_ns=0, int close_mode=CLOSE_ALWAYS,
                  read_ahead=0, bint quick=False):
        # Ranges are checked on Python integers, before anything is squeezed into a C type.
        offset, size, stall_ns, read_ahead = index(offset), index(size), index(stall_ns), index(read_ahead)
        check_range(offset, size)
        if not 0 <= read_ahead <= INT64_MAX:
            raise ValueError(f"read_ahead must be between 0 and {INT64_MAX} bytes, not {read_ahead}")
        if not 0 <= stall_ns <= MAX_STALL * 1e9:
            raise ValueError(f"stall_ns must be between 0 and {MAX_STALL * 1e9:.0f} nanoseconds, not {stall_ns}")
        if close_mode not in (CLOSE_ALWAYS, CLOSE_AT_EOF, CLOSE_NEVER):
            raise ValueError(f"close_mode must be CLOSE_ALWAYS, CLOSE_AT_EOF or CLOSE_NEVER, not {close_mode}")
        if path is not None:
            if b"\0" in path:
                raise ValueError("path must not contain a NUL byte")
            if root is None and root_fd < 0:
                raise ValueError("a path needs a root directory: pass root or root_fd")
            if descriptor >= 0:
                raise ValueError("pass a path or a descriptor, not both")
        elif descriptor < 0 and size > 0:
            raise ValueError("a read needs a path or a descriptor")
        if root is not None and b"\0" in root:
            raise ValueError("root must not contain a NUL byte")
        self._root = root
        self._path = path
        self.visit.opened_root = -1
        self.visit.root = <const char *>root if root is not None else NULL
        self.visit.root_fd = root_fd
        self.visit.knows_device = root_device is not None
        self.visit.root_device = 0 if root_device is None else root_device
        self.visit.path = <const char *>path if path is not None else NULL
        self.visit.descriptor = descriptor
        self.visit.borrowed = borrowed
        self.visit.close_mode = close_mode
        self.visit.read_ahead = read_ahead
        self.visit.quick = quick
        self.visit.offset = offset
        self.visit.size = size
        self.visit.stall_ns = stall_ns
        self.visit.state = NEW

    def run(self):
        """Make the visit. Blocks the calling native thread, GIL released, for as long as the disk takes.

        Errors come back in `error` and `step`, never as an exception.

        Raises:
            RuntimeError: The Job ran before or is running.
        """
        self.prepare()
        with nogil:
            visit_disk(&self.visit)

    cdef int prepare(self) except -1:
        """Get ready for `visit_disk`: with this the visit is running. Needs the GIL, as the buffer is Python's."""
        if not advance(&self.visit.state, NEW, RUNNING):
            raise RuntimeError("a Job runs once")
        if self.visit.size > 0 and not load(&self.visit.abandoned):
            try:
                self._buffer = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>self.visit.size)
                self.visit.buffer = PyBytes_AS_STRING(self._buffer)
            except (MemoryError, OverflowError):
                fail(&self.visit, STEP_MEMORY, ENOMEM)
        return 0

    cdef void unprepare(self) noexcept:
        """The visit that was prepared did not take place."""
        self._buffer = None
        self.visit.buffer = NULL
        self.visit.step = STEP_NONE
        self.visit.error = 0
        store(&self.visit.state, NEW)

    def abandon(self):
        """Tell the visit that nobody waits for it: it stops at the next step and closes what it opened.

        May be called from any thread at any time; never blocks. A system call that is under way is not interrupted.
        """
        store(&self.visit.abandoned, 1)

    def take_descriptor(self):
        """Hand the descriptor that the visit left open to the caller, who closes it; -1 when there is none.

        Before the visit: the descriptor that the Job was given to close. Never a borrowed one.

        Raises:
            RuntimeError: The Job is running: the descriptor is its own then.
        """
        if load(&self.visit.state) == RUNNING:
            raise RuntimeError("the Job is running")
        if self.visit.borrowed:
            return -1
        descriptor, self.visit.descriptor = self.visit.descriptor, -1
        return descriptor

    def take_root(self):
        """Hand the descriptor of the root directory, when this visit opened it, to the caller; -1 when there is none.

        Raises:
            RuntimeError: The Job is running: the descriptor is its own then.
        """
        if load(&self.visit.state) == RUNNING:
            raise RuntimeError("the Job is running")
        descriptor, self.visit.opened_root = self.visit.opened_root, -1
        return descriptor

    def take_data(self):
        """Hand the bytes that were read to the caller; empty when nothing was read. Never blocks."""
        cdef bytes data = self._buffer
        if load(&self.visit.state) != FINISHED or data is None:
            return b""
        self._buffer = None
        self.visit.buffer = NULL
        return data if self.visit.count == self.visit.size else data[:self.visit.count]

    @property
    def finished(self):
        """Whether the visit is over (also when it failed)."""
        return load(&self.visit.state) == FINISHED

    @property
    def abandoned(self):
        """Whether `abandon` was called."""
        return load(&self.visit.abandoned) != 0

    @property
    def error(self):
        """errno of the step that failed, 0 when none did."""
        return self.visit.error

    @property
    def close_error(self):
        """errno of close(2), 0 when it worked or was not needed."""
        return self.visit.close_error

    @property
    def step(self):
        """The step that failed (a STEP_ constant), STEP_NONE when none did."""
        return self.visit.step

    @property
    def size(self):
        """Bytes that the visit was asked for."""
        return self.visit.size

    @property
    def quick(self):
        """Whether the device was seen to be quick, as far as it was asked."""
        return self.visit.quick != 0

    @property
    def count(self):
        """Bytes read."""
        return self.visit.count

    @property
    def stat(self):
        """(size in bytes, mtime in nanoseconds, inode, device) of a file that the visit opened, else None."""
        if not self.visit.has_stat:
            return None
        # As Python objects: nanoseconds since 1970 exceed 64 bits in the year 2262, file systems go further.
        mtime_ns = <object>self.visit.mtime_sec * 1000000000 + <object>self.visit.mtime_nsec
        return self.visit.file_size, mtime_ns, self.visit.inode, self.visit.device

    @property
    def root_device(self):
        """Device number of the root directory that the visit opened, else what it was told."""
        return self.visit.root_device

    @property
    def seconds(self):
        """How long the visit took, 0.0 before its end."""
        cdef int64_t finished = load_time(&self.visit.finished_ns)
        return (finished - load_time(&self.visit.started_ns)) / 1e9 if finished else 0.0

    @property
    def progress(self):
        """When a part of the bytes had come last: CLOCK_MONOTONIC in seconds, 0.0 for never. At any time, any thread."""
        return load_time(&self.visit.progress_ns) / 1e9

    @property
    def started_ns(self):
        """CLOCK_MONOTONIC at the start of the visit in nanoseconds, 0 before. At any time, any thread."""
        return load_time(&self.visit.started_ns)

    @property
    def finished_ns(self):
        """CLOCK_MONOTONIC at the end of the visit in nanoseconds, 0 before. At any time, any thread."""
        return load_time(&self.visit.finished_ns)

    def __dealloc__(self):
        # O_PATH descriptors of a root hold no data of the disk: closing one cannot block (open(2), O_PATH).
        if self.visit.state != REFUSED and self.visit.opened_root >= 0:
            c_close(self.visit.opened_root)


cdef int64_t checked_stall(seconds) except -1:
    if not 0 <= seconds <= MAX_STALL:
        raise ValueError(f"seconds must be between 0 and {MAX_STALL:.0f}, not {seconds}")
    return <int64_t>(seconds * 1e9)


cdef bytes new_buffer(size, offset):
    size, offset = index(size), index(offset)
    check_range(offset, size)
    try:
        return PyBytes_FromStringAndSize(NULL, size)
    except OverflowError:
        raise MemoryError(f"no memory for {size} bytes") from None


cdef void start_read(Visit *visit, int descriptor, bytes buffer, offset) noexcept:
    memset(visit, 0, sizeof(Visit))
    visit.descriptor = descriptor
    visit.borrowed = 1
    visit.opened_root = -1
    visit.buffer = PyBytes_AS_STRING(buffer)
    visit.size = len(buffer)
    visit.offset = offset


cdef bytes end_read(Visit *visit, bytes buffer):
    if visit.error:
        raise OSError(visit.error, _strerror(visit.error))
    return buffer if visit.count == visit.size else buffer[:visit.count]


cdef str _strerror(int error):
    import os
    return os.strerror(error)


def pread(int descriptor, size, offset):
    """Read `size` bytes at `offset` with the GIL released, to the end of the range or of the file.

    Blocks the calling native thread, and on the hub's thread the hub, for as long as the disk takes.

    Args:
        descriptor: Open file descriptor.
        size: Bytes to read at most.
        offset: First byte to read.

    Returns:
        The bytes; fewer than `size` only where the file ends.

    Raises:
        TypeError: A size or offset that is no integer.
        ValueError: A negative or overflowing size or offset.
        MemoryError: No memory for `size` bytes.
        OSError: What pread(2) says. EINTR is retried and never seen.
    """
    cdef Visit visit
    cdef bytes buffer = new_buffer(size, offset)
    start_read(&visit, descriptor, buffer, offset)
    with nogil:
        do_read(&visit)
    return end_read(&visit, buffer)


def pread_holding_gil(int descriptor, size, offset):
    """The same as `pread`, with the GIL held: every thread of the process stands still while the disk takes its time.

    Never use this in a server. It is what a plain extension does, and it exists so that benchmarks can show the
    difference and tests can reproduce the problem. Parameters, result and errors are those of `pread`.
    """
    cdef Visit visit
    cdef bytes buffer = new_buffer(size, offset)
    start_read(&visit, descriptor, buffer, offset)
    do_read(&visit)
    return end_read(&visit, buffer)


def stall(seconds):
    """Sleep in nanosleep(2) with the GIL released: a simulated stall of a disk.

    Blocks the calling native thread, and on the hub's thread the hub. Signal handlers of Python run in between, so
    that Ctrl-C ends it in the main thread.

    Args:
        seconds: How long; 0 to a billion.

    Raises:
        ValueError: A negative or too large time.
        OSError: nanosleep(2) failed for another reason than a signal.
    """
    cdef int64_t left = checked_stall(seconds)
    cdef timespec remaining
    cdef int result, error
    while left > 0:
        with nogil:
            result = sleep_ns(left, &remaining)
            error = errno
        if result == 0:
            return
        if error != EINTR:
            raise OSError(error, _strerror(error))
        PyErr_CheckSignals()
        left = <int64_t>remaining.tv_sec * 1_000_000_000 + remaining.tv_nsec


def stall_holding_gil(seconds):
    """The same as `stall`, with the GIL held: every thread of the process stands still for that time.

    Never use this in a server: see `pread_holding_gil`. Parameters and errors are those of `stall`.
    """
    cdef int64_t left = checked_stall(seconds)
    cdef timespec remaining
    while left > 0 and sleep_ns(left, &remaining) != 0:
        if errno != EINTR:
            raise OSError(errno, _strerror(errno))
        PyErr_CheckSignals()
        left = <int64_t>remaining.tv_sec * 1_000_000_000 + remaining.tv_nsec


def thread_ident():
    """The number of the calling native thread, as `threading.get_ident` says where nobody has patched it.

    gevent and eventlet replace that function by one that tells greenlets apart. Never blocks.

    Returns:
        A number that no other living thread of the process has.
    """
    return PyThread_get_thread_ident()
