"""``make chaos``: 200 faults against 100 jobs, and what came of it."""

import argparse
import sys

from tests.chaos.run import run
from tests.chaos.world import LEASE


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--gap", type=float, default=5.0, help="seconds between faults, on average")
    parser.add_argument(
        "--lease",
        type=float,
        default=LEASE,
        help="seconds; within two thirds of them, a process must start on this machine",
    )
    parser.add_argument("--storage", choices=("file", "s3"), default="file", help="s3: the workers share no folder")
    parser.add_argument(
        "--patience", type=float, default=1800.0, help="seconds for the jobs to end after the last fault"
    )
    arguments = parser.parse_args()
    verdict = run(
        arguments.seed,
        arguments.faults,
        arguments.jobs,
        arguments.gap,
        arguments.patience,
        lease=arguments.lease,
        storage=arguments.storage,
    )
    for name, count in verdict.counts.items():
        print(f"{name:32} {count}")
    for fault in verdict.faults:
        print(f"FAULT {fault}")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
