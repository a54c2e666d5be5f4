"""Measure, never assert.

    python tests/bench.py {kernels,train,tokenizer,data,finetune} [--json FILE]

Every comparison is interleaved in one process (A B A B ...) and reported as medians and ratios,
since machines are shared and noisy. Rows print as they come; --json also writes them to FILE.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def interleave(variants, rounds):
    """Median seconds of each named callable, run in turns so that drift hits all alike."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, fn in variants.items():
            start = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parts = {name.removeprefix("bench_"): fn for name, fn in globals().items()
             if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(parts), help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here (default: none)")
    args, rest = parser.parse_known_args()
    rows = parts[args.part](rest)
    if args.json:
        machine = {"python": platform.python_version(), "machine": platform.processor()}
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
