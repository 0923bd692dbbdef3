"""Webhooks: signed, sent once, retried, given up; against a real receiver."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app.config import Settings, get_settings
from app.db.session import session_factory
from app.webhooks import service
from app.webhooks.models import WebhookDelivery

SECRET = "whsec_" + "c2VjYXRldXItc2VjYXRldXItc2VjYXRldXI="


class Receiver(ThreadingHTTPServer):
    """Answers every POST with ``status``, after ``delay`` seconds, and keeps what it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.delay = 204, 0.0
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(self.server.delay)
        self.send_response(self.server.status)
        self.send_header("Location", self.server.url + "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def signing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("SECATEUR_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("SECATEUR_WEBHOOK_NETWORKS", "127.0.0.0/8, ::1/128")
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def ended(signing: Settings, api: httpx2.Client, body: dict[str, Any], receiver: Receiver) -> str:
    """A job that was cancelled, and whose webhook is due."""
    job_id: str = api.post("/v1/jobs", json=body | {"webhook_url": receiver.url, "labels": {"a": "b"}}).json()["id"]
    api.post(f"/v1/jobs/{job_id}/cancel")
    return job_id


def _delivery(session: Session) -> WebhookDelivery:
    session.rollback()
    return session.scalars(select(WebhookDelivery), execution_options={"populate_existing": True}).one()


def _make_due(session: Session) -> None:
    session.execute(update(WebhookDelivery).values(next_attempt_at=func.now()))
    session.commit()


def test_a_delivery_is_signed_and_made_once(
    session: Session, signing: Settings, receiver: Receiver, ended: str
) -> None:
    assert service.deliver_due(session, signing) == 1
    assert service.deliver_due(session, signing) == 0
    [(headers, content)] = receiver.got
    message = Webhook(SECRET).verify(content, headers)
    assert message["type"] == "job.cancelled" and message["timestamp"]
    assert (message["data"]["id"], message["data"]["labels"]) == (ended, {"a": "b"})
    row = _delivery(session)
    assert row.delivered_at is not None and row.next_attempt_at is None and row.attempts == 1


def test_failures_are_retried_for_three_days(
    session: Session, signing: Settings, receiver: Receiver, ended: str
) -> None:
    receiver.status = 500
    waits: list[float] = []
    while _delivery(session).next_attempt_at is not None:
        _make_due(session)
        assert service.deliver_due(session, signing) == 1
        waits.append(
            float(session.scalar(select(func.extract("epoch", WebhookDelivery.next_attempt_at - func.now()))) or 0)
        )
    assert waits.pop() == 0
    assert 2.5 < sum(waits) / 86_400 < 3.5
    assert waits == sorted(waits)
    assert {headers["webhook-id"] for headers, _ in receiver.got} == {f"msg_{_delivery(session).id.hex}"}
    row = _delivery(session)
    assert (row.attempts, row.delivered_at, row.last_error) == (len(waits) + 1, None, "500")


def test_a_retry_that_succeeds(session: Session, signing: Settings, receiver: Receiver, ended: str) -> None:
    receiver.status = 503
    service.deliver_due(session, signing)
    receiver.status = 200
    assert service.deliver_due(session, signing) == 0
    _make_due(session)
    assert service.deliver_due(session, signing) == 1
    assert _delivery(session).delivered_at is not None


def test_redirects_are_not_followed(session: Session, signing: Settings, receiver: Receiver, ended: str) -> None:
    receiver.status = 307
    service.deliver_due(session, signing)
    assert len(receiver.got) == 1
    assert _delivery(session).delivered_at is None


def test_gone_is_for_good(session: Session, signing: Settings, receiver: Receiver, ended: str) -> None:
    receiver.status = 410
    service.deliver_due(session, signing)
    row = _delivery(session)
    assert (row.next_attempt_at, row.delivered_at, row.last_error) == (None, None, "410 Gone")


def test_a_receiver_that_hangs_or_is_not_there(
    session: Session, signing: Settings, receiver: Receiver, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMEOUT", 0.3)
    receiver.delay = 1.0
    service.deliver_due(session, signing)
    assert "Timeout" in str(_delivery(session).last_error)
    for url in ("http://127.0.0.1:9/", "http://no-such-host.invalid/", "http://[::1/"):
        session.execute(update(WebhookDelivery).values(url=url, last_error=None, next_attempt_at=func.now()))
        session.commit()
        assert service.deliver_due(session, signing) == 1
        assert _delivery(session).last_error, url


def test_two_schedulers_deliver_once(signing: Settings, receiver: Receiver, ended: str) -> None:
    receiver.delay = 0.2

    def deliver(_: int) -> int:
        with session_factory()() as session:
            return service.deliver_due(session, signing)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(deliver, range(4))) == 1
    assert len(receiver.got) == 1


@pytest.mark.parametrize("secret", ["", "x", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_")])
def test_bad_secrets_stop_the_service(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("SECATEUR_WEBHOOK_SECRET", secret)
    with pytest.raises(ValidationError, match="whsec_"):
        Settings()
