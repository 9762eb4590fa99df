"""Subclasses of the stock classes that change nothing: what differs with them is not for want of anything."""

from __future__ import annotations

from swift.obj import diskfile


class DiskFileReader(diskfile.DiskFileReader):
    pass


class DiskFileWriter(diskfile.DiskFileWriter):
    pass


class DiskFile(diskfile.DiskFile):
    reader_cls = DiskFileReader
    writer_cls = DiskFileWriter


class DiskFileManager(diskfile.DiskFileManager):
    diskfile_cls = DiskFile


class ECDiskFileReader(diskfile.ECDiskFileReader):
    pass


class ECDiskFileWriter(diskfile.ECDiskFileWriter):
    pass


class ECDiskFile(diskfile.ECDiskFile):
    reader_cls = ECDiskFileReader
    writer_cls = ECDiskFileWriter


class ECDiskFileManager(diskfile.ECDiskFileManager):
    diskfile_cls = ECDiskFile
