"""A body that is cheap to send is cheap to refuse, and what is wrong with it is told in a short answer."""

import json
import socket
import tracemalloc
from typing import Any

import httpx2
import pytest

from app.http import body as bodies
from app.http.problem import Problem
from secateur.catalog.request import JobRequest
from tests.patience import PATIENCE

JSON = {"Content-Type": "application/json"}
SHORT = 20_000
"""Bytes of the longest answer to a bad request."""


def _many_fields(count: int) -> bytes:
    return b"{" + b",".join(b'"field%d":1' % number for number in range(count)) + b"}"


def _refused(response: httpx2.Response, status: int, *, code: str = "invalid_request") -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    assert response.headers["Content-Type"] == "application/problem+json"
    assert len(response.content) < SHORT
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    return problem


ATTACKS = {
    "fields": (_many_fields(500_000), "more than 200 names"),
    "the same field": (b'{"x":1' + b',"x":1' * 500_000 + b"}", "more than 200 names"),
    "lists": (b"[" + b"[]," * 1_000_000 + b"[]]", "more than 25,000 values"),
    "numbers": (b'{"target_ratio":[' + b"0.1," * 1_000_000 + b"0.1]}", "more than 25,000 values"),
    "nesting": (b"[" * 1_000_000, "nested more than 20 deep"),
    "nested objects": (b'{"a":' * 1_000_000, "nested more than 20 deep"),
    "digits": (b'{"seed":' + b"1" * 1_000_000 + b"}", "a number of more than 100 digits"),
    "a long string": (b'{"model_id":"' + b"x" * 13_000_000 + b'"}', "a text of more than 12,000,000 bytes"),
    "quotes without an end": (b'{"' + rb"\"" * 7_000_000, "a text of more than 12,000,000 bytes"),
    "spaces": (b" " * 2_000_000 + b"{}", "a gap of more than 65,536 spaces"),
    "commas": (b"," * 1_000_000, "a gap of more than 65,536 spaces"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_costly_body_is_refused_before_it_is_parsed(name: str, whole: httpx2.Client) -> None:
    content, message = ATTACKS[name]
    for path in ("/v1/jobs", "/v1/models/inspect", "/v1/keys"):
        problem = _refused(whole.post(path, content=content, headers=JSON), 422)
        [error] = problem["errors"]
        assert error["field"] == "body" and message in error["message"]


@pytest.mark.parametrize("name", ATTACKS)
def test_refusing_takes_no_memory(name: str) -> None:
    """Parsed, these bodies would take up to thirty times their size."""
    content, _ = ATTACKS[name]
    tracemalloc.start()
    with pytest.raises(Problem):
        bodies.parse(content, JobRequest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_the_dearest_body_takes_a_few_times_its_size(body: dict[str, Any]) -> None:
    """Among bodies of one size, escaped texts take the most time, and texts of wide characters take the most memory."""
    size = 12 * 2**20
    texts = {"plain": ["word " * 200_000] * 12, "wide": [("\U0001f600" + "word " * 199_999)] * 12}
    peaks = {}
    for name, given in texts.items():
        content = json.dumps(body | {"calibration": {"texts": given}}, ensure_ascii=False).encode()
        tracemalloc.start()
        bodies.parse(content, JobRequest)
        _, peaks[name] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peaks["plain"] < 4 * size and peaks["wide"] < 12 * size


def test_as_many_texts_as_are_allowed(api: httpx2.Client, body: dict[str, Any]) -> None:
    texts = ["a text of several words"] * 10_000
    whole = body | {"calibration": {"texts": texts}, "evaluation": {"texts": texts}}
    assert api.post("/v1/jobs", json=whole).status_code == 202
    indented = json.dumps(whole, indent=8).encode()
    assert api.post("/v1/jobs", content=indented, headers=JSON).status_code == 202


def test_every_form_of_json_is_read(api: httpx2.Client, body: dict[str, Any]) -> None:
    text = '"line\\n \\"quoted\\" \\\\ \\u00e9 \\ud83d\\ude00 [{,:}] é 😀"'
    whole = json.dumps(body | {"calibration": {"texts": ["TEXT"], "sequence_length": 8}}).replace('"TEXT"', text)
    for content in (whole.encode(), b"\xef\xbb\xbf" + whole.encode(), b"\r\n\t " + whole.encode() + b" \n"):
        job = api.post("/v1/jobs", content=content, headers=JSON)
        assert job.status_code == 202, job.text
        kept = api.get(f"/v1/jobs/{job.json()['id']}/recipe").json()["calibration"]["texts"]
        assert kept == [json.loads(text)]


def test_errors_are_few_and_short(api: httpx2.Client, body: dict[str, Any]) -> None:
    problem = _refused(api.post("/v1/jobs", content=_many_fields(190), headers=JSON), 422)
    assert len(problem["errors"]) == 20 and "more" in problem["detail"]
    unknown = [error for error in problem["errors"] if error["message"] == "unknown field"]
    assert [error for error in unknown if "allowed" in error] == unknown[:1], "what is allowed is told once"

    long = "x" * 1_000_000
    for change in (
        {long: 1},
        {"method": long},
        {"labels": {long: "x"}},
        {"labels": {"x": long}},
        {"model_id": long},
        {"calibration": {long: 1}},
        {"publish": {"repo_id": "org/" + "x" * 190}},
        {"evaluation": {"zero_shot": [long]}},
        {"evaluation": {"perplexity": ["org/" + "x" * 250]}},
        {"webhook_url": "https://" + "x" * 5000},
        {"formats": ["x"] * 24_000},
        {"calibration": {"texts": [1] * 9_000}},
        {"target_ratio": [long]},
    ):
        problem = _refused(api.post("/v1/jobs", json=body | change), 422)
        assert long[:300] not in json.dumps(problem), list(change)
    assert len(api.get("/v1/jobs/" + "x" * 30_000).content) < SHORT
    assert len(api.get("/v1/jobs", params={"x" * 30_000: "1"}).content) < SHORT
    assert len(api.get("/v1/jobs", params={"state": "x" * 30_000}).content) < SHORT
    assert len(api.get("/v1/jobs", params=[("state", "x")] * 3_000).json()["errors"]) == 20


def test_names_that_occur_twice(api: httpx2.Client, body: dict[str, Any]) -> None:
    content = json.dumps(body)[:-1] + ', "target_ratio": 0.3}'
    [error] = _refused(api.post("/v1/jobs", content=content, headers=JSON), 422)["errors"]
    assert error == {"field": "target_ratio", "message": "the name occurs twice in one object"}


def test_what_is_no_json(api: httpx2.Client) -> None:
    for content, status, code, hint in (
        (b"{", 422, "invalid_request", "not JSON: Expecting property name"),
        (b'{"seed": NaN}', 422, "invalid_request", "'NaN' is no number"),
        (b'{"seed": -Infinity}', 422, "invalid_request", "'-Infinity' is no number"),
        (b'"\\', 422, "invalid_request", "not JSON"),
        (b'{"a": "\\x"}', 422, "invalid_request", "not JSON"),
        (b"\xff", 400, "malformed_request", "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', 400, "malformed_request", "not UTF-8"),
        ('{"seed": 1}'.encode("utf-16"), 400, "malformed_request", "not UTF-8"),
    ):
        assert hint in _refused(api.post("/v1/jobs", content=content, headers=JSON), status, code=code)["detail"]


class TestTypes:
    def test_json_types(self, api: httpx2.Client, body: dict[str, Any]) -> None:
        for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.secateur+json"):
            answer = api.post("/v1/jobs", content=json.dumps(body), headers={"Content-Type": kind})
            assert answer.status_code == 202, kind

    def test_others_are_refused_by_name(self, whole: httpx2.Client, body: dict[str, Any]) -> None:
        for path in ("/v1/jobs", "/v1/models/inspect", "/v1/keys"):
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json", "", "\xe9"):
                headers = [("Content-Type", kind.encode("latin-1"))]
                answer = whole.post(path, content=json.dumps(body), headers=headers)  # type: ignore[arg-type]
                problem = _refused(answer, 415, code="unsupported_media_type")
                assert "Content-Type: application/json" in problem["detail"]
        assert answer.headers["Accept"] == "application/json"

    def test_none_is_refused(self, api: httpx2.Client, body: dict[str, Any]) -> None:
        answer = api.post("/v1/jobs", content=json.dumps(body).encode())
        assert "has no Content-Type" in _refused(answer, 415, code="unsupported_media_type")["detail"]

    def test_compressed_bodies_are_refused(self, api: httpx2.Client) -> None:
        answer = api.post("/v1/jobs", content=b"{}", headers=JSON | {"Content-Encoding": "gzip"})
        assert "Content-Encoding" in _refused(answer, 415, code="unsupported_media_type")["detail"]


def test_a_body_that_ends_early_is_no_defect(api: httpx2.Client, url: str, caplog: pytest.LogCaptureFixture) -> None:
    address = httpx2.URL(url)
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\nAuthorization: {api.headers['Authorization']}\r\n\r\n{{"
    with socket.create_connection((address.host, address.port or 0), timeout=PATIENCE) as client:
        client.sendall(head.encode())
        client.shutdown(socket.SHUT_WR)
        client.recv(1000)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_long_number_is_refused_before_the_parser_matches_it() -> None:
    for number in (b"1" * 1_100_000, b"-0." + b"1" * 1_100_000, b"1e" + b"1" * 1_100_000):
        with pytest.raises(Problem, match="a number of more than 100 digits"):
            bodies.check_counts(b'{"seed":' + number + b"}")
    bodies.check_counts(b'{"seed":' + b"1" * 100 + b',"model_id":"' + b"1" * 1_100_000 + b'"}')


def test_small_bodies_of_one_key_are_limited(
    api: httpx2.Client, url: str, make_client: Any, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies._small_places, "each", 1)
    address = httpx2.URL(url)
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2000\r\nAuthorization: {api.headers['Authorization']}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((address.host, address.port or 0), timeout=PATIENCE) as waiting:
        waiting.sendall(head.encode())
        assert waiting.recv(100).startswith(b"HTTP/1.1 100"), "the service reads the body"
        answer = api.post("/v1/jobs", json=body)
        assert int(answer.headers["Retry-After"]) > 0
        _refused(answer, 429, code="too_many_at_once")
        assert make_client("bob").post("/v1/jobs", json=body).status_code == 202


def test_large_bodies_of_one_key_are_few(api: httpx2.Client, url: str, make_client: Any, body: dict[str, Any]) -> None:
    """So that their sum is bounded; another key's are taken."""
    address, waiting = httpx2.URL(url), []
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2000000\r\nAuthorization: {api.headers['Authorization']}\r\nExpect: 100-continue\r\n\r\n"
    large = json.dumps(body | {"calibration": {"texts": ["word " * 200_000] * 2}})
    for _ in range(4):
        waiting.append(socket.create_connection((address.host, address.port or 0), timeout=PATIENCE))
        waiting[-1].sendall(head.encode())
        assert waiting[-1].recv(100).startswith(b"HTTP/1.1 100"), "the service reads the body"
    answer = api.post("/v1/jobs", content=large, headers=JSON)
    assert int(answer.headers["Retry-After"]) > 0
    _refused(answer, 429, code="too_many_at_once")
    assert api.post("/v1/jobs", json=body).status_code == 202, "a small one"
    assert make_client("bob").post("/v1/jobs", content=large, headers=JSON).status_code == 202
    for connection in waiting:
        connection.close()
