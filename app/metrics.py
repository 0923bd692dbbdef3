"""Prometheus metrics of jobs, workers and webhooks.

They are read from the database when Prometheus scrapes the service, so every API replica reports the same values.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings
from app.db.session import reading
from app.fleet import repository as fleet
from app.jobs import repository as jobs
from app.jobs import usage
from app.webhooks import repository as webhooks
from secateur.contract.states import State

WORKER_NUMBERS = {
    "memory_bytes": "Memory of a worker's device.",
    "disk_free_bytes": "Free bytes on the disk that a worker writes to.",
}
KEY_NUMBERS = {
    "worker_seconds": "Seconds for which workers owned the jobs of an API key.",
    "bytes_stored": "Bytes of the files that the jobs of an API key stored.",
}


class ServiceCollector(Collector):
    """A Prometheus collector that shows whether the service is stuck (queue, workers, schedulers, retries), slow
    (steps) or full (memory, disk)."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("secateur_database_up", "Whether the database answers.", value=1)
        try:
            metrics = list(self._read())
        except SQLAlchemyError:
            yield GaugeMetricFamily("secateur_database_up", up.documentation, value=0)
            return
        yield from [up, *metrics]

    def _read(self) -> Iterator[Metric]:
        with reading() as session:
            numbers = jobs.queue_numbers(session)
            running = jobs.owned_by_worker(session)
            retries, steps = jobs.recent_retries(session), jobs.recent_steps(session)
            workers = fleet.live(session, self.settings.worker_silence)
            schedulers = fleet.live(session, self.settings.worker_silence, "scheduler")
            unheld = jobs.count_unheld(session, fleet.offers(session, self.settings.worker_silence))
            pending, failed = webhooks.counts(session)
            used = usage.totals(session)
        yield _labelled(
            "secateur_jobs",
            "Jobs by state; of those that have ended, the last hour's.",
            "state",
            {state: numbers.by_state.get(state, 0) for state in State},
        )
        depth = numbers.by_state.get(State.QUEUED, 0)
        yield GaugeMetricFamily("secateur_queue_depth", "Jobs that wait for a worker.", value=depth)
        yield GaugeMetricFamily(
            "secateur_queue_oldest_seconds", "Age of the oldest of them.", value=numbers.oldest_seconds
        )
        yield GaugeMetricFamily("secateur_queue_unheld", "Queued jobs that no live worker can hold.", value=unheld)
        yield GaugeMetricFamily("secateur_workers_live", "Workers that beat.", value=len(workers))
        yield GaugeMetricFamily("secateur_schedulers_live", "Schedulers that beat.", value=len(schedulers))
        draining = sum(worker.drain is not None for worker in workers)
        yield GaugeMetricFamily("secateur_workers_draining", "Live workers that take no new job.", value=draining)
        yield _labelled("secateur_running_jobs", "Jobs that a worker owns.", "worker", dict.fromkeys(running, 1.0))
        yield _labelled(
            "secateur_retries_last_hour",
            "Attempts of the last hour that failed and were queued again, by the error's code: worker_lost is a lease that ran "
            "out, hub_conflict a repository that others kept committing to.",
            "code",
            retries,
        )
        yield _labelled("secateur_step_seconds", "Mean time of a step of the last hour, by method.", "method", steps)
        yield GaugeMetricFamily("secateur_webhooks_pending", "Webhooks that are still to be delivered.", value=pending)
        yield GaugeMetricFamily(
            "secateur_webhooks_failed_last_day", "Webhooks of the last day that were given up.", value=failed
        )
        for number, description in WORKER_NUMBERS.items():
            known = {worker.name: float(worker.info[number]) for worker in workers if number in worker.info}
            yield _labelled(f"secateur_worker_{number}", description, "worker", known)

        jobs_by_key = CounterMetricFamily(
            "secateur_key_jobs", "Jobs of an API key that were created, succeeded and failed.", labels=["key", "what"]
        )
        for row in used:
            for what in ("created", "succeeded", "failed"):
                jobs_by_key.add_metric([str(row.key_id), what], getattr(row, f"jobs_{what}"))
        yield jobs_by_key
        for name, description in KEY_NUMBERS.items():
            metric = CounterMetricFamily(f"secateur_key_{name}", description, labels=["key"])
            for row in used:
                metric.add_metric([str(row.key_id)], getattr(row, name))
            yield metric


def _labelled(name: str, description: str, label: str, values: dict[str, float]) -> Metric:
    metric = GaugeMetricFamily(name, description, labels=[label])
    for value, number in values.items():
        metric.add_metric([value], number)
    return metric
