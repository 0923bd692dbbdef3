"""Artifacts in an object store: downloads by signed URL, and by ranges that the API streams."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from secateur.client import Client
from tests import s3
from tests.api import play


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.running() as address:
        yield address


@pytest.fixture
def stored(endpoint: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a service whose artifacts are in the server."""
    for name, value in s3.settings(endpoint, str(uuid.uuid4())).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def job_id(api: httpx2.Client, body: dict[str, Any], session: Session, stored: Settings, monkeypatch: Any) -> str:
    """A job that has succeeded; its local model was checked before the service had a store."""
    with monkeypatch.context() as patch:
        patch.delenv("SECATEUR_STORAGE_URL")
        get_settings.cache_clear()
        made: str = api.post("/v1/jobs", json=body).json()["id"]
    get_settings.cache_clear()
    play.succeed(session, stored, made, play.start(session, made))
    return made


def test_a_download_is_redirected_to_the_store(api: httpx2.Client, job_id: str, endpoint: str) -> None:
    [item, _] = api.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    redirect = api.get(item["url"])
    assert redirect.status_code == 307 and redirect.headers["Location"].startswith(endpoint)
    assert "X-Amz-Signature" in redirect.headers["Location"]
    there = httpx2.get(redirect.headers["Location"], headers={"Range": "bytes=1-3"}, trust_env=False)
    assert (there.status_code, there.content) == (206, play.CONTENTS[item["name"]][1:4])


def test_the_client_follows_and_keeps_its_key(
    api: httpx2.Client, job_id: str, url: str, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, bool] = {}
    send = httpx2.HTTPTransport.handle_request

    def note(self: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        host = urlsplit(str(request.url)).netloc
        sent[host] = sent.get(host, False) or "authorization" in request.headers
        return send(self, request)

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", note)
    with Client(url, api.headers["Authorization"].removeprefix("Bearer ")) as client:
        folder = client.jobs.get(job_id).download(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == play.CONTENTS
    assert sent == {urlsplit(url).netloc: True, urlsplit(endpoint).netloc: False}, "the store never sees the API key"


def test_without_redirects_the_api_streams(
    api: httpx2.Client, job_id: str, stored: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_STORAGE_REDIRECT", "false")
    get_settings.cache_clear()
    path = f"/v1/jobs/{job_id}/artifacts/model.safetensors"
    whole = api.get(path)
    assert (whole.status_code, whole.content) == (200, play.CONTENTS["model.safetensors"])
    for header, first, end in (
        ("bytes=256-511", 256, 512),
        ("bytes=-10", 10230, 10240),
        ("bytes=10000-", 10000, 10240),
    ):
        part = api.get(path, headers={"Range": header, "If-Range": whole.headers["ETag"]})
        assert (part.status_code, part.content) == (206, play.CONTENTS["model.safetensors"][first:end]), header
    assert api.get(path, headers={"Range": "bytes=0-9", "If-Range": '"another"'}).status_code == 200
    assert api.get(path, headers={"Range": "bytes=0-1,4-5"}).status_code == 200
    assert api.head(path).headers["Content-Length"] == "10240"
