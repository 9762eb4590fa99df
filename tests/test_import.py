"""Importing the library: little comes with it, and a missing extension is explained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diskread

if TYPE_CHECKING:
    from .conftest import RunScript

SERVER_ONLY = ["server", "click", "falcon", "msgspec", "rich", "prometheus_client", "hdrh", "matplotlib", "tomli"]


def test_the_library_comes_without_the_server(run_script: RunScript) -> None:
    result = run_script(
        "import sys, diskread\n"
        f"print([name for name in {SERVER_ONLY!r} if name in sys.modules])\n"
        "import gevent.monkey\n"
        "print(any(gevent.monkey.is_module_patched(name) for name in ('os', 'threading', 'time', 'socket')))\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\nFalse\n", "")


def test_the_wsgi_helper_comes_without_the_server(run_script: RunScript) -> None:
    result = run_script(
        f"import sys, diskread.wsgi\nprint([name for name in {SERVER_ONLY!r} if name in sys.modules])\n",
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


def test_importing_starts_nothing(run_script: RunScript) -> None:
    result = run_script(
        "import os, diskread\nfrom gevent._hub_local import get_hub_if_exists\n"
        "print(len(os.listdir('/proc/self/task')), get_hub_if_exists())\n"
        "diskread.Disk('d1', '/nowhere').status\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "1 None\n1\n", "")


def test_a_missing_extension_is_explained(run_script: RunScript) -> None:
    result = run_script("import sys\nsys.modules['diskread._syscalls'] = None\nimport diskread\n")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled part of diskread cannot be loaded")
    assert "pip install -e ." in last


def test_every_public_name_is_there() -> None:
    assert len(set(diskread.__all__)) == len(diskread.__all__)
    for name in diskread.__all__:
        assert getattr(diskread, name) is not None
