"""The trace of an attempt at a job, for OpenTelemetry."""

from typing import TYPE_CHECKING

from app.jobs.leases import Claim
from app.tracing import tracer_provider

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SERVICE = "secateur-worker"


class Trace:
    """The span of an attempt, with a child span for each stage of each step. Without a collector it does nothing.

    The span of the request that created the job is the parent of the attempt's span.
    """

    def __init__(self, claim: Claim) -> None:
        self._tracer: Tracer | None = None
        self._stage: Span | None = None
        self._place: tuple[str, int] | None = None
        provider = tracer_provider(SERVICE)
        if provider is None:
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        request = claim.request
        attributes = {
            "secateur.job.id": str(claim.job_id),
            "secateur.job.attempt": claim.attempt,
            "secateur.job.model_id": request["model_id"],
            "secateur.job.method": request.get("method"),
            "secateur.job.target_ratio": request.get("target_ratio"),
        }
        headers = {"traceparent": claim.traceparent} if claim.traceparent else {}
        self._tracer = provider.get_tracer(__name__)
        self._attempt = self._tracer.start_span(
            "attempt",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.CONSUMER,
            {name: value for name, value in attributes.items() if value is not None},
        )

    def enter(self, stage: str, step: int) -> None:
        """Begin the span of ``stage`` in ``step`` and end the one before, unless the attempt is already there."""
        if self._tracer is None or self._place == (stage, step):
            return
        from opentelemetry.trace import set_span_in_context

        self._leave()
        self._place = (stage, step)
        attributes = {"secateur.step": step}
        self._stage = self._tracer.start_span(stage, set_span_in_context(self._attempt), attributes=attributes)

    def end(self, outcome: str, code: str | None) -> None:
        """End the trace; ``code`` is the code of the error with which the attempt ended."""
        if self._tracer is None:
            return
        from opentelemetry.trace import StatusCode

        self._leave()
        self._attempt.set_attribute("secateur.attempt.outcome", outcome)
        if code is not None:
            self._attempt.set_attribute("error.type", code)
            self._attempt.set_status(StatusCode.ERROR, code)
        self._attempt.end()

    def _leave(self) -> None:
        if self._stage is not None:
            self._stage.end()


def close() -> None:
    """Send the spans of this process that wait to be sent, and end sending; this takes seconds at most."""
    provider = tracer_provider(SERVICE)
    if provider is not None:
        provider.shutdown()
