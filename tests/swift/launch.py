"""Runs one of Swift's servers, unmodified, on a swift.conf that is not in /etc/swift.

    python launch.py SWIFT_DIR MODULE CONFIG [OPTIONS]

A server takes its rings from `swift_dir`, but has read the storage policies of /etc/swift/swift.conf before it knows
of any other (swift/common/storage_policy.py, at the import; swift/common/wsgi.py, _initrp). Swift's own commands say
`set_swift_dir` first (swift-get-nodes --swift-dir), and so does this.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Become the server."""
    # A killed test run leaves neither a server behind nor its workers, which Swift forks.
    _die_with_parent()
    os.register_at_fork(after_in_child=_die_with_parent)
    _, directory, module, *arguments = sys.argv
    del sys.path[0]  # the directory of this file
    from swift.common.utils import set_swift_dir

    set_swift_dir(directory)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())


if __name__ == "__main__":
    main()
