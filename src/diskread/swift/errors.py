"""What Swift's object server gets to see instead of a `DiskError`: exceptions that its handlers turn into answers."""

from __future__ import annotations

from swift.common.exceptions import (
    DiskFileDeviceUnavailable,
    DiskFileError,
    DiskFileNoSpace,
    DiskFileXattrNotSupported,
)
from swift.common.swob import HTTPException


class DeviceOffline(DiskFileDeviceUnavailable, DiskFileXattrNotSupported, DiskFileNoSpace):
    """The device is offline, or not mounted: 507, whatever the request was.

    Each handler of `swift.obj.server` knows only some of these three as a reason for 507, and makes 500 of the others.
    The proxy asks a device that has answered 507 nothing for a minute (error_suppression_interval).
    """


class DeviceTimeout(DiskFileError, HTTPException):
    """The device has missed a deadline, or has no slot free: 503, which the proxy counts as an error of the device.

    `swift.obj.server` answers with an HTTPException as it is; daemons know it as a DiskFileError.
    """

    def __init__(self, reason: str) -> None:
        """Build the answer.

        Args:
            reason: What happened, in words: the body of the answer.
        """
        HTTPException.__init__(self, status=503, body=f"{reason}\n", content_type="text/plain")
        self.args = (reason,)
