"""The C side of a visit to the disk: what an engine needs to run it without Python."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t


# Everything that one visit to the disk needs and everything that it found out. The part above the line is written
# before the visit starts and only read by it; the part below is written by the visit alone. `abandoned`, `state` and
# `progress_ns` are the fields that two threads may touch at the same time: they are only ever accessed atomically.
cdef struct Visit:
    const char *root        # directory to open when root_fd is -1, or NULL
    int root_fd             # directory that path is resolved under, or -1
    int knows_device        # root_device says which device the root has to be on
    const char *path        # file to open under root_fd, or NULL
    int descriptor          # open descriptor to use, or -1; afterwards: what is still open, or -1
    int borrowed            # the descriptor belongs to somebody else: never close it
    int close_mode          # see CloseMode in the .pyx
    char *buffer            # room for `size` bytes, owned by the Job
    size_t size
    int64_t offset
    int64_t read_ahead      # bytes behind the range that will be asked for next
    int64_t stall_ns
    int abandoned           # atomic
    int state               # atomic; see JobState in the .pyx
    PyObject *owner         # the engine's: the Job that this belongs to
    Visit *next             # the engine's: what comes after it in a line
    # ------------------------------------------------------------------
    int opened_root         # the descriptor of `root`, when this visit opened it, or -1
    uint64_t root_device    # the device of the root, when this visit opened it (before: that it has to be on)
    int error               # errno, or 0
    int close_error         # errno of close(2), or 0
    int step                # the step that failed, see Step in the .pyx
    int has_stat
    uint32_t mode
    uint64_t device
    uint64_t inode
    int64_t file_size
    int64_t mtime_sec
    int64_t mtime_nsec
    size_t count            # bytes read
    int quick               # the device was seen to be quick (before: when it was last asked)
    int64_t started_ns      # CLOCK_MONOTONIC
    int64_t finished_ns
    int64_t progress_ns     # CLOCK_MONOTONIC when a part of the bytes had come; atomic, anybody may look at any time


cdef void visit_disk(Visit *visit) noexcept nogil


cdef class Job:
    cdef Visit visit
    cdef bytes _root
    cdef bytes _path
    cdef bytes _buffer

    cdef int prepare(self) except -1
    cdef void unprepare(self) noexcept
