"""Webhooks: signed, sent once, retried, given up, and to nowhere private; against a real receiver."""

import datetime as dt
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
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
from app.webhooks.addresses import is_allowed
from app.webhooks.models import WebhookDelivery
from tests.patience import PATIENCE

SECRET = "whsec_" + "c2VjYXRldXItc2VjYXRldXItc2VjYXRldXI="
CERTIFICATE = Path(__file__).parent / "hooks.example.test.pem"
"""Of that name, signed by itself, with its key."""


class Receiver(ThreadingHTTPServer):
    """Answers every POST with ``status`` and keeps what it got; after ``delay`` seconds, and only while ``answering``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.delay = 204, 0.0
        self.answering = threading.Event()
        self.answering.set()
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(self.server.delay)
        self.server.answering.wait()
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
        server.answering.set()
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
    receiver.answering.clear()
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


FORBIDDEN = (
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.192", "192.168.1.1"),
    *("198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *(
        "::",
        "::1",
        "fc00::1",
        "fd12::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "2001:db8::1",
        "100::1",
        "4000::1",
    ),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::10.0.0.1"),
    *("64:ff9b::10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001::1"),
)
PUBLIC = ("8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1")


class TestWhere:
    @pytest.mark.parametrize("address", FORBIDDEN)
    def test_no_address_but_public_ones(self, address: str) -> None:
        assert not is_allowed(ip_address(address), ())

    @pytest.mark.parametrize("address", PUBLIC)
    def test_public_addresses(self, address: str) -> None:
        assert is_allowed(ip_address(address), ())

    def test_networks_that_the_operator_allows(self) -> None:
        networks = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
        for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "fd12::1", "8.8.8.8"):
            assert is_allowed(ip_address(address), networks), address
        for address in ("127.0.0.1", "192.168.0.1", "fc00::1", "::ffff:127.0.0.1"):
            assert not is_allowed(ip_address(address), networks), address

    def test_refused_at_the_door(self, private: None, api: httpx2.Client, body: dict[str, Any]) -> None:
        for host in (
            *("127.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "127.0.0.1.", "localhost", "LOCALHOST.", "a.localhost"),
            *("[::1]", "[::ffff:10.0.0.1]", "[::ffff:a00:1]", "10.0.0.7:8443", "169.254.169.254", "[fe80::1]", "0"),
        ):
            response = api.post("/v1/jobs", json=body | {"webhook_url": f"https://{host}/hook"})
            assert (response.status_code, response.json()["code"]) == (422, "webhook_url_forbidden"), host
            assert response.json()["errors"][0]["field"] == "webhook_url"

    def test_names_are_no_matter_of_the_door(self, private: None, api: httpx2.Client, body: dict[str, Any]) -> None:
        for url in ("https://hooks.example.test/", "http://8.8.8.8:81/x", "https://localhost.example.test/"):
            assert api.post("/v1/jobs", json=body | {"webhook_url": url}).status_code == 202

    def test_urls_with_a_user(self, signing: Settings, api: httpx2.Client, body: dict[str, Any]) -> None:
        for url in ("https://user@example.org/", "https://user:password@example.org/", "https://:x@example.org/"):
            response = api.post("/v1/jobs", json=body | {"webhook_url": url})
            assert response.status_code == 422 and response.json()["errors"][0]["field"] == "webhook_url", url

    @pytest.fixture
    def private(self, signing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        """The operator allows no network."""
        monkeypatch.delenv("SECATEUR_WEBHOOK_NETWORKS")
        get_settings.cache_clear()

    def test_what_is_forbidden_is_not_connected_to(
        self, session: Session, signing: Settings, receiver: Receiver, ended: str, names: dict[str, list[str]]
    ) -> None:
        names["hooks.example.test"] = ["127.0.0.1"]
        port = receiver.server_address[1]
        hosts = ("hooks.example.test", "127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "0")
        for number, host in enumerate(hosts, start=1):
            session.execute(update(WebhookDelivery).values(url=f"http://{host}:{port}/hook", last_error=None))
            _make_due(session)
            assert service.deliver_due(session, signing.model_copy(update={"webhook_networks": ()})) == 1
            row = _delivery(session)
            assert str(row.last_error).startswith("Forbidden: "), (host, row.last_error)
            assert row.next_attempt_at is not None and row.attempts == number
        assert receiver.got == []

    def test_a_user_in_a_url_that_is_stored(
        self, session: Session, signing: Settings, receiver: Receiver, ended: str
    ) -> None:
        session.execute(update(WebhookDelivery).values(url=receiver.url.replace("//", "//user:password@")))
        session.commit()
        service.deliver_due(session, signing)
        assert receiver.got == [] and str(_delivery(session).last_error).startswith("Forbidden: ")

    def test_the_address_that_was_checked_is_the_one_connected_to(
        self, session: Session, signing: Settings, receiver: Receiver, ended: str, names: dict[str, list[str]]
    ) -> None:
        """A name server that says something else the second time; and an address beside it that is forbidden."""
        names["hooks.example.test"] = ["10.0.0.1", "127.0.0.1"]
        port = receiver.server_address[1]
        session.execute(update(WebhookDelivery).values(url=f"http://hooks.example.test:{port}/hook"))
        session.commit()
        service.deliver_due(session, signing)
        assert "hooks.example.test" not in names, "looked up once"
        [(headers, _)] = receiver.got
        assert headers["Host"] == f"hooks.example.test:{port}"
        assert _delivery(session).delivered_at is not None

    def test_the_next_address_is_tried(
        self, session: Session, signing: Settings, receiver: Receiver, ended: str, names: dict[str, list[str]]
    ) -> None:
        names["hooks.example.test"] = ["127.0.0.2", "127.0.0.1"]  # the receiver listens at the second
        url = f"http://hooks.example.test:{receiver.server_address[1]}/hook"
        session.execute(update(WebhookDelivery).values(url=url))
        session.commit()
        service.deliver_due(session, signing)
        assert len(receiver.got) == 1

    def test_name_servers_that_do_not_answer_hold_up_nobody(
        self, session: Session, signing: Settings, receiver: Receiver, ended: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id, answered, resolver = _delivery(session).job_id, threading.Event(), socket.getaddrinfo
        given_up: list[str] = []

        def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
            if str(host).startswith("slow") and not answered.wait(PATIENCE):
                given_up.append(str(host))
            return resolver(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(service, "TIMEOUT", 8.0)  # in which the one that is not slow is delivered
        for number in range(20):
            url, long_ago = f"http://slow{number}.example.test/", dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
            session.add(WebhookDelivery(job_id=job_id, url=url, payload={}, next_attempt_at=long_ago))
        session.commit()
        assert service.deliver_due(session, signing) == 21
        assert not given_up, "no name server has answered yet, and none was waited for"
        answered.set()
        assert len(receiver.got) == 1

    def test_a_certificate_is_checked_against_the_name(
        self,
        session: Session,
        signing: Settings,
        receiver: Receiver,
        ended: str,
        names: dict[str, list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(CERTIFICATE)
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        for host, got in (("other.example.test", 0), ("hooks.example.test", 1)):
            names[host] = ["127.0.0.1"]
            url = f"https://{host}:{receiver.server_address[1]}/hook"
            session.execute(update(WebhookDelivery).values(url=url, next_attempt_at=func.now()))
            session.commit()
            service.deliver_due(session, signing)
            assert len(receiver.got) == got, _delivery(session).last_error
            assert ("certificate" in str(_delivery(session).last_error)) == (got == 0)

    def test_no_proxy_of_the_environment(
        self, session: Session, signing: Settings, receiver: Receiver, ended: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        service.deliver_due(session, signing)
        assert len(receiver.got) == 1

    def test_bad_networks_stop_the_service(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for networks in ("10.0.0.0/33", "10.0.0.1/8", "private"):
            monkeypatch.setenv("SECATEUR_WEBHOOK_NETWORKS", networks)
            with pytest.raises(ValidationError, match="webhook_networks"):
                Settings()

    @pytest.fixture
    def names(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
        """Addresses by name, each to be asked for once, before the machine's own resolver."""
        known: dict[str, list[str]] = {}
        resolver = socket.getaddrinfo

        def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
            if host not in known:
                return resolver(host, port, *arguments, **options)
            return [entry for address in known.pop(host) for entry in resolver(address, port, *arguments, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return known
