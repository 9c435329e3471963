"""How much main memory there is to be had."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1 << 30


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    # The kernel's own estimate counts the cache it would give up; sysconf knows the unused pages only.
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
