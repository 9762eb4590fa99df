"""Builds Swift's rings, in a process of its own: who tests Swift need not import it, nor eventlet with it.

    python rings.py DIRECTORY < RINGS

RINGS is JSON: for each name of a ring ("account", "object-1") its part power, its replicas and its devices. The answer,
again JSON, has for each ring the names of the devices that hold a partition, in the order of the replicas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def build(ring: dict[str, Any], path: Path) -> list[list[str]]:
    """Write one ring; the same devices always get the same partitions."""
    from swift.common.ring import RingBuilder

    builder = RingBuilder(ring["part_power"], ring["replicas"], 0)
    for number, device in enumerate(ring["devices"]):
        # A zone for each device: replicas are on distinct devices, and a proxy can be told which one to prefer.
        where = {"id": number, "region": 1, "zone": number + 1, "ip": "127.0.0.1", "weight": 100.0, "meta": ""}
        builder.add_dev({**where, **device})
    builder.rebalance(seed="0")
    data = builder.get_ring()
    data.save(str(path))
    names = [device["device"] for device in ring["devices"]]
    return [
        [names[replica[partition]] for replica in data._replica2part2dev_id]
        for partition in range(2 ** ring["part_power"])
    ]


def main() -> None:
    """Build what the standard input asks for."""
    directory = Path(sys.argv[1])
    rings = json.load(sys.stdin)
    json.dump({name: build(ring, directory / f"{name}.ring.gz") for name, ring in rings.items()}, sys.stdout)


if __name__ == "__main__":
    main()
