"""What a job requires of a worker, and whether a live worker can hold the job.

:func:`app.jobs.fair_queue.holds` is the same rule as a condition of the database.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from app.fleet.repository import Offer


@dataclass(frozen=True)
class Required:
    """What a worker must offer: labels, and memory of its device in bytes.

    ``memory_bytes`` is the least memory, ``None`` if the need is not known. ``more_than_bytes`` is the memory of a worker
    that was too small, ``None`` if there was none.
    """

    labels: Mapping[str, str]
    memory_bytes: int | None
    more_than_bytes: int | None = None

    @classmethod
    def of(cls, job: Any) -> Self:
        """Return what the row of a job requires."""
        return cls(job.required_labels, job.required_memory_bytes, job.outgrown_memory_bytes)

    def labelled(self, offer: Offer) -> bool:
        """Return whether the worker has the labels."""
        return self.labels.items() <= offer.labels.items()

    def fits(self, offer: Offer) -> bool:
        """Return whether the worker has the memory; memory that is not known suffices until a worker was too small."""
        if offer.memory_bytes is None:
            return self.more_than_bytes is None
        enough = self.memory_bytes is None or self.memory_bytes <= offer.memory_bytes
        return enough and (self.more_than_bytes is None or self.more_than_bytes < offer.memory_bytes)

    def holds(self, offer: Offer) -> bool:
        """Return whether the worker can hold the job."""
        return self.labelled(offer) and self.fits(offer)


def waiting_for(required: Required, offers: Sequence[Offer]) -> str | None:
    """Return what the job waits for, in words, or ``None`` if a worker with one of ``offers`` can hold the job."""
    if any(required.holds(offer) for offer in offers):
        return None
    least, outgrown = required.memory_bytes, required.more_than_bytes
    if outgrown is not None and (least is None or least <= outgrown):
        wanted = [f"more than {gib(outgrown)} of memory"]
    else:
        wanted = [] if least is None else [f"{gib(least)} of memory"]
    if required.labels:
        wanted.append(f"the labels {_listed(required.labels)}")
    worker = " with ".join(["a worker", *filter(None, [" and ".join(wanted)])])
    if not offers:
        return f"{worker}; no live worker takes jobs"
    return f"{worker}; the live workers offer: {', '.join(sorted({_described(offer) for offer in offers}))}"


def _described(offer: Offer) -> str:
    memory = "memory that is not known" if offer.memory_bytes is None else gib(offer.memory_bytes)
    return f"{memory} {_listed(offer.labels)}".strip()


def _listed(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))


def gib(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 2**30:.1f} GiB"
