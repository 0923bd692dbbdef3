"""Run pytest with these arguments twice in a row, beside two processes that never rest: ``make test-busy``.

A test that depends on the speed of the machine fails here.
"""

import signal
import subprocess
import sys
from types import FrameType

from secateur.processes import spawn

LOOPS, RUNS = 2, 2
LOOP = [sys.executable, "-c", "while True: pass"]


def main() -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    loops = [spawn(LOOP) for _ in range(LOOPS)]  # the kernel ends the loops with this process, even when it is killed
    try:
        for number in range(1, RUNS + 1):
            print(f"run {number} of {RUNS} beside {LOOPS} busy loops", flush=True)
            code = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]]).returncode
            dead = [loop.pid for loop in loops if loop.poll() is not None]
            if code or dead:
                print(f"run {number} failed: " + (f"pytest exited with {code}" if code else "a busy loop has ended"))
                return code or 1
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
