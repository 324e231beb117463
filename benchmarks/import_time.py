"""How much `import smoothcache` costs over `import torch` alone.

Each import runs in a fresh process, in turns, so that a busy machine slows both alike. The first
round warms the file cache and is not counted.

    python benchmarks/import_time.py [rounds]
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

TARGET = 1.20
CLOCK = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds_to_import(module: str) -> float:
    """Seconds that `import module` takes in a process of its own, the start of Python left out."""
    command = [sys.executable, "-c", CLOCK.format(module)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(rounds: int = 7) -> int:
    """Prints both medians and their ratio; returns 1 if the ratio misses the target."""
    seconds: dict[str, list[float]] = {"torch": [], "smoothcache": []}
    for i in range(rounds + 1):
        for module, measured in seconds.items():
            value = seconds_to_import(module)
            if i > 0:
                measured.append(value)
    torch, ours = median(seconds["torch"]), median(seconds["smoothcache"])
    verdict = "met" if ours / torch <= TARGET else "MISSED"
    print(f"import torch        {torch:.3f} s   (median of {rounds})")
    print(f"import smoothcache  {ours:.3f} s")
    print(f"ratio               {ours / torch:.3f}     target <= {TARGET:.2f}: {verdict}")
    return 0 if ours / torch <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
