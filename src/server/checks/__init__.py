"""What `diskread check --config` looks at before a server starts, and what it says about it."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        subject: What it is about: "kernel", "descriptors", "disk a", ...
        verdict: "error" when something of what the configuration says would not work; "warning" when it works worse
            than it could.
        text: What was found.
        next_step: What to do about it; null when nothing need be done.
    """

    subject: str
    verdict: Verdict
    text: str
    next_step: str | None = None


class Report(msgspec.Struct, frozen=True):
    """All of it.

    Attributes:
        ok: Whether there is no error.
        findings: In the order in which they were looked at.
    """

    ok: bool
    findings: list[Finding]
