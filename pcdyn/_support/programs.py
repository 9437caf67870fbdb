"""A bounded number of compiled programs: a process that meets ever new shapes does not die.

XLA maps each program that it compiles into memory, a few hundred times for a network of a new
shape, and JAX keeps all programs. Linux allows a process 65530 maps, unless set otherwise, and XLA
ends it by a segmentation fault when there are none left.
"""

from __future__ import annotations

from pathlib import Path

import jax

_MAPS = Path("/proc/self/maps")
_LIMIT = Path("/proc/sys/vm/max_map_count")


def release_if_many(most: int | None = None) -> None:
    """Let JAX forget its compiled programs where they take more than `most` memory maps.

    That is half of what the kernel allows unless given. Functions that are called again are
    compiled again, also those of others than pcdyn. Call it after something has compiled: it reads
    a file of one line for each map. Does nothing where there is no Linux.
    """
    if not _MAPS.exists():
        return
    if most is None:
        most = int(_LIMIT.read_text()) // 2 if _LIMIT.exists() else 32_000
    if _MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
