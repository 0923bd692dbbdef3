"""OpenTelemetry traces of the API's requests and the workers' attempts.

They are sent to the collector that ``SECATEUR_OTLP_ENDPOINT`` names. The exporter is imported only if the variable is set.
"""

from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi.telemetry import TelemetryConfig

from app.config import Settings, get_settings
from secateur.extras import require

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TIMEOUT = 5.0
"""Seconds after which the export of a batch of spans is given up; the process does not wait for exports until it ends."""
PROBES = ("/healthz", "/readyz", "/metrics")
"""Paths of requests that have no span, because they come every few seconds."""


def check(settings: Settings) -> None:
    """Check that traces can be sent if they are wanted.

    Raises:
        MissingExtra: ``SECATEUR_OTLP_ENDPOINT`` is set and the extra ``telemetry`` is not installed.
    """
    if settings.otlp_endpoint is not None:
        require("telemetry", "SECATEUR_OTLP_ENDPOINT")


@lru_cache
def tracer_provider(service: str) -> "TracerProvider | None":
    """Return the process's tracer provider, whose spans name ``service``, or ``None`` if no collector is set.

    The provider exports spans in a thread of its own, so a collector that does not answer delays nothing; spans that
    do not fit into its queue are dropped. Variables of the SDK, such as ``OTEL_EXPORTER_OTLP_HEADERS``, are read.
    """
    endpoint = get_settings().otlp_endpoint
    if endpoint is None:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service, SERVICE_VERSION: version("secateur")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=TIMEOUT)))
    return provider


def of_requests() -> TelemetryConfig:
    """Return how FastAPI traces requests: one span for each if a collector is set, and none for health checks."""
    config: TelemetryConfig = {"metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
    provider = tracer_provider("secateur-api")
    if provider is None:
        return {**config, "tracing": False}
    return {**config, "tracer_provider": provider, "exclude": lambda scope: scope.get("path") in PROBES}


def traceparent() -> str | None:
    """Return the current span as the header ``traceparent`` (W3C Trace Context), or ``None`` if there is no span."""
    if get_settings().otlp_endpoint is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return headers.get("traceparent")
