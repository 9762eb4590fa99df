# cython: language_level=3, freethreading_compatible=True, embedsignature=True
"""Opens the file of an object: one stretch without the GIL instead of one for each system call.

A worker that takes the GIL back after each of the ten calls of Swift's own method gets it ten times from a busy hub, and
each time costs both of them a switch between threads: more than the calls themselves.

Only the usual case is dealt with: a directory with one file, whose attributes are small. Everything else, errors included,
is left to Swift's own method.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
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
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <sys/xattr.h>
    #include <unistd.h>

    #ifndef RWF_NOWAIT
    #define RWF_NOWAIT 0x00000008 /* linux/fs.h */
    #endif
    #define DISKREAD_NAME 256 /* NAME_MAX and its end */
    #define DISKREAD_VALUE 8192

    /* Stable kernel ABI, which glibc 2.30 gave a name (getdents(2)). */
    struct diskread_dirent { uint64_t d_ino; int64_t d_off; unsigned short d_reclen; unsigned char d_type; char d_name[]; };

    struct diskread_object {
        int descriptor;
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

    /* 1 when everything is as it usually is; the descriptor is open then, and closed otherwise. */
    static int diskread_open_object(const char *path, struct diskread_object *found) {
        int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0) return 0;
        found->descriptor = -1;
        if (diskread_only_entry(directory, found->name))
            found->descriptor = openat(directory, found->name, O_RDONLY | O_NOCTTY | O_CLOEXEC);
        (void)close(directory);
        if (found->descriptor < 0) return 0;
        struct stat status;
        if (fstat(found->descriptor, &status) != 0 || !S_ISREG(status.st_mode)) goto unusual;
        found->size = status.st_size;
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
    struct diskread_object:
        int descriptor
        int64_t size
        char *name
        ssize_t metadata_size
        char *metadata
        ssize_t checksum_size
        char *checksum
    int c_open_object "diskread_open_object"(const char *path, diskread_object *found) nogil
    ssize_t c_pread_cached "diskread_pread_cached"(int descriptor, char *buffer, size_t size, int64_t offset) nogil
    ssize_t c_pread "pread"(int descriptor, void *buffer, size_t size, int64_t offset) nogil
    int c_close "close"(int descriptor) nogil


def open_object(bytes directory not None, Py_ssize_t needed, Py_ssize_t first):
    """open_object(directory: bytes, needed: int, first: int) -> tuple[int, bytes, bytes, bytes | None, bytes] | None

    Open the only file of an object's directory and read what Swift keeps with it. Blocks the native thread, without the
    GIL, for as long as the device takes.

    Args:
        directory: The path of the directory.
        needed: Bytes to read from its beginning in the same visit, whatever that takes.
        first: Bytes to read from there if they are in the page cache; at least `needed`.

    Returns:
        Its descriptor (the caller's to close), name, metadata (user.swift.metadata), their checksum if they have one, and
        its first bytes: fewer when it is shorter, or when they could not be read. None when anything is
        unusual.

    Raises:
        MemoryError: there is no memory for the bytes.
    """
    cdef diskread_object found
    cdef const char *path = directory
    cdef int good
    cdef Py_ssize_t wanted, done = 0
    cdef ssize_t count
    cdef char *buffer
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
        return (
            found.descriptor,
            <bytes>found.name,
            found.metadata[:found.metadata_size],
            checksum,
            data if done == wanted else data[:done],
        )
    except BaseException:
        c_close(found.descriptor)
        raise
