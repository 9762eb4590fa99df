# cython: language_level=3, freethreading_compatible=True, embedsignature=True
"""Native threads that make visits to a disk and never touch Python, and so never wait for the GIL.

A thread takes the next visit from a queue, runs `visit_disk`, puts it on the list of completions and, when that list
was empty, writes to an eventfd(2). Whoever owns the `Engine` waits for the eventfd in its event loop and collects what
is there: one wake-up for any number of visits.

Nothing in this module knows gevent.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport ETIMEDOUT, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close as c_close, getpid

from ._syscalls cimport Job, Visit, visit_disk

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <limits.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <unistd.h>

    static int diskread_new_eventfd(void) { return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC); }

    /* Neither can fail in a way that matters: a full counter (EAGAIN) is readable already, an empty one was read. */
    static void diskread_ring(int fd) {
        uint64_t one = 1;
        while (write(fd, &one, sizeof one) < 0 && errno == EINTR) {}
    }
    static void diskread_hush(int fd) {
        uint64_t count;
        while (read(fd, &count, sizeof count) < 0 && errno == EINTR) {}
    }

    static int diskread_init_locks(pthread_mutex_t *mutex, pthread_cond_t *wake) {
        pthread_condattr_t attributes;
        int error = pthread_mutex_init(mutex, NULL);
        if (error) return error;
        error = pthread_condattr_init(&attributes);
        if (!error) {
            error = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
            if (!error) error = pthread_cond_init(wake, &attributes);
            pthread_condattr_destroy(&attributes);
        }
        if (error) pthread_mutex_destroy(mutex);
        return error;
    }

    /* A detached thread that no signal is delivered to: handlers belong to the threads of Python. */
    static int diskread_start_thread(size_t stack_size, void *(*work)(void *), void *argument) {
        pthread_attr_t attributes;
        pthread_t thread;
        sigset_t all, before;
        long least = sysconf(_SC_THREAD_STACK_MIN);  /* with AVX-512 more than PTHREAD_STACK_MIN (glibc 2.34) */
        long page = sysconf(_SC_PAGESIZE);
        if (stack_size < (size_t)PTHREAD_STACK_MIN) stack_size = PTHREAD_STACK_MIN;
        if (least > 0 && stack_size < (size_t)least) stack_size = least;
        stack_size = (stack_size + page - 1) / page * page;
        int error = pthread_attr_init(&attributes);
        if (error) return error;
        error = pthread_attr_setstacksize(&attributes, stack_size);
        if (!error) error = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        if (!error) {
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
            error = pthread_create(&thread, &attributes, work, argument);
            pthread_sigmask(SIG_SETMASK, &before, NULL);
        }
        pthread_attr_destroy(&attributes);
        return error;
    }

    static void diskread_name_thread(void) { pthread_setname_np(pthread_self(), "diskread"); }
    """
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t *mutex) nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) nogil
    int pthread_mutex_destroy(pthread_mutex_t *mutex) nogil
    int pthread_cond_timedwait(pthread_cond_t *wake, pthread_mutex_t *mutex, const timespec *ends) nogil
    int pthread_cond_signal(pthread_cond_t *wake) nogil
    int pthread_cond_broadcast(pthread_cond_t *wake) nogil
    int pthread_cond_destroy(pthread_cond_t *wake) nogil
    int new_eventfd "diskread_new_eventfd"() nogil
    void ring "diskread_ring"(int fd) nogil
    void hush "diskread_hush"(int fd) nogil
    int init_locks "diskread_init_locks"(pthread_mutex_t *mutex, pthread_cond_t *wake) nogil
    int start_thread "diskread_start_thread"(size_t stack_size, void *(*work)(void *) noexcept nogil,
                                             void *argument) nogil
    void name_thread "diskread_name_thread"() nogil


# To wake a thread costs more than a cached read does, and the hub should not pay it for each: only one is woken at a time,
# and wakes the next one, before it goes to the disk, if there is more to do. A thread that has finished takes the next
# visit without a sleep. So, always: if the queue is not empty, all threads are at work, or one is being woken.
#
# What the threads share with the Engine. It belongs to all of them, because a thread that is stuck in the kernel cannot
# be waited for: whoever leaves last frees it. Everything below `mutex` is touched only by whoever holds it.
cdef struct Shared:
    int eventfd
    int64_t idle_ns
    size_t stack_size
    int limit
    pthread_mutex_t mutex
    pthread_cond_t wake
    int references          # threads, and the Engine
    int threads
    int sleeping            # threads that wait for something in the queue
    bint waking             # one of them has been woken and has not come yet
    int unfinished          # visits in the queue or in a thread
    bint closed
    Visit *queue            # first of a linked list (Visit.next), and its last
    Visit *queue_end
    Visit *done
    Visit *done_end


cdef void append(Visit **first, Visit **last, Visit *visit) noexcept nogil:
    visit.next = NULL
    if first[0] == NULL:
        first[0] = visit
    else:
        last[0].next = visit
    last[0] = visit


cdef void let_go(Shared *shared) noexcept nogil:
    """Give up one reference and the mutex, which the caller holds."""
    shared.references -= 1
    cdef bint last = shared.references == 0
    pthread_mutex_unlock(&shared.mutex)
    if last:
        pthread_cond_destroy(&shared.wake)
        pthread_mutex_destroy(&shared.mutex)
        c_close(shared.eventfd)
        free(shared)


cdef bint await_visit(Shared *shared) noexcept nogil:
    """Wait for something in the queue; False when the thread is to leave. The caller holds the mutex."""
    cdef timespec ends
    cdef bint late
    if shared.queue != NULL:
        return True
    clock_gettime(CLOCK_MONOTONIC, &ends)  # cannot fail with a valid clock and pointer
    ends.tv_sec += (ends.tv_nsec + shared.idle_ns) // 1_000_000_000
    ends.tv_nsec = (ends.tv_nsec + shared.idle_ns) % 1_000_000_000
    while not shared.closed:
        shared.sleeping += 1
        late = pthread_cond_timedwait(&shared.wake, &shared.mutex, &ends) == ETIMEDOUT
        shared.sleeping -= 1
        shared.waking = False  # whoever was meant: at worst one more is woken
        if shared.queue != NULL:
            return True
        if late:
            return False
    return False


cdef void wake_one(Shared *shared) noexcept nogil:
    """Have somebody come for what is in the queue. The caller holds the mutex."""
    if shared.queue != NULL and shared.sleeping and not shared.waking:
        shared.waking = True
        pthread_cond_signal(&shared.wake)


cdef void *work(void *argument) noexcept nogil:
    """The life of a thread."""
    cdef Shared *shared = <Shared *>argument
    cdef Visit *visit
    cdef bint first
    name_thread()
    pthread_mutex_lock(&shared.mutex)
    while await_visit(shared):
        visit = shared.queue
        shared.queue = visit.next
        wake_one(shared)
        pthread_mutex_unlock(&shared.mutex)
        visit_disk(visit)
        pthread_mutex_lock(&shared.mutex)
        shared.unfinished -= 1
        first = shared.done == NULL
        append(&shared.done, &shared.done_end, visit)
        # From here on the visit may be gone. The eventfd is not: this thread has a reference to what owns it.
        if first:
            pthread_mutex_unlock(&shared.mutex)
            ring(shared.eventfd)
            pthread_mutex_lock(&shared.mutex)
    shared.threads -= 1
    let_go(shared)
    return NULL


@cython.final
cdef class Engine:
    """Native threads for the jobs of one disk.

    Threads are started on demand and leave when they have been idle. None of its methods waits for the disk. It belongs
    to the process that made it: a forked child, to which no thread was copied, cannot use it and leaves it alone.

    A Job that is inside when the Engine is let go of comes to its end in its thread, but nobody collects it: its memory
    is lost then. Keep the Engine until `completed` has returned everything that was submitted.

    Args:
        threads: Threads at most; more jobs than that wait in line.
        idle: Seconds after which a thread without work leaves; at most a billion.
        stack_size: Bytes of stack of each thread; the system's minimum (PTHREAD_STACK_MIN) where that is more.

    Raises:
        ValueError: Not a positive number of threads or seconds, or too many.
        OSError: No descriptor for the eventfd.
        MemoryError: No memory.
    """

    cdef Shared *_shared
    cdef int _process

    def __cinit__(self, int threads, double idle, size_t stack_size=128 * 1024):
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        if not 0 < idle <= 1e9:
            raise ValueError(f"idle must be more than 0 and at most 1000000000 seconds, not {idle}")
        self._process = getpid()
        cdef Shared *shared = <Shared *>calloc(1, sizeof(Shared))
        if shared == NULL:
            raise MemoryError("no memory for an engine")
        shared.eventfd = new_eventfd()
        cdef int error = errno
        if shared.eventfd < 0:
            free(shared)
            raise _os_error(error)
        error = init_locks(&shared.mutex, &shared.wake)
        if error:
            c_close(shared.eventfd)
            free(shared)
            raise _os_error(error)
        shared.idle_ns = <int64_t>(idle * 1e9)
        shared.stack_size = stack_size
        shared.limit = threads
        shared.references = 1
        self._shared = shared

    def submit(self, Job job not None):
        """Put a Job in line for the next free thread, and start one if none is free. Never blocks.

        The Job belongs to the Engine until `completed` returns it.

        Raises:
            RuntimeError: The Job ran before or is running; the Engine is closed or another process's; or no thread can
                be started ("can't start new thread"). Nothing has happened to the Job then.
        """
        cdef Shared *shared = self._shared
        cdef int error = 0
        if self._process != getpid():
            raise RuntimeError("the engine belongs to another process")
        job.prepare()
        pthread_mutex_lock(&shared.mutex)
        cdef bint closed = shared.closed
        # Never in line behind a thread that may be stuck, as long as there may be another one.
        if not closed and shared.unfinished >= shared.threads and shared.threads < shared.limit:
            error = start_thread(shared.stack_size, work, shared)
            if not error:
                shared.threads += 1
                shared.references += 1
        if not closed and not error:
            Py_INCREF(job)
            job.visit.owner = <PyObject *>job
            shared.unfinished += 1
            append(&shared.queue, &shared.queue_end, &job.visit)
            wake_one(shared)
        pthread_mutex_unlock(&shared.mutex)
        if closed or error:
            job.unprepare()
            raise RuntimeError("the engine is closed" if closed else "can't start new thread")

    def completed(self):
        """Collect the jobs that are over, in the order of their ends; an empty list when there are none. Never blocks.

        Call it when `fileno` is readable. In a forked child nothing is ever completed.
        """
        cdef list jobs = []
        cdef Visit *visit
        cdef Job job
        if self._process != getpid():
            return jobs
        # In this order: whatever is completed in between is found, and rings once more at worst.
        hush(self._shared.eventfd)
        pthread_mutex_lock(&self._shared.mutex)
        visit = self._shared.done
        self._shared.done = NULL
        pthread_mutex_unlock(&self._shared.mutex)
        while visit != NULL:
            job = <Job>visit.owner
            visit = visit.next
            jobs.append(job)
            Py_DECREF(job)
        return jobs

    def fileno(self):
        """The eventfd(2) that is readable when jobs are over. It is the Engine's own: do not read, do not close it."""
        return self._shared.eventfd

    @property
    def threads(self):
        """Threads that are alive, idle ones included; 0 in a forked child."""
        if self._process != getpid():
            return 0
        pthread_mutex_lock(&self._shared.mutex)
        threads = self._shared.threads
        pthread_mutex_unlock(&self._shared.mutex)
        return threads

    def close(self):
        """Take no more jobs and let the threads go when the line is empty. Waits for none of them.

        What was submitted before is run and can be collected still.
        """
        if self._process != getpid():
            return
        pthread_mutex_lock(&self._shared.mutex)
        self._shared.closed = True
        pthread_cond_broadcast(&self._shared.wake)
        pthread_mutex_unlock(&self._shared.mutex)

    def __dealloc__(self):
        # In a forked child the mutex may be locked for ever, by a thread that is not there.
        if self._shared == NULL or self._process != getpid():
            return
        self.close()
        self.completed()
        pthread_mutex_lock(&self._shared.mutex)
        let_go(self._shared)


cdef _os_error(int error):
    import os
    return OSError(error, os.strerror(error))
