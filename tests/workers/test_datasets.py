"""Uploaded data sets on a worker: the runner fetches them and prunes a tiny model on them."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sqlalchemy import delete
from sqlalchemy.orm import Session
from transformers import LlamaConfig, LlamaForCausalLM

from app.auth import service as auth
from app.config import Settings
from app.datasets import service as datasets
from app.datasets.content import Content, JsonLines, PlainText
from app.datasets.models import Dataset
from app.storage.store import open_store
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.run import static
from tests.engine.models import SIZES, english, make_tokenizer, save
from tests.workers.conftest import JobHandle, MakeJob
from workers import runner

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEXTS = english("calibration")
CHATS = [[{"role": "user", "content": text[:300]}, {"role": "assistant", "content": text[300:]}] for text in TEXTS]
RENDERED = ["".join(f"<{message['role']}>{message['content']}" for message in chat) for chat in CHATS]
MODEL = "local:tiny"
Report = dict[str, Any]
Prune = Callable[..., Report]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process that loads the pruned model costs seconds; the export's tests have it."""
    monkeypatch.setattr(static, "check_checkpoint", lambda decoder, folder, own_code: None)


@pytest.fixture
def owner_id(session: Session) -> uuid.UUID:
    return auth.create(session, "alice")[0].id


@pytest.fixture
def upload(settings: Settings, owner_id: uuid.UUID) -> Callable[[str, Content], Dataset]:
    def upload(text: str, content: Content) -> Dataset:
        async def chunks() -> AsyncIterator[bytes]:
            yield text.encode()

        return asyncio.run(datasets.upload(settings, owner_id, "essays", 0, chunks(), content))

    return upload


def lines(name: str, values: list[Any]) -> str:
    return "".join(json.dumps({name: value}) + "\n" for value in values)


@pytest.fixture
def make_model(settings: Settings) -> Callable[[str | None], None]:
    """A tiny model in the models folder, with this chat template."""

    def make(template: str | None) -> None:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        save(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer, settings.models_dir / "tiny")

    return make


@pytest.fixture
def prune(session: Session, settings: Settings, owner_id: uuid.UUID, tmp_path: Path) -> Prune:
    """Prune as a runner does."""

    def prune(**request: Any) -> Report:
        whole = {"model_id": MODEL, "target_ratio": 0.2, "method": "wanda", **request}
        whole["evaluation"] = {"latency": False, "samples": 4, "sequence_length": 32} | whole.get("evaluation", {})
        whole["calibration"] = {"samples": 64, "sequence_length": 32} | whole.get("calibration", {})
        found = datasets.find(session, owner_id, PruningSpec.of_request(whole).uploads())
        folder = tmp_path / str(uuid.uuid4())
        folder.mkdir()
        job = {
            "request": whole,
            "folder": str(folder),
            "output": str(folder / "output"),
            "job_id": str(uuid.uuid4()),
            "hub_token": None,
            "state": None,
            "datasets": [datasets.describe(dataset) for dataset in found],
        }
        link: Any = SimpleNamespace(job=job, tell=lambda message: None, wants_pause=lambda: False, keeps_before=False)
        return dict(runner.work(link)["report"])

    return prune


def same(found: Report, expected: Report) -> None:
    assert found["perplexity"] == expected["perplexity"] and found["widths"] == expected["widths"]


def test_texts_are_those_of_a_request(upload: Any, make_model: Any, prune: Prune) -> None:
    make_model(None)
    dataset = upload(lines("text", TEXTS), JsonLines())
    found = prune(calibration={"dataset": f"upload:{dataset.id}"})
    same(found, prune(calibration={"texts": TEXTS}))
    assert found["calibration"]["source"] == f"upload:{dataset.id}"


def test_a_text_is_the_text(upload: Any, make_model: Any, prune: Prune) -> None:
    make_model(None)
    name = f"upload:{upload(chr(0xFEFF) + TEXTS[0], PlainText()).id}"
    found = prune(calibration={"texts": TEXTS}, evaluation={"dataset": name, "perplexity": [name], "limit": 2})
    same(found, prune(calibration={"texts": TEXTS}, evaluation={"texts": [TEXTS[0]]}))
    assert name in json.dumps(found["evaluation"])


def test_chats_go_through_the_models_template(upload: Any, make_model: Any, prune: Prune) -> None:
    make_model(TEMPLATE)
    dataset = upload(lines("messages", CHATS), JsonLines())
    same(prune(calibration={"dataset": f"upload:{dataset.id}"}), prune(calibration={"texts": RENDERED}))


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        (None, "chat_template_missing", "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "text_invalid", "fails on chat 1: roles must alternate"),
        ("{% for %}", "text_invalid", "fails on chat 1"),
        ("{{ messages[0].none.none }}", "text_invalid", "fails on chat 1"),
    ],
)
def test_templates_that_cannot_render(
    upload: Any, make_model: Any, prune: Prune, template: str | None, code: str, message: str
) -> None:
    make_model(template)
    dataset = upload(lines("messages", CHATS), JsonLines())
    with pytest.raises(PruningError, match=message) as caught:
        prune(calibration={"dataset": f"upload:{dataset.id}"})
    assert (caught.value.code, caught.value.field) == (code, "calibration.dataset")
    assert not caught.value.retryable


def test_what_the_storage_lost(upload: Any, make_model: Any, prune: Prune, settings: Settings) -> None:
    make_model(None)
    dataset, store = upload(TEXTS[0], PlainText()), open_store(settings)
    store.delete([dataset.key])
    with pytest.raises(PruningError, match=f"{dataset.id} is missing") as caught:
        prune(calibration={"dataset": f"upload:{dataset.id}"})
    assert caught.value.code == "text_not_found"
    store.create(dataset.key, b"another text")
    with pytest.raises(PruningError, match=f"{dataset.id} is damaged") as caught:
        prune(calibration={"dataset": f"upload:{dataset.id}"})
    assert caught.value.code == "text_invalid"


def test_only_as_much_is_read_as_is_needed(upload: Any, make_model: Any, prune: Prune) -> None:
    """The rest of the lines would not be rendered by the template."""
    make_model(
        TEMPLATE.replace("{% for", "{% if messages[0].role == 'x' %}{{ raise_exception('read') }}{% endif %}{% for")
    )
    enough = CHATS * 3
    rest = [[{"role": "x", "content": "y"}]]
    dataset = upload(lines("messages", enough * 20 + rest), JsonLines())
    prune(evaluation={"dataset": f"upload:{dataset.id}"}, calibration={"texts": TEXTS})
    short = upload(lines("messages", rest + enough), JsonLines())
    with pytest.raises(PruningError, match="fails on chat"):
        prune(evaluation={"dataset": f"upload:{short.id}"}, calibration={"texts": TEXTS})


def test_a_job_that_is_tried_again_after_its_data_set_is_gone(
    make_job: MakeJob, supervise: Callable[[JobHandle], Any], session: Session, upload: Any
) -> None:
    dataset = upload(TEXTS[0], PlainText())
    job = make_job(calibration={"dataset": f"upload:{dataset.id}"})
    session.execute(delete(Dataset))
    session.commit()
    supervise(job).wait()
    assert (job.row.state, (job.row.error or {})["code"]) == ("failed", "text_not_found")
    assert job.worked == []
