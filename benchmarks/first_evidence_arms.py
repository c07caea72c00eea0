"""Run a list of `first_evidence` arms, several processes at a time, so that loading one hides behind training another.

    python -m benchmarks.first_evidence_arms ARMS --data DATA --output OUT [--workers 3] [--seconds 560] [-- flags of every arm]

ARMS is a text file with one arm a line: its name, then its flags (`res-eta1e-2 --eta-init 1e-2 --seed 0`). Arms that have finished are
skipped, and none is started after `--seconds`: call it again to go on. On an H100 three workers train 43,000 tokens/s together
(T = 4096, batch 4, chunk 512, `--attention flex --cuda-graph`).
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def seed_of(flags: list[str]) -> str:
    return flags[flags.index("--seed") + 1] if "--seed" in flags else "0"


def finished(path: Path) -> bool:
    return path.is_file() and json.loads(path.read_text())["finished"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=560.0)
    # argparse (3.11) does not gather what follows "--" into a positional after options
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, common = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def run(line: str) -> str:
        name, *flags = line.split()
        label = f"{name}-seed{seed_of(flags)}"
        if finished(options.output / f"{label}.json"):
            return f"{label}: finished before"
        if time.monotonic() - start > options.seconds:
            return f"{label}: not started"
        command = [sys.executable, "-m", "benchmarks.first_evidence", "--data", options.data, "--output", options.output, "--name", name]
        with (options.output / f"{label}.log").open("w") as log:
            code = subprocess.run([*command, *flags, *common], stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        return f"{label}: exit {code} after {time.monotonic() - start:.0f} s"

    lines = [line for line in options.arms.read_text().splitlines() if line.strip()]
    with ThreadPoolExecutor(options.workers) as pool:
        for result in pool.map(run, lines):
            print(result, flush=True)


if __name__ == "__main__":
    main()
