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
step(); step()
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

    assert faults("leave") > 10_000  # 40 MB blocks, 4 kB pages, 15 blocks
    assert faults("keep") < 1000
