"""How much memory something adds at its peak, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PREPARED = """
import sys
from pathlib import Path

def kibibytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

{before}
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
held = kibibytes("VmRSS")
{run}
print(kibibytes("VmHWM") - held)
"""


def added(before: str, run: str, *arguments: str) -> float:
    """Return the mebibytes that the code *run* adds at its peak, after *before*; *arguments* are ``sys.argv[1:]``."""
    code = PREPARED.format(before=textwrap.dedent(before), run=textwrap.dedent(run))
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024
