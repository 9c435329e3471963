"""The allocator setting, in a process of its own, judged by the page faults it is meant to avoid."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from undiffuse.nets import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    kept = [torch.ones(10_000_000) for _ in range(3)]
for _ in range(8):  # where blocks lie settles within four
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again():
    def faults(mode):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    given_back = faults("leave")
    assert given_back > 10_000  # 15 blocks of 40 MB in pages of 4 kB; fewer where the kernel gives huge pages
    assert faults("keep") < given_back / 5
