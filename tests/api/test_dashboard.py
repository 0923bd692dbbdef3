"""The web page as files: what it is served with, where it is linked from, how it is turned off. tests/dashboard uses it."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from app.config import get_settings
from app.dashboard.routes import FOLDER

Serve = Callable[..., object]


def test_the_page_and_all_it_names(url: str) -> None:
    page = httpx2.get(f"{url}/")
    assert page.headers["Content-Type"].startswith("text/html") and page.headers["Cache-Control"] == "no-cache"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    named = set(re.findall(r'(?:href|src)="(/assets/[^"]+)"', page.text))
    scripts = list(FOLDER.glob("*.js"))
    for script in scripts:
        named |= {f"/assets/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    assert {f"/assets/{file.name}" for file in FOLDER.iterdir() if file.name != "index.html"} == named, "all are used"
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for address in named:
        file = httpx2.get(url + address)
        assert file.status_code == 200 and file.headers["Content-Type"].startswith(types[Path(address).suffix])
        again = httpx2.get(url + address, headers={"If-None-Match": file.headers["ETag"]})
        assert again.status_code == 304 and file.headers["Cache-Control"] == "no-cache"
    assert httpx2.get(f"{url}/assets/../routes.py").status_code == 404
    assert httpx2.get(f"{url}/assets/none.js").headers["Content-Type"] == "application/problem+json"


def test_a_report_asked_for_by_a_browser_is_the_page(url: str, api: httpx2.Client, body: dict[str, object]) -> None:
    job = api.post("/v1/jobs", json=body).json()["id"]
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    sent = httpx2.get(f"{url}/v1/jobs/{job}/report", headers={"Accept": accept})
    assert (sent.status_code, sent.headers["Location"]) == (303, f"/#/jobs/{job}")
    assert api.get(f"/v1/jobs/{job}/report").status_code == 409, "no report yet"
    assert api.get(f"/v1/jobs/{job}/report", headers={"Accept": "application/json"}).status_code == 409


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

    from app.main import create_app

    monkeypatch.setenv("SECATEUR_DASHBOARD", "false")
    get_settings.cache_clear()
    client = TestClient(create_app())
    assert client.get("/").status_code == 404 and client.get("/assets/main.js").status_code == 404
