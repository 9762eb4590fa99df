"""Types of the compiled module: kept in step with _syscalls.pyx by tests/test_stubs.py."""

from enum import IntEnum
from typing import final

class CloseMode(IntEnum):
    CLOSE_ALWAYS = 0
    CLOSE_AT_EOF = 1
    CLOSE_NEVER = 2

class Step(IntEnum):
    STEP_NONE = 0
    STEP_STALL = 1
    STEP_ROOT = 2
    STEP_OPEN = 3
    STEP_STAT = 4
    STEP_TYPE = 5
    STEP_READ = 6
    STEP_MEMORY = 7
    STEP_ABANDONED = 8

@final
class Job:
    def __new__(
        cls,
        *,
        root: bytes | None = None,
        root_fd: int = -1,
        path: bytes | None = None,
        descriptor: int = -1,
        borrowed: bool = False,
        offset: int = 0,
        size: int = 0,
        stall_ns: int = 0,
        close_mode: int = CloseMode.CLOSE_ALWAYS,
    ) -> Job: ...
    def run(self) -> None: ...
    def abandon(self) -> None: ...
    def take_descriptor(self) -> int: ...
    def take_root(self) -> int: ...
    def take_data(self) -> bytes: ...
    @property
    def finished(self) -> bool: ...
    @property
    def abandoned(self) -> bool: ...
    @property
    def error(self) -> int: ...
    @property
    def close_error(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def stat(self) -> tuple[int, int, int, int] | None: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def finished_ns(self) -> int: ...

def pread(descriptor: int, size: int, offset: int) -> bytes: ...
def pread_holding_gil(descriptor: int, size: int, offset: int) -> bytes: ...
def stall(seconds: float) -> None: ...
def stall_holding_gil(seconds: float) -> None: ...
