"""What a job requires of a worker, and whether a live worker can hold the job.

:func:`app.jobs.fair_queue.holds` is the same rule as a condition of the database.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.fleet.repository import Offer


@dataclass(frozen=True)
class Required:
    """What a worker must offer: labels, and memory of its device in bytes, ``None`` if the need is not known."""

    labels: Mapping[str, str]
    memory_bytes: int | None

    def labelled(self, offer: Offer) -> bool:
        """Return whether the worker has the labels."""
        return self.labels.items() <= offer.labels.items()

    def fits(self, offer: Offer) -> bool:
        """Return whether the worker has the memory; memory that is not known suffices."""
        return self.memory_bytes is None or offer.memory_bytes is None or self.memory_bytes <= offer.memory_bytes


def waiting_for(required: Required, offers: Sequence[Offer]) -> str | None:
    """Return what the job waits for, in words, or ``None`` if a worker with one of ``offers`` can hold the job."""
    if any(required.labelled(offer) and required.fits(offer) for offer in offers):
        return None
    wanted = [] if required.memory_bytes is None else [f"{_gib(required.memory_bytes)} of memory"]
    if required.labels:
        wanted.append(f"the labels {_listed(required.labels)}")
    worker = " with ".join(["a worker", *filter(None, [" and ".join(wanted)])])
    if not offers:
        return f"{worker}; no live worker takes jobs"
    return f"{worker}; the live workers offer: {', '.join(sorted({_described(offer) for offer in offers}))}"


def _described(offer: Offer) -> str:
    memory = "memory that is not known" if offer.memory_bytes is None else _gib(offer.memory_bytes)
    return f"{memory} {_listed(offer.labels)}".strip()


def _listed(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
