"""Stand-ins on the loopback interface for an OpenTelemetry collector (OTLP/HTTP) and an MLflow tracking server."""

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.servers import serving

API = "/api/2.0/mlflow/"
Kind = TypeVar("Kind", bound="Server")


@dataclass
class Server(ABC):
    """A server that answers at ``url`` with ``status``; while ``speaks`` is cleared, it takes requests and answers none."""

    url: str = ""
    status: int = 200
    asked: list[str] = field(default_factory=list)
    speaks: threading.Event = field(default_factory=threading.Event)

    @abstractmethod
    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Return the status and the body of the answer to a request."""


@dataclass
class Collector(Server):
    """``spans`` are the spans that arrived, ``services`` the names of the services that sent them."""

    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if path != "/v1/traces":
            return 404, b""
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {each.key: each.value.string_value for each in sent.resource.attributes}
            self.services.add(resource["service.name"])
            self.spans += [span for scope in sent.scope_spans for span in scope.spans]
        return 200, b""


@dataclass
class FakeMlflow(Server):
    """``experiments`` are the ids by name; ``runs`` have the keys experiment, name, status, params, tags and metrics."""

    experiments: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        action = getattr(self, re.sub(r"\W", "_", path.removeprefix(API)))
        status, content = action(query if method == "GET" else json.loads(body))
        return status, json.dumps(content).encode()

    def experiments_get_by_name(self, given: dict[str, str]) -> tuple[int, dict[str, Any]]:
        found = self.experiments.get(given["experiment_name"])
        if found is None:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
        return 200, {"experiment": {"experiment_id": found}}

    def experiments_create(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number = self.experiments[given["name"]] = str(len(self.experiments) + 1)
        return 200, {"experiment_id": number}

    def runs_search(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        wanted = re.fullmatch(r"tags\.`(.+)` = '(.+)'", given["filter"])
        assert wanted is not None
        found = [run_id for run_id, run in self.runs.items() if run["tags"].get(wanted[1]) == wanted[2]]
        return 200, {"runs": [{"info": {"run_id": run_id}} for run_id in found]} if found else {}

    def runs_create(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        run_id = f"run{len(self.runs)}"
        run = {"experiment": given["experiment_id"], "name": given["run_name"], "status": "RUNNING", "end_time": None}
        self.runs[run_id] = {**run, "params": {}, "tags": _values(given["tags"]), "metrics": []}
        return 200, {"run": {"info": {"run_id": run_id}}}

    def runs_log_batch(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        run = self.runs[given["run_id"]]
        assert all(
            len(given.get(part, [])) <= most for part, most in (("params", 100), ("tags", 100), ("metrics", 1000))
        )
        if any(len(item["value"].encode()) > 5000 for part in ("params", "tags") for item in given.get(part, [])):
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "a value is too long"}
        run["params"] |= _values(given.get("params", []))
        run["tags"] |= _values(given.get("tags", []))
        run["metrics"] += given.get("metrics", [])
        return 200, {}

    def runs_update(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.runs[given["run_id"]] |= {"status": given["status"], "end_time": given.get("end_time")}
        return 200, {}


def _values(items: list[dict[str, str]]) -> dict[str, str]:
    return {item["key"]: item["value"] for item in items}


@contextmanager
def running(server: Kind) -> Iterator[Kind]:
    """Run the server while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.asked.append(parts.path)
            server.speaks.wait()
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            status, content = server.status, b""
            if status == 200:
                with lock:
                    status, content = server.answer(self.command, parts.path, query, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                self.wfile.write(content)
            except ConnectionError:
                self.close_connection = True

        do_GET = do_POST = handle_any

    lock = threading.Lock()
    server.speaks.set()
    with serving(Handler) as server.url:
        try:
            yield server
        finally:
            server.speaks.set()
