"""A plugin of pytest for Swift's own tests: other managers in place of the stock ones, and the outcome of each test.

    cd swift-2.38.3
    PYTHONPATH=DISKREAD python -m pytest -p tests.swift.stand_in --managers diskread.swift.managers test/unit/obj

Swift's tests, and Swift itself through its entry points, look the classes up in `swift.obj.diskfile` by name. That is
where the others are put, before any module of a test is imported; what those are based on stays the stock classes.
`scripts/test-swift` runs everything so, and compares.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

STOCK = "swift.obj.diskfile"
KINDS = ("DiskFileManager", "DiskFile", "DiskFileReader", "DiskFileWriter")
NAMES = tuple(policy + kind for policy in ("", "EC") for kind in KINDS)

made: dict[str, int] = {}
"""How many objects were made of each class that stands in."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    group = parser.getgroup("swift")
    group.addoption("--managers", metavar="MODULE", help=f"take the classes of this module for those of {STOCK}")
    group.addoption("--outcomes", metavar="FILE", help="write the outcome of each test to it, a line of JSON each")
    group.addoption("--tests", metavar="FILE", help="run only the tests whose ids are in this JSON list")


def pytest_configure(config: pytest.Config) -> None:
    """Put the classes in place; Swift's test modules are imported later."""
    if managers := config.getoption("--managers"):
        put_in_place(managers)
    if path := config.getoption("--outcomes"):
        config.pluginmanager.register(Recorder(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave only the tests that are asked for."""
    if path := config.getoption("--tests"):
        with open(path, encoding="utf-8") as file:
            wanted = set(json.load(file))
        items[:] = [item for item in items if item.nodeid in wanted]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say whether the classes were used."""
    for name, count in made.items():
        terminalreporter.write_line(f"stand-in: {name}: {count:,} made")


class Recorder:
    """Writes the outcome of each test as soon as it is known."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed when the session ends
        self._parts: dict[str, list[pytest.TestReport]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(collected=[item.nodeid for item in session.items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(id=report.nodeid, outcome="failed", seconds=0.0, why=_why(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._parts.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        parts = self._parts.pop(nodeid, [])
        worst = next((each for each in parts if each.failed), None) or next(
            (each for each in parts if each.skipped), None
        )
        self._write(
            id=nodeid,
            outcome="passed" if worst is None else worst.outcome,
            seconds=round(sum(each.duration for each in parts), 3),
            why="" if worst is None else _why(worst),
        )

    def pytest_sessionfinish(self) -> None:
        self._write(made=made)
        self._file.close()

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")


def put_in_place(managers: str) -> None:
    """Make the classes of a module the ones that `swift.obj.diskfile` has.

    Args:
        managers: The module's name. It has classes named as the stock ones, and based on them.

    Raises:
        pytest.UsageError: Swift was imported already, or the module lacks a class.
    """
    stock = _stock_module()
    stock_classes = {name: getattr(stock, name) for name in NAMES}
    module = importlib.import_module(managers)
    importers = [name for name in sys.modules if name.startswith("swift.") and name != STOCK]
    for name, original in stock_classes.items():
        other = getattr(module, name, None)
        if not (isinstance(other, type) and issubclass(other, original)):
            raise pytest.UsageError(f"{managers} has no class {name} that is based on {STOCK}.{name}")
        for importer in importers:
            if vars(sys.modules[importer]).get(name) is original:
                raise pytest.UsageError(f"{importer}, which {managers} imports, has {name} from {STOCK} already")
        _count(other, name)
        setattr(stock, name, other)


def _stock_module() -> ModuleType:
    """Import `swift.obj.diskfile` such that its classes work under other names.

    They call `super(ECDiskFile, self)`, by which they would find the class that stands in for them, not themselves.
    `super()` means the same, whatever the name stands for.
    """
    if STOCK in sys.modules:
        raise pytest.UsageError(f"{STOCK} was imported already: it is too late for other classes")
    spec = importlib.util.find_spec(STOCK)
    if spec is None or spec.origin is None:
        raise pytest.UsageError(f"there is no {STOCK}")
    with open(spec.origin, encoding="utf-8") as file:
        source = re.sub(r"\bsuper\(\w+, self\)", "super()", file.read())
    module = importlib.util.module_from_spec(spec)
    sys.modules[STOCK] = module
    exec(compile(source, spec.origin, "exec"), vars(module))
    vars(importlib.import_module("swift.obj"))["diskfile"] = module
    return module


def _count(kind: type, name: str) -> None:
    """Count the objects that are made of a class."""
    made[name] = 0
    original: Callable[..., None] = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made[name] += 1
        original(self, *args, **kwargs)

    kind.__init__ = counted  # type: ignore[misc]


def _why(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The message of a failure, or the reason for skipping, in short."""
    detail = report.longrepr
    if isinstance(detail, tuple):
        return str(detail[2])
    crash = getattr(detail, "reprcrash", None)
    return f"{crash.path}:{crash.lineno}: {crash.message}"[:1000] if crash else report.longreprtext[-1000:]
