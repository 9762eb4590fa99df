# cython: language_level=3, freethreading_compatible=True, embedsignature=True
"""Opens the file of an object: in a worker, one stretch without the GIL instead of one for each system call; and again,
when it is the same as before, without asking the device.

A worker that takes the GIL back after each of the ten calls of Swift's own method gets it ten times from a busy hub, and
each time costs both of them a switch between threads: more than the calls themselves.

Only the usual case is dealt with: a directory with one file, whose attributes are small. Everything else, errors included,
is left to Swift's own method.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINVAL
from libc.stdint cimport int64_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <sys/xattr.h>
    #include <time.h>
    #include <unistd.h>
    #include "_open_cached.h"

    #ifndef RWF_NOWAIT
    #define RWF_NOWAIT 0x00000008 /* linux/fs.h */
    #endif
    #define DISKREAD_NAME 256 /* NAME_MAX and its end */
    #define DISKREAD_VALUE 8192
    #ifndef AT_STATX_DONT_SYNC
    #define AT_STATX_DONT_SYNC 0x4000
    #endif

    /* Stable kernel ABI, which glibc 2.30 gave a name (getdents(2)). */
    struct diskread_dirent { uint64_t d_ino; int64_t d_off; unsigned short d_reclen; unsigned char d_type; char d_name[]; };

    /* One version of a file or directory: no change of it leaves the time of its last change as it was. */
    struct diskread_version { uint64_t device; uint64_t inode; int64_t change_ns; int64_t size; };

    /* One state of an object: its directory has the same names, and its file the same content and attributes. */
    struct diskread_identity { struct diskread_version directory; struct diskread_version file; };

    struct diskread_object {
        int descriptor;
        int64_t opened_ns; /* CLOCK_REALTIME, before anything was looked at */
        struct diskread_identity identity;
        int64_t size;
        char name[DISKREAD_NAME];
        ssize_t metadata_size;
        char metadata[DISKREAD_VALUE];
        ssize_t checksum_size; /* -1: there is none */
        char checksum[64];
    };

    /* The name of the only entry of a directory; 0 when there is none, or more than one. */
    static int diskread_only_entry(int directory, char *name) {
        char buffer[4096] __attribute__((aligned(8)));
        int count = 0;
        for (;;) {
            long size = syscall(SYS_getdents64, directory, buffer, sizeof buffer);
            if (size < 0) return 0;
            if (size == 0) return count == 1;
            for (long at = 0; at < size;) {
                const struct diskread_dirent *entry = (const struct diskread_dirent *)(buffer + at);
                at += entry->d_reclen;
                if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
                size_t length = strlen(entry->d_name);
                if (++count > 1 || length >= DISKREAD_NAME) return 0;
                memcpy(name, entry->d_name, length + 1);
            }
        }
    }

    static ssize_t diskread_pread_cached(int descriptor, char *buffer, size_t size, int64_t offset) {
        struct iovec vector = {.iov_base = buffer, .iov_len = size};
        return preadv2(descriptor, &vector, 1, offset, RWF_NOWAIT);
    }

    /* 0, or -1 and errno. Nothing of it asks the device: all of it is in the inode. */
    static int diskread_version_of(int descriptor, struct diskread_version *version, uint32_t *mode) {
        struct statx found;
        unsigned int wanted = STATX_TYPE | STATX_INO | STATX_CTIME | STATX_SIZE;
        if (statx(descriptor, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, wanted, &found) != 0) return -1;
        if ((found.stx_mask & wanted) != wanted) {
            errno = EOPNOTSUPP;
            return -1;
        }
        version->device = makedev(found.stx_dev_major, found.stx_dev_minor);
        version->inode = found.stx_ino;
        version->change_ns = (int64_t)found.stx_ctime.tv_sec * 1000000000 + found.stx_ctime.tv_nsec;
        version->size = (int64_t)found.stx_size;
        *mode = found.stx_mode;
        return 0;
    }

    static int64_t diskread_now_ns(void) {
        struct timespec now;
        return clock_gettime(CLOCK_REALTIME, &now) != 0 ? 0 : (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    /* A descriptor, or -errno: EAGAIN when the device would have to be asked, ESTALE when it is not the same any more.
       The directory is not opened for reading: XFS would read it ahead then. */
    static int diskread_reopen_object(const char *path, const char *name, const struct diskread_identity *identity,
                                      int flags) {
        struct diskread_version found;
        uint32_t mode;
        int descriptor, error, directory = diskread_open_cached(AT_FDCWD, path, O_PATH | O_DIRECTORY, 0);
        if (directory < 0) return -errno;
        if (diskread_version_of(directory, &found, &mode) != 0) {
            error = errno;
            (void)close(directory);
            return -error;
        }
        if (memcmp(&found, &identity->directory, sizeof found) != 0) {
            (void)close(directory);
            return -ESTALE;
        }
        flags |= O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW;
        descriptor = diskread_open_cached(directory, name, flags, DISKREAD_NO_XDEV | DISKREAD_BENEATH);
        error = errno;
        (void)close(directory); /* which touches nothing: it is an O_PATH descriptor */
        if (descriptor < 0) return -error;
        error = diskread_version_of(descriptor, &found, &mode) != 0 ? errno : 0;
        if (!error && memcmp(&found, &identity->file, sizeof found) != 0) error = ESTALE;
        if (!error) return descriptor;
        (void)close(descriptor);
        return -error;
    }

    /* 1 when everything is as it usually is; the descriptor is open then, and closed otherwise. */
    static int diskread_open_object(const char *path, struct diskread_object *found) {
        uint32_t mode;
        found->opened_ns = diskread_now_ns();
        int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0) return 0;
        found->descriptor = -1;
        /* The versions are those of before anything is read: what changes afterwards has another one. */
        if (diskread_version_of(directory, &found->identity.directory, &mode) == 0 &&
            diskread_only_entry(directory, found->name))
            found->descriptor = openat(directory, found->name, O_RDONLY | O_NOCTTY | O_CLOEXEC);
        (void)close(directory);
        if (found->descriptor < 0) return 0;
        if (diskread_version_of(found->descriptor, &found->identity.file, &mode) != 0 || !S_ISREG(mode)) goto unusual;
        found->size = found->identity.file.size;
        found->metadata_size =
            fgetxattr(found->descriptor, "user.swift.metadata", found->metadata, sizeof found->metadata);
        if (found->metadata_size < 0) goto unusual;
        if (fgetxattr(found->descriptor, "user.swift.metadata1", NULL, 0) >= 0 || errno != ENODATA) goto unusual;
        found->checksum_size =
            fgetxattr(found->descriptor, "user.swift.metadata_checksum", found->checksum, sizeof found->checksum);
        if (found->checksum_size < 0 && errno != ENODATA) goto unusual;
        return 1;
    unusual:
        (void)close(found->descriptor);
        found->descriptor = -1;
        return 0;
    }
    """
    struct diskread_version:
        int64_t change_ns
    struct diskread_identity:
        diskread_version directory
        diskread_version file
    struct diskread_object:
        int descriptor
        int64_t opened_ns
        diskread_identity identity
        int64_t size
        char *name
        ssize_t metadata_size
        char *metadata
        ssize_t checksum_size
        char *checksum
    int c_open_object "diskread_open_object"(const char *path, diskread_object *found) nogil
    int c_reopen_object "diskread_reopen_object"(const char *path, const char *name, const diskread_identity *identity,
                                                 int flags) nogil
    ssize_t c_pread_cached "diskread_pread_cached"(int descriptor, char *buffer, size_t size, int64_t offset) nogil
    ssize_t c_pread "pread"(int descriptor, void *buffer, size_t size, int64_t offset) nogil
    int c_close "close"(int descriptor) nogil


def open_object(bytes directory not None, Py_ssize_t needed, Py_ssize_t first, int64_t settle_ns):
    """open_object(directory: bytes, needed: int, first: int, settle_ns: int) -> tuple[int, bytes, bytes, bytes | None, bytes, bytes | None] | None

    Open the only file of an object's directory and read what Swift keeps with it. Blocks the native thread, without the
    GIL, for as long as the device takes.

    Args:
        directory: The path of the directory.
        needed: Bytes to read from its beginning in the same visit, whatever that takes.
        first: Bytes to read from there if they are in the page cache; at least `needed`.
        settle_ns: Nanoseconds since the last change of directory and file for which there is no identity: a second
            change soon after the first may leave the same time (the kernel's clock ticks every 1 to 10 ms).

    Returns:
        Its descriptor (the caller's to close), name, metadata (user.swift.metadata), their checksum if they have one,
        its first bytes: fewer when it is shorter, or when they could not be read, and its identity for `reopen_object`.
        None when anything is unusual.

    Raises:
        MemoryError: there is no memory for the bytes.
    """
    cdef diskread_object found
    cdef const char *path = directory
    cdef int good
    cdef Py_ssize_t wanted, done = 0
    cdef ssize_t count
    cdef char *buffer
    cdef int64_t settled
    if b"\0" in directory:
        return None
    with nogil:
        good = c_open_object(path, &found)
    if not good:
        return None
    try:
        wanted = <Py_ssize_t>min(<int64_t>first, found.size)
        data = PyBytes_FromStringAndSize(NULL, max(wanted, 0))
        buffer = PyBytes_AS_STRING(data)
        with nogil:
            while done < wanted:
                if done < needed:
                    count = c_pread(found.descriptor, buffer + done, min(wanted, needed) - done, done)
                else:
                    count = c_pread_cached(found.descriptor, buffer + done, wanted - done, done)
                if count <= 0:
                    break
                done += count
        checksum = None if found.checksum_size < 0 else found.checksum[:found.checksum_size]
        settled = found.opened_ns - settle_ns
        identity = None
        if found.identity.directory.change_ns <= settled and found.identity.file.change_ns <= settled:
            identity = (<char *>&found.identity)[:sizeof(diskread_identity)]
        return (
            found.descriptor,
            <bytes>found.name,
            found.metadata[:found.metadata_size],
            checksum,
            data if done == wanted else data[:done],
            identity,
        )
    except BaseException:
        c_close(found.descriptor)
        raise


def reopen_object(bytes directory not None, bytes name not None, bytes identity not None, int flags):
    """reopen_object(directory: bytes, name: bytes, identity: bytes, flags: int) -> int

    Open the file of an object that was opened before, if it is the same and nothing has to be asked of the device.
    Microseconds, with the GIL; never waits for the device where `diskread.inline.capability` gives no reason against it.

    Args:
        directory: The path of the directory.
        name: The name of the file in it.
        identity: What `open_object` said of it.
        flags: Flags for opening it, beside O_RDONLY: O_NOATIME, since an update of the access time waits for the journal.

    Returns:
        Its descriptor (the caller's to close), or a negative errno: EAGAIN when the device would have to be asked, ESTALE
        when directory or file are not as they were, or what openat2(2) says.

    Raises:
        ValueError: identity is none.
    """
    if len(identity) != sizeof(diskread_identity):
        raise ValueError(f"an identity has {sizeof(diskread_identity)} bytes, not {len(identity)}")
    if b"\0" in directory or b"\0" in name:
        return -EINVAL
    return c_reopen_object(PyBytes_AS_STRING(directory), PyBytes_AS_STRING(name),
                           <const diskread_identity *>PyBytes_AS_STRING(identity), flags)
