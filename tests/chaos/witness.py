"""The real runner or publisher, with a witness: ``python -m tests.chaos.witness runner|publisher``.

In the folder ``SECATEUR_CHAOS_NOTES`` it notes when its process first and last ran, by the clock of the machine, and which
steps it began.
"""

import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from workers import publisher, runner, supervisor_link
from workers.supervisor_link import SupervisorLink

WORK = {"runner": runner.work, "publisher": publisher.work}
PULSE = 0.02
SPAN = struct.Struct("dd")


def note_life(path: Path) -> None:
    """Write the first and the last moment of this process, for as long as it lives. A frozen process writes nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    first = time.monotonic()
    while True:
        os.pwrite(descriptor, SPAN.pack(first, time.monotonic()), 0)
        time.sleep(PULSE)


def main() -> None:
    kind = sys.argv[1]

    def witnessed(supervisor: SupervisorLink) -> dict[str, Any]:
        job = supervisor.job
        notes = Path(os.environ["SECATEUR_CHAOS_NOTES"])
        name = f"{job['job_id']}.{job['attempt']}.{kind}.{os.getpid()}"
        threading.Thread(target=note_life, args=(notes / f"{name}.life",), daemon=True).start()
        begun: set[int] = set()
        tell = supervisor.tell

        def note_round(message: dict[str, Any]) -> None:
            if message["type"] == "progress" and message["stage"] in ("scoring", "training"):
                number = message["step"]
                if number not in begun:
                    begun.add(number)
                    with (notes / f"{name}.steps").open("a") as file:
                        file.write(f"{number}\n")
            tell(message)

        supervisor.tell = note_round  # type: ignore[method-assign]
        return WORK[kind](supervisor)

    supervisor_link.run(witnessed)


if __name__ == "__main__":
    main()
