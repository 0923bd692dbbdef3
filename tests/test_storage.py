"""The object store: a folder, and a real server of the S3 protocol."""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from pydantic import ValidationError
from sqlalchemy.orm import Session
from transformers import LlamaConfig, LlamaForCausalLM

from app.config import Settings, get_settings
from app.db.session import session_factory
from app.storage import library, repository, service
from app.storage.service import MARKER, StorageMismatch
from app.storage.store import CHUNK, ObjectDamaged, ObjectMissing, Store, open_store
from secateur.catalog.sources import locate, read_shape
from secateur.contract.errors import PruningError
from tests import s3
from tests.engine.models import SIZES, make_tokenizer, save

Change = Callable[..., Settings]


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    with s3.running() as address:
        yield address


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store((tmp_path / "store").as_uri(), {})
    endpoint = request.getfixturevalue("endpoint")
    return Store(f"s3://{s3.BUCKET}/{uuid.uuid4()}", {"endpoint": endpoint, **s3.ACCESS})


@pytest.fixture
def use_s3(endpoint: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose store is a folder of the bucket that no other test uses."""
    for name, value in s3.settings(endpoint, str(uuid.uuid4())).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return get_settings()


def test_files_come_back_as_they_went(store: Store, tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK + 7)
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "empty").touch()
    digest = store.put_file(tmp_path / "large", "jobs/a/large")
    assert (digest.size, digest.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert store.put_file(tmp_path / "empty", "jobs/a/empty").size == 0
    store.get_file("jobs/a/large", tmp_path / "back" / "large", digest.sha256)
    assert (tmp_path / "back" / "large").read_bytes() == content
    assert b"".join(store.stream("jobs/a/large")) == content
    assert b"".join(store.stream("jobs/a/large", 5, CHUNK + 9)) == content[5 : CHUNK + 9]
    assert b"".join(store.stream("jobs/a/large", CHUNK)) == content[CHUNK:]
    assert store.read("jobs/a/empty", 0) == b""
    with pytest.raises(ValueError, match="more than 10"):
        store.read("jobs/a/large", 10)
    found = {each.key: each.size for each in store.listing("jobs")}
    assert found == {"jobs/a/large": len(content), "jobs/a/empty": 0}


def test_a_file_without_a_name(store: Store) -> None:
    content = os.urandom(2 * CHUNK + 7)
    digest = store.put(io.BytesIO(content), "datasets/a/large")
    assert (digest.size, digest.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(store.stream("datasets/a/large")) == content
    assert store.put(io.BytesIO(), "datasets/a/empty").size == 0
    assert {each.key: each.size for each in store.listing("datasets")} == {
        "datasets/a/empty": 0,
        "datasets/a/large": len(content),
    }


def test_a_folder_is_deleted_alone(store: Store) -> None:
    for key in ("jobs/1/a", "jobs/1/b/c", "jobs/10/a", "other"):
        store.create(key, b"x")
    store.delete_folder("jobs/1/")
    store.delete_folder("jobs/none/")
    store.delete(["other", "none"])
    assert [each.key for each in store.listing("jobs")] == ["jobs/10/a"]


def test_what_is_missing_or_damaged(store: Store, tmp_path: Path) -> None:
    for read in (lambda: store.read("none", 9), lambda: list(store.stream("none"))):
        with pytest.raises(ObjectMissing):
            read()
    with pytest.raises(ObjectMissing):
        store.get_file("none", tmp_path / "none")
    store.create("a", b"content")
    with pytest.raises(ObjectDamaged):
        store.get_file("a", tmp_path / "a", "00" * 32)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == [], "nothing half-written"


def test_the_first_to_create_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: store.create("marker", str(number).encode()), range(8)))
    assert made.count(True) == 1
    assert store.read("marker", 9) == str(made.index(True)).encode()


def test_signed_urls(store: Store) -> None:
    store.create("a", b"content")
    url = store.signed_url("a", 60)
    if store.root is not None:
        assert url is None
    else:
        assert url is not None and httpx2.get(url, trust_env=False).content == b"content"


def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    away = Store("s3://models/x", {"endpoint": "http://127.0.0.1:1", **s3.ACCESS})
    with pytest.raises(PruningError) as caught:
        away.read("a", 9)
    assert (caught.value.code, caught.value.retryable) == ("storage_unavailable", True)
    assert "127.0.0.1" not in caught.value.message, "the address is for the operator"


@pytest.mark.parametrize("url", ["ftp://a/b", "/srv/store", "file:store", "s3://", "file:///", "https://a/b"])
def test_urls_that_name_no_store(url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_STORAGE_URL", url)
    with pytest.raises(ValidationError, match="a storage URL is 's3://BUCKET/PREFIX'"):
        Settings()


@pytest.mark.parametrize("options", ["x", "[]", '"x"'])
def test_options_that_are_no_object(options: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_STORAGE_OPTIONS", options)
    with pytest.raises(ValidationError, match="storage options are a JSON object"):
        Settings()


def test_an_option_that_the_store_does_not_have(endpoint: str) -> None:
    with pytest.raises(ValueError, match="bogus"):
        Store("s3://models/x", {"endpoint": endpoint, **s3.ACCESS, "bogus": "x"})


class TestIdentity:
    def test_all_join_one_store(self, session: Session, settings: Settings) -> None:
        def join(_: int) -> None:
            with session_factory()() as own:
                service.join(own, open_store(settings))

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(join, range(6)))
        service.check(session, open_store(settings))
        assert open_store(settings).read(MARKER, 100).decode() == repository.identity(session)

    def test_a_folder_of_its_own_is_refused(self, session: Session, settings: Settings, tmp_path: Path) -> None:
        """What two workers on two machines have whose storage is a folder of the same name."""
        service.join(session, open_store(settings))
        another = Store((tmp_path / "another").as_uri(), {})
        for prove in (service.join, service.check):
            with pytest.raises(StorageMismatch, match="has no mark"):
                prove(session, another)
        another.create(MARKER, b"of another service")
        with pytest.raises(StorageMismatch, match="do not use the same storage"):
            service.join(session, another)
        assert another.read(MARKER, 100) == b"of another service"

    def test_a_restored_database_takes_the_mark_that_is_there(self, session: Session, settings: Settings) -> None:
        open_store(settings).create(MARKER, b"older")
        service.join(session, open_store(settings))
        assert repository.identity(session) == "older"


class TestLibrary:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        return save(LlamaForCausalLM(LlamaConfig(**SIZES)), make_tokenizer(), tmp_path / "model")

    def _store(self, settings: Settings, model: Path) -> None:
        store = open_store(settings)
        for path in model.iterdir():
            store.put_file(path, f"models/tiny/{path.name}")
        store.create("texts/essays.txt", b"text")
        store.create("texts/essays.txt2", b"another")
        store.create("tasks/quiz.jsonl", b"{}")

    def test_headers_are_enough_to_check_a_model(self, use_s3: Settings, model: Path) -> None:
        self._store(use_s3, model)
        outline = library.open_library(use_s3, "models/tiny", outline=True)
        source = locate("local:tiny", models_dir=outline.models_dir)
        assert read_shape(source) == read_shape(locate("local:model", models_dir=model.parent))
        weights = outline.models_dir / "tiny" / "model.safetensors"
        assert weights.stat().st_size == (model / "model.safetensors").stat().st_size
        assert weights.read_bytes() != (model / "model.safetensors").read_bytes()

    def test_a_worker_gets_what_a_request_names(self, use_s3: Settings, model: Path) -> None:
        self._store(use_s3, model)
        request = {
            "model_id": "local:tiny",
            "calibration": {"dataset": "local:essays.txt"},
            "evaluation": {"dataset": "wikitext2", "perplexity": ["local:none"], "zero_shot": ["quiz", "piqa"]},
        }
        found = library.open_library(use_s3, *library.library_names(request))
        for path in model.iterdir():
            assert (found.models_dir / "tiny" / path.name).read_bytes() == path.read_bytes()
        assert [path.name for path in found.texts_dir.iterdir()] == ["essays.txt"]
        assert [path.name for path in found.tasks_dir.iterdir()] == ["quiz.jsonl"]
        again = library.open_library(use_s3, *library.library_names(request))
        assert again == found, "an unchanged model is not copied again"
        moved = Settings(data_dir=use_s3.data_dir / "another machine")
        fingerprints = {
            locate("local:tiny", models_dir=each.models_dir).fingerprint()
            for each in (found, library.open_library(moved, "models/tiny"))
        }
        assert len(fingerprints) == 1, "a job goes on from its checkpoint on another machine"

    def test_names(self, use_s3: Settings, model: Path) -> None:
        self._store(use_s3, model)
        assert library.names(use_s3, "models") == ["tiny"]
        assert library.names(use_s3, "texts") == ["essays.txt", "essays.txt2"]

    def test_copies_that_nobody_uses_go(self, use_s3: Settings, model: Path) -> None:
        self._store(use_s3, model)
        old, new = (
            library.open_library(use_s3, name).models_dir.parent for name in ("texts/essays.txt", "models/tiny")
        )
        os.utime(old, (0, 0))
        library.delete_unused(use_s3)
        assert (old.exists(), new.exists()) == (False, True)


def test_options_may_be_a_file_of_secrets(
    endpoint: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secateur_storage_options").write_text(json.dumps({"endpoint": endpoint, **s3.ACCESS}))
    found = Settings(_secrets_dir=tmp_path, storage_url=f"s3://{s3.BUCKET}/secret")
    assert open_store(found).create("a", b"x")
    assert "secret-access" not in repr(found)
