"""The HTTP door: how large a body may be, what browsers are told and allowed, which pages there are."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings, get_settings
from tests.api.conftest import ServerThread
from tests.patience import PATIENCE

LARGEST = 1000

Serve = Callable[..., str]


@pytest.fixture
def serve(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """The address of an API with these settings."""
    servers = []

    def start(**variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(f"SECATEUR_{name}", value)
        get_settings.cache_clear()
        servers.append(ServerThread())
        return servers[-1].__enter__()

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def key(session: Session) -> dict[str, str]:
    _, secret = auth.create(session, "alice")
    return {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}


def _is_too_large(response: httpx2.Response) -> None:
    assert response.status_code == 413, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["code"] == "body_too_large" and str(LARGEST) in response.json()["detail"]
    assert response.json()["request_id"] == response.headers["X-Request-Id"]


class TestBodies:
    def test_too_large(self, serve: Serve, key: dict[str, str]) -> None:
        url = serve(MAX_BODY_BYTES=str(LARGEST))
        for path in ("/v1/jobs", "/v1/models/inspect"):
            _is_too_large(httpx2.post(url + path, content=b" " * (LARGEST + 1), headers=key))
            _is_too_large(httpx2.post(url + path, content=(b" " * 100 for _ in range(11)), headers=key))
            assert httpx2.post(url + path, content=b" " * LARGEST, headers=key).status_code == 422
            assert httpx2.post(url + path, content=(b" " * 100 for _ in range(10)), headers=key).status_code == 422

    @pytest.mark.parametrize("header", ["Content-Length: 1000000000000", "Transfer-Encoding: chunked"])
    def test_refused_before_the_end_has_come(self, serve: Serve, key: dict[str, str], header: str) -> None:
        """The answer is there while the client still sends."""
        url = httpx2.URL(serve(MAX_BODY_BYTES=str(LARGEST)))
        given = "".join(f"{name}: {value}\r\n" for name, value in key.items())
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\n{given}{header}\r\n\r\n"
        with socket.create_connection((url.host, url.port or 0), timeout=PATIENCE) as client:
            client.sendall(head.encode() + (b"7d1\r\n" + b" " * 2001 + b"\r\n" if "chunked" in header else b""))
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models/inspect"])
    def test_nothing_is_read_of_strangers(self, url: str, path: str) -> None:
        """Whose body never ends, and would be held in memory until it does."""
        address = httpx2.URL(url)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{{"
        with socket.create_connection((address.host, address.port or 0), timeout=PATIENCE) as client:
            client.sendall(head.encode())
            assert client.recv(100).startswith(b"HTTP/1.1 401 ")

    def test_texts_of_many_megabytes(self, api: httpx2.Client, body: dict[str, Any]) -> None:
        texts = ["word " * 200_000] * 40
        assert api.post("/v1/jobs", json=body | {"calibration": {"texts": texts}}).status_code == 202


class TestHeaders:
    def test_on_every_response(self, api: httpx2.Client) -> None:
        for path in ("/v1/jobs", "/v1/nothing", "/healthz", "/metrics", "/openapi.json", "/v1/jobs/x"):
            headers = api.get(path).headers
            assert headers["X-Content-Type-Options"] == "nosniff", path
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
            assert headers.get("Cache-Control") == ("no-store" if path.startswith("/v1/") else None)
            assert "Strict-Transport-Security" not in headers

    def test_on_a_bug_and_on_a_large_body(
        self, serve: Serve, key: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*arguments: object) -> None:
            raise RuntimeError

        url = serve(MAX_BODY_BYTES=str(LARGEST))
        monkeypatch.setattr("app.jobs.service.page", broken)
        for response in (httpx2.get(f"{url}/v1/jobs", headers=key), httpx2.post(f"{url}/v1/jobs", content=b" " * 1001)):
            assert response.status_code in (413, 500)
            assert response.headers["Cache-Control"] == "no-store" and response.headers["X-Request-Id"]

    def test_a_route_may_say_otherwise(self, api: httpx2.Client, body: dict[str, Any]) -> None:
        job_id = api.post("/v1/jobs", json=body).json()["id"]
        with api.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
            assert response.headers["Cache-Control"] == "no-cache"

    def test_pages_for_people_may_run_their_scripts(self, api: httpx2.Client) -> None:
        for path in ("/docs", "/redoc"):
            assert api.get(path).headers["Content-Security-Policy"] == "frame-ancestors 'none'"

    def test_https_is_to_stay(self, url: str) -> None:
        """uvicorn trusts a proxy of its own machine."""
        headers = httpx2.get(f"{url}/healthz", headers={"X-Forwarded-Proto": "https"}).headers
        assert headers["Strict-Transport-Security"] == "max-age=31536000"


class TestOrigins:
    ORIGIN = "https://tools.example.org"

    def test_none_by_default(self, api: httpx2.Client) -> None:
        assert "Access-Control-Allow-Origin" not in api.get("/v1/jobs", headers={"Origin": self.ORIGIN}).headers

    def test_those_that_are_allowed(self, serve: Serve, key: dict[str, str]) -> None:
        url = serve(CORS_ORIGINS=f"https://ml.example.org, {self.ORIGIN}")
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,prefer"}
        for origin, allowed in ((self.ORIGIN, self.ORIGIN), ("https://evil.example.org", None)):
            preflight = httpx2.options(f"{url}/v1/jobs", headers={"Origin": origin} | asked)
            assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
            assert "Access-Control-Allow-Credentials" not in preflight.headers
            response = httpx2.get(f"{url}/v1/jobs", headers={"Origin": origin} | key)
            assert response.headers.get("Access-Control-Allow-Origin") == allowed
            assert response.headers["X-Request-Id"]
        assert "ETag" in response.headers["Access-Control-Expose-Headers"]

    def test_what_is_no_origin_stops_the_service(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for origin in (
            "https://example.org/",
            "example.org",
            "https://user@example.org",
            "null",
            "https://a.example b",
        ):
            monkeypatch.setenv("SECATEUR_CORS_ORIGINS", origin)
            with pytest.raises(ValidationError, match="cors_origins"):
                Settings()


def test_docs_can_be_left_out(serve: Serve) -> None:
    url = serve(DOCS="false")
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        assert httpx2.get(url + path).status_code == 404, path
    assert httpx2.get(f"{url}/healthz").status_code == 200
