"""Data sets that clients upload: what is refused, whose they are, what they count, and how they go."""

import asyncio
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.models import ApiKey
from app.config import Settings, get_settings
from app.datasets import content, routes
from app.datasets import service as datasets
from app.http.problem import Problem
from app.jobs import service as jobs
from app.jobs.models import Job
from app.storage import repository
from app.storage.models import Deletion
from app.storage.service import delete_requested
from app.storage.store import open_store
from secateur.client import ApiError, AsyncClient, Client
from secateur.contract.datasets import DatasetView
from secateur.contract.keys import Scope
from tests.api import play
from tests.forked import secateur as run
from tests.patience import wait_for

Make = Callable[..., httpx2.Client]
Body = dict[str, Any]
TEXT, LINES = "text/plain", "application/x-ndjson"
CHAT = '{"messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":""}]}\n'


def upload(client: httpx2.Client, body: Any, media_type: str = TEXT, name: str = "essays") -> httpx2.Response:
    headers = {"Content-Type": media_type}
    return client.post("/v1/datasets", params={"name": name}, content=body, headers=headers)


def made(client: httpx2.Client, body: Any, media_type: str = TEXT, name: str = "essays") -> Body:
    answer = upload(client, body, media_type, name)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def check_in_pieces(checks: content.Content, body: bytes, size: int) -> None:
    for start in range(0, len(body), size):
        checks.feed(body[start : start + size])
    checks.close()


@pytest.fixture
def change(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings of the service before it starts."""

    def change(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"SECATEUR_{name.upper()}", str(value))
        get_settings.cache_clear()

    return change


class TestUpload:
    @pytest.mark.parametrize(
        ("body", "media_type", "kind", "lines"),
        [
            ("Ein Käse\n\nund mehr", TEXT, "text", 3),
            ("one\n", "text/plain; charset=UTF-8", "text", 1),
            ('{"text":"a"}\n{"text":"b"}', LINES, "texts", 2),
            ('\ufeff{"text":"a"}\r\n', "application/jsonl", "texts", 1),
            (CHAT * 3, LINES, "messages", 3),
        ],
    )
    def test_what_comes_back(self, api: httpx2.Client, body: str, media_type: str, kind: str, lines: int) -> None:
        answer = upload(api, body, media_type)
        assert answer.status_code == 201, answer.text
        view, encoded = answer.json(), body.encode()
        expected = {"name": "essays", "kind": kind, "lines": lines, "size": len(encoded)}
        assert view == view | expected | {"sha256": hashlib.sha256(encoded).hexdigest()}
        assert answer.headers["Location"] == f"/v1/datasets/{view['id']}"
        assert api.get(answer.headers["Location"]).json() == view

    def test_the_object_is_the_upload(self, api: httpx2.Client, session: Session, settings: Settings) -> None:
        view = made(api, CHAT, LINES)
        owner_id = session.scalars(select(ApiKey.id)).one()
        key = f"datasets/{owner_id}/{view['id']}/content"
        assert open_store(settings).read(key, 1000).decode() == CHAT
        assert session.scalars(select(Deletion)).all() == []
        assert [path.name for path in settings.data_dir.iterdir() if path.is_file()] == [], "nothing half-made"

    @pytest.mark.parametrize(
        ("body", "media_type", "message"),
        [
            (b"", TEXT, "the text is empty"),
            (b"\xef\xbb\xbf \n\t\r\n", TEXT, "the text is empty"),
            (b"a\nb\n\xff", TEXT, "line 3: not UTF-8"),
            (b"a\n\xed\xa0\x80", TEXT, "line 2: not UTF-8"),
            ("a\nü".encode()[:-1], TEXT, "line 2: not UTF-8"),
            (b"a\n\nb\x00", TEXT, "line 3: a NUL character"),
            (b"", LINES, "there are no lines"),
            (b'{"text":"a"}\n\n{"text":"b"}', LINES, "line 2: not JSON"),
            (b'{"text":"a"}\n{"text":"b', LINES, "line 2: not JSON"),
            (b'{"text":"a"}\n{"text":"\xff"}', LINES, "line 2: not UTF-8"),
            (b'{"text":"a"}\n[1]', LINES, "line 2: no JSON object"),
            (b'{"text":"a"}\n{}', LINES, "line 2: text: Field required"),
            (b'{"text":"a"}\n{"text":7}', LINES, "line 2: text: Input should be a valid string"),
            (b'{"text":"a"}\n{"text":""}', LINES, "line 2: text: String should have at least 1"),
            (b'{"text":"a"}\n{"text":"\\u0000"}', LINES, "line 2: text: a text with a NUL character"),
            (b'{"text":"a"}\n{"text":"\\ud800"}', LINES, "line 2: text: Input should be a valid string, unable"),
            (b'{"text":"a"}\n{"text":"b","url":"c"}', LINES, "line 2: url: unknown field"),
            (b'{"text":"a"}\n{"text":"b","text":"c"}', LINES, "line 2: text: the name occurs twice"),
            (b'{"text":"a"}\n' + CHAT.encode(), LINES, "line 2: it has 'messages', but line 1 has 'text'"),
            (CHAT.encode() + b'{"text":"a"}', LINES, "line 2: it has 'text', but line 1 has 'messages'"),
            (b'{"messages":[]}', LINES, "line 1: messages: List should have at least 1 item"),
            (b'{"messages":"x"}', LINES, "line 1: messages: Input should be a valid list"),
            (b'{"messages":[{"role":"user"}]}', LINES, "line 1: messages.0.content: Field required"),
            (b'{"messages":[{"role":"user","content":"\\u0000"}]}', LINES, "line 1: messages.0.content: String should"),
            (b'{"messages":[{"role":"user","content":"a","name":"b"}]}', LINES, "line 1: messages.0.name: unknown field"),
            (b'{"text":"' + b"[" * 100 + b'"}\n' + b"[" * 100, LINES, "line 2: nested more than"),
            (b'{"messages":[' + b"[]," * 30_000 + b"[]]}", LINES, "line 1: more than 25,000 values"),
        ],
    )  # fmt: skip
    def test_what_is_refused(
        self, api: httpx2.Client, settings: Settings, body: bytes, media_type: str, message: str
    ) -> None:
        answer = upload(api, body, media_type)
        assert (answer.status_code, answer.json()["code"]) == (422, "text_invalid"), answer.text
        error = answer.json()["errors"][0]
        assert error["field"] == "body" and error["message"].startswith(message), error
        assert '{"text": …}' in error["allowed"]
        assert api.get("/v1/datasets").json()["items"] == []
        assert not list(settings.data_dir.glob("storage/datasets/*/*"))

    def test_errors_are_at_the_same_line_however_the_bytes_arrive(self) -> None:
        body = b'{"text":"\xc3\xbc"}\n' * 3 + b'{"text":"\xc3"}\n'
        for check in (content.PlainText, content.JsonLines):
            for size in (1, 2, 7, 1000):
                with pytest.raises(Problem, match="line 4: not UTF-8"):
                    check_in_pieces(check(), body, size)

    def test_a_line_that_does_not_end(self, api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(content, "LONGEST_LINE", 1000)
        for end in (b'"}', b'"}\n'):
            answer = upload(api, b'{"text":"a"}\n{"text":"' + b"x" * 1000 + end, LINES)
            assert answer.json()["errors"][0]["message"] == "line 2: longer than 1,000 bytes"
        assert upload(api, b"x" * 5000).status_code == 201, "a plain text may be one line"

    @pytest.mark.parametrize("media_type", ["application/json", "", "text/html", "text/plain; charset=latin-1"])
    def test_types(self, api: httpx2.Client, media_type: str) -> None:
        answer = upload(api, b"text", media_type)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
        assert "application/x-ndjson" in answer.json()["detail"]

    @pytest.mark.parametrize(("name", "kind"), [("chats.jsonl", "messages"), ("chats", "text")])
    def test_a_name_may_tell_the_type(self, api: httpx2.Client, name: str, kind: str) -> None:
        assert upload(api, CHAT.encode(), "application/octet-stream", name=name).json()["kind"] == kind

    def test_encodings(self, api: httpx2.Client) -> None:
        headers = {"Content-Type": TEXT, "Content-Encoding": "gzip"}
        assert api.post("/v1/datasets?name=a", content=b"text", headers=headers).status_code == 415

    @pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\x00b"])
    def test_names(self, api: httpx2.Client, name: str) -> None:
        answer = upload(api, b"text", name=name)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "name")

    def test_a_name_is_needed(self, api: httpx2.Client) -> None:
        assert api.post("/v1/datasets", content=b"text", headers={"Content-Type": TEXT}).status_code == 422

    def test_the_scope(self, make_client: Make) -> None:
        for scopes in ([Scope.READ], [Scope.ADMIN]):
            answer = upload(make_client("reader", scopes), b"text")
            assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")

    def test_the_same_again_is_another(self, api: httpx2.Client) -> None:
        first, second = made(api, b"text"), made(api, b"text")
        assert first["id"] != second["id"] and first["sha256"] == second["sha256"]


class TestSize:
    @pytest.fixture
    def api(self, change: Callable[..., None], request: pytest.FixtureRequest) -> httpx2.Client:
        change(max_dataset_bytes=100_000, max_body_bytes=1000)
        return request.getfixturevalue("make_client")("alice")

    @pytest.mark.parametrize("in_chunks", [False, True])
    def test_the_limit_is_the_data_sets_own(self, api: httpx2.Client, in_chunks: bool) -> None:
        def body(size: int) -> Any:
            return iter([b"x" * (size // 10)] * 10) if in_chunks else b"x" * size

        assert made(api, body(100_000))["size"] == 100_000
        answer = upload(api, body(100_010))
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert api.post("/v1/jobs", content=b"{" + b" " * 2000 + b"}").status_code == 413, (
            "other bodies keep their limit"
        )


def test_a_large_body_is_not_held(api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked at once is a piece, and it is on the disk before the next piece is read."""
    sizes: list[int] = []
    feed = content.JsonLines.feed

    def watched(self: content.JsonLines, piece: bytes) -> None:
        sizes.append(len(piece) + len(self._rest))
        feed(self, piece)

    monkeypatch.setattr(content.JsonLines, "feed", watched)
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    count = 16 * datasets.PIECE // len(line)

    def body() -> Iterator[bytes]:
        for _ in range(count):
            yield line

    view = made(api, body(), LINES)
    assert (view["lines"], view["size"]) == (count, count * len(line))
    assert len(sizes) > 8 and max(sizes) < 2 * datasets.PIECE


def test_a_key_uploads_a_few_at_once(api: httpx2.Client, make_client: Make) -> None:
    go = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"text"
        go.wait()
        yield b"text"

    threads = [threading.Thread(target=made, args=(api, slow())) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(routes._uploads) == 4)
        answer = upload(api, b"text")
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_at_once")
        made(make_client("bob"), b"text")
    finally:
        go.set()
        for thread in threads:
            thread.join()
    made(api, b"text")


class TestOwners:
    def test_another_keys_data_set_is_not_there(self, api: httpx2.Client, make_client: Make, body: Body) -> None:
        view, bob = made(api, b"text"), make_client("bob")
        assert bob.get(f"/v1/datasets/{view['id']}").status_code == 404
        assert bob.delete(f"/v1/datasets/{view['id']}").status_code == 404
        assert bob.get("/v1/datasets").json()["items"] == []
        assert bob.get("/v1/datasets?key_id=all").status_code == 403
        api.get(f"/v1/datasets/{view['id']}").raise_for_status()

    @pytest.mark.parametrize("field", ["calibration.dataset", "evaluation.dataset", "evaluation.perplexity.1"])
    def test_a_job_names_the_keys_own(
        self, api: httpx2.Client, make_client: Make, body: Body, field: str, session: Session
    ) -> None:
        other = made(make_client("bob"), b"text")["id"]
        own = made(api, b"text")["id"]
        part, name, *_ = field.split(".")

        def request(dataset: str) -> Body:
            return body | {part: {name: ["wikitext2", dataset] if name == "perplexity" else dataset}}

        for missing in (other, str(uuid.uuid4()), own.upper(), own.replace("-", ""), "x", ""):
            for path in ("/v1/jobs", "/v1/jobs?validate_only=true"):
                answer = api.post(path, json=request(f"upload:{missing}"))
                assert (answer.status_code, answer.json()["code"]) == (422, "text_not_found"), (missing, answer.text)
                assert answer.json()["errors"][0]["field"] == field
        assert session.scalars(select(Job)).all() == []
        assert api.post("/v1/jobs?validate_only=true", json=request(f"upload:{own}")).status_code == 200
        assert api.post("/v1/jobs", json=request(f"upload:{own}")).status_code == 202

    def test_an_administrator_sees_and_deletes_all(
        self, api: httpx2.Client, make_client: Make, session: Session, body: Body
    ) -> None:
        view, admin = made(api, b"text"), make_client("root", [Scope.ADMIN, Scope.READ, Scope.SUBMIT])
        assert admin.get("/v1/datasets").json()["items"] == []
        auth.revoke(session, session.scalars(select(ApiKey.id).where(ApiKey.name == "alice")).one())
        assert admin.get("/v1/datasets?key_id=all").json()["items"] == [view]
        named = body | {"calibration": {"dataset": f"upload:{view['id']}"}}
        assert admin.post("/v1/jobs", json=named).json()["code"] == "text_not_found", "it is not the administrator's"
        assert admin.delete(f"/v1/datasets/{view['id']}").status_code == 204

    def test_pages(self, api: httpx2.Client) -> None:
        ids = [made(api, b"text", name=str(number))["id"] for number in range(5)]
        found, token = [], None
        while True:
            parameters = {"page_size": 2} | ({"page_token": token} if token else {})
            page = api.get("/v1/datasets", params=parameters).json()
            found += [item["id"] for item in page["items"]]
            if (token := page["next_page_token"]) is None:
                break
        assert found == ids[::-1]


class TestQuota:
    @pytest.fixture
    def api(self, change: Callable[..., None], request: pytest.FixtureRequest) -> httpx2.Client:
        change(max_stored_bytes=1000)
        return request.getfixturevalue("make_client")("alice")

    @pytest.mark.parametrize("in_chunks", [False, True])
    def test_bytes_count(self, api: httpx2.Client, body: Body, in_chunks: bool, session: Session) -> None:
        def content(size: int) -> Any:
            return iter([b"x" * size]) if in_chunks else b"x" * size

        first = made(api, content(600))
        answer = upload(api, content(401))
        assert (answer.status_code, answer.json()["code"]) == (403, "storage_quota_exceeded")
        assert "600" in answer.json()["detail"] and "1,000" in answer.json()["detail"]
        made(api, content(400))
        assert api.post("/v1/jobs", json=body).json()["code"] == "storage_quota_exceeded"
        assert api.delete(f"/v1/datasets/{first['id']}").status_code == 204
        assert repository.bytes_of(session, session.scalars(select(ApiKey.id)).one()) == 400
        assert api.post("/v1/jobs", json=body).status_code == 202
        assert api.get("/v1/usage").json()["items"][0]["bytes_stored"] == 1000, "a deletion takes no usage back"

    def test_an_upload_that_lost_the_race_is_deleted(
        self, api: httpx2.Client, session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The quota was there when the upload began, and gone when it was stored."""
        put, store = open_store(settings).put, open_store(get_settings())

        def meanwhile(file: Any, key: str) -> Any:
            monkeypatch.setattr(store, "put", put)
            made(api, b"x" * 900)
            return put(file, key)

        monkeypatch.setattr(store, "put", meanwhile)
        assert upload(api, b"y" * 500).status_code == 403
        session.rollback()
        left = session.scalars(select(Deletion)).one()
        assert store.read(f"{left.folder}content", 1000) == b"y" * 500
        delete_requested(session, store)
        assert store.read(f"{left.folder}content", 1000), "an upload may take a day"
        left.due_at = left.due_at.replace(year=2000)
        session.commit()
        delete_requested(session, store)
        assert [found.size for found in store.listing("datasets")] == [900]


class TestDeletion:
    def named(self, api: httpx2.Client, body: Body, view: Body) -> str:
        answer = api.post("/v1/jobs", json=body | {"evaluation": {"perplexity": [f"upload:{view['id']}"]}})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def test_the_object_goes(self, api: httpx2.Client, session: Session, settings: Settings) -> None:
        view, kept = made(api, b"text"), made(api, b"text")
        assert api.delete(f"/v1/datasets/{view['id']}").status_code == 204
        assert api.delete(f"/v1/datasets/{view['id']}").status_code == 404
        delete_requested(session, open_store(settings))
        assert [found.key.split("/")[2] for found in open_store(settings).listing("datasets")] == [kept["id"]]

    def test_an_open_job_keeps_it(self, api: httpx2.Client, body: Body, session: Session) -> None:
        view = made(api, b"text")
        job = self.named(api, body, view)
        other = made(api, b"text")
        assert api.delete(f"/v1/datasets/{other['id']}").status_code == 204, "no job names it"
        attempt = play.start(session, job)
        answer = api.delete(f"/v1/datasets/{view['id']}")
        assert (answer.status_code, answer.json()["code"]) == (409, "dataset_in_use")
        assert job in answer.json()["detail"]
        play.fail(session, job, attempt)
        assert api.delete(f"/v1/datasets/{view['id']}").status_code == 204

    def test_a_job_and_a_deletion_at_once(
        self, api: httpx2.Client, body: Body, session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The data set is deleted after the job was checked and before it is stored."""
        view = made(api, b"text")
        check = jobs._check_room

        def late(*arguments: Any) -> None:
            assert api.delete(f"/v1/datasets/{view['id']}").status_code == 204
            check(*arguments)

        monkeypatch.setattr(jobs, "_check_room", late)
        answer = api.post("/v1/jobs", json=body | {"calibration": {"dataset": f"upload:{view['id']}"}})
        assert (answer.status_code, answer.json()["code"]) == (422, "text_not_found")
        assert session.scalars(select(Job)).all() == []

    def test_deleting_the_job_keeps_the_data_set(self, api: httpx2.Client, body: Body, session: Session) -> None:
        view = made(api, b"text")
        job = self.named(api, body, view)
        api.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        assert api.delete(f"/v1/jobs/{job}").status_code == 204
        assert api.get(f"/v1/datasets/{view['id']}").json() == view


class TestClients:
    @pytest.fixture(autouse=True)
    def _service(self, url: str, api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECATEUR_URL", url)
        monkeypatch.setenv("SECATEUR_API_KEY", api.headers["Authorization"].removeprefix("Bearer "))

    def test_the_client(self, tmp_path: Path) -> None:
        file = tmp_path / "chats.jsonl"
        file.write_text(CHAT * 2)
        with Client() as client:
            chats = client.datasets.upload(file)
            essay = client.datasets.upload("Ein Käse", name="essay")
            with pytest.raises(ValueError, match="needs a name"):
                client.datasets.upload("text")
            assert (chats.name, chats.kind, chats.lines) == ("chats.jsonl", "messages", 2)
            assert (essay.name, essay.kind, essay.size) == ("essay", "text", len("Ein Käse".encode()))
            assert list(client.datasets.list(page_size=1)) == [essay, chats]
            assert client.datasets.get(chats.id) == chats
            client.datasets.delete(chats.id)
            assert list(client.datasets.list()) == [essay]
            file.write_text(CHAT + "{}")
            with pytest.raises(ApiError, match="line 2: ") as caught:
                client.datasets.upload(file, name="broken")
            assert caught.value.code == "text_invalid"

    def test_the_asynchronous_client(self, tmp_path: Path) -> None:
        file = tmp_path / "essay.txt"
        file.write_bytes(b"word " * 500_000)

        async def upload() -> DatasetView:
            async with AsyncClient() as client:
                return await client.datasets.upload(file)

        view = asyncio.run(upload())
        assert (view.name, view.kind, view.size) == ("essay.txt", "text", 2_500_000)

    def test_the_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "chats.jsonl"
        file.write_text(CHAT)
        done = run("datasets", "upload", str(file), "--name", "support")
        assert done.returncode == 0, done.stderr
        name = done.stdout.strip()
        assert re.fullmatch(r"upload:[0-9a-f-]{36}", name)
        listed = run("datasets", "list").stdout
        assert listed == f"{name}  messages  1 lines  {len(CHAT)} bytes  support\n"
        assert run("datasets", "delete", name).stdout == f"{name} is deleted.\n"
        assert run("datasets", "list").stdout == ""
        for arguments, message in (
            (("upload", str(tmp_path / "none")), "does not exist"),
            (("delete", "support"), "write upload:ID"),
            (("delete", name), "There is no data set"),
        ):
            refused = run("datasets", *arguments)
            told = " ".join(refused.stderr.replace("│", " ").split())  # a message may be wrapped within a frame
            assert refused.returncode == 2 and message in told
        file.write_text("{}")
        refused = run("datasets", "upload", str(file))
        assert refused.returncode == 2 and "line 1: text: Field required" in refused.stderr
