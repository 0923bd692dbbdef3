"""Published once, whatever others do meanwhile: on a fake Hub through the real client, and in a folder."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings
from secateur.contract.errors import PruningError
from secateur.contract.keys import KeySettings
from secateur.hubs import FolderHub, HeadMoved, Hub, HuggingFaceHub, publish
from tests import hub as fake
from tests.hub import TOKEN, FakeHub, Repository
from tests.workers.conftest import ROOT, MakeJob, Start, wait_for

REPO = "org/small"


@pytest.fixture
def client(hub: FakeHub) -> HuggingFaceHub:
    return HuggingFaceHub(TOKEN, hub.url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "output", "job-1")


def make_model(folder: Path, job_id: str) -> Path:
    folder.mkdir()
    (folder / "secateur.json").write_text(json.dumps({"job_id": job_id}))
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "README.md").write_text("# A model\n")
    return folder


def test_a_missing_repository_is_made_private(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    commit = publish(client, REPO, True, folder, "Pruned model of job job-1")
    repository = hub.repositories[REPO]
    assert repository.private and repository.head.sha == commit and len(repository.commits) == 2
    assert repository.head.files["model.safetensors"] == b"weights" * 1000
    assert set(repository.head.files) == {".gitattributes", "README.md", "model.safetensors", "secateur.json"}
    assert client.url(REPO, commit) == f"{hub.url}/{REPO}/tree/{commit}"


def test_files_of_an_earlier_model_go_in_the_same_commit(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    hub.create(REPO, files={"model-00001-of-00002.safetensors": b"old", "secateur.json": b'{"job_id": "job-0"}'})
    publish(client, REPO, True, folder, "Pruned model of job job-1")
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2
    assert "model-00001-of-00002.safetensors" not in repository.head.files


def test_a_commit_that_comes_between_is_built_upon(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    def interfere(repository: Repository) -> None:
        hub.before_commit = lambda repository: None
        repository.add("foreign", {"other.txt": b"theirs"})

    hub.before_commit = interfere
    commit = publish(client, REPO, True, folder, "Pruned model of job job-1")
    commits = hub.repositories[REPO].commits
    assert [made.title for made in commits] == ["initial commit", "foreign", "Pruned model of job job-1"]
    assert commits[-1].sha == commit


def test_a_commit_whose_answer_was_lost_is_adopted(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    def drop_the_answer(repository: Repository) -> None:
        hub.after_commit = lambda repository: None
        raise fake._Refusal(502)

    hub.after_commit = drop_the_answer
    with pytest.raises(PruningError) as caught:
        publish(client, REPO, True, folder, "Pruned model of job job-1")
    assert (caught.value.code, caught.value.retryable) == ("hub_unavailable", True)
    assert publish(client, REPO, True, folder, "Pruned model of job job-1") == hub.repositories[REPO].head.sha
    assert len(hub.repositories[REPO].commits) == 2


def test_our_commit_is_adopted_from_below_a_foreign_one(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    ours = publish(client, REPO, True, folder, "Pruned model of job job-1")
    repository = hub.repositories[REPO]
    repository.add("theirs", {**repository.head.files, "theirs.txt": b"x"})
    assert publish(client, REPO, True, folder, "Pruned model of job job-1") == ours
    assert "theirs.txt" in repository.head.files and len(repository.commits) == 3


def test_one_who_always_loses_the_race_gives_up(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    def interfere(repository: Repository) -> None:
        repository.add("foreign", dict(repository.head.files))

    hub.before_commit = interfere
    with pytest.raises(PruningError) as caught:
        publish(client, REPO, True, folder, "Pruned model of job job-1")
    assert (caught.value.code, caught.value.retryable) == ("hub_conflict", True)


def test_what_the_token_may_not_write_is_forbidden(hub: FakeHub, client: HuggingFaceHub, folder: Path) -> None:
    with pytest.raises(PruningError) as caught:
        publish(client, "stranger/small", True, folder, "Pruned model of job job-1")
    assert (caught.value.code, caught.value.retryable) == ("hub_forbidden", False)


def test_a_wrong_token_is_forbidden(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(PruningError) as caught:
        publish(HuggingFaceHub("hf_wrong", hub.url), REPO, True, folder, "Pruned model of job job-1")
    assert (caught.value.code, caught.value.retryable) == ("hub_forbidden", False)


def test_a_hub_that_is_away_may_come_back(folder: Path) -> None:
    with pytest.raises(PruningError) as caught:
        publish(HuggingFaceHub(TOKEN, "http://127.0.0.1:9"), REPO, True, folder, "Pruned model of job job-1")
    assert (caught.value.code, caught.value.retryable) == ("hub_unavailable", True)


def test_a_worker_killed_between_the_commit_and_its_record(
    service_hub: FakeHub, make_job: MakeJob, start: Start
) -> None:
    job = make_job(publish={"repo_id": REPO, "private": True})
    worker = start("tests.workers.one_attempt", job.id)
    service_hub.after_commit = lambda repository: worker.kill()
    worker.wait()
    service_hub.after_commit = lambda repository: None
    wait_for(lambda: len(service_hub.repositories[REPO].commits) == 2)
    assert job.row.state == "publishing"
    job.sql("state = 'queued', lease_expires_at = NULL")
    start("tests.workers.one_attempt", job.id).wait()
    assert job.row.state == "succeeded" and job.row.result is not None
    repository = service_hub.repositories[REPO]
    assert len(repository.commits) == 2 and job.row.result["commit_sha"] == repository.head.sha


def test_several_targets_are_published_once_each(service_hub: FakeHub, make_job: MakeJob, start: Start) -> None:
    job = make_job(target_ratio=[0.125, 0.5], publish={"repo_id": REPO, "private": True})
    worker = start("tests.workers.one_attempt", job.id)
    service_hub.after_commit = lambda repository: worker.kill()  # after the first of the two commits
    worker.wait()
    service_hub.after_commit = lambda repository: None
    wait_for(
        lambda: (
            f"{REPO}-12_5" in service_hub.repositories and len(service_hub.repositories[f"{REPO}-12_5"].commits) == 2
        )
    )
    first = service_hub.repositories[f"{REPO}-12_5"].head.sha
    job.sql("state = 'queued', lease_expires_at = NULL")
    start("tests.workers.one_attempt", job.id).wait()
    row = job.row
    assert row.state == "succeeded" and row.result is not None and row.report is not None
    assert set(service_hub.repositories) == {f"{REPO}-12_5", f"{REPO}-50"}
    for ratio, name, target in zip([0.125, 0.5], ["12_5", "50"], row.result["targets"], strict=True):
        repository = service_hub.repositories[f"{REPO}-{name}"]
        assert len(repository.commits) == 2
        assert json.loads(repository.head.files["secateur.json"]) == {"job_id": str(job.id), "ratio": ratio}
        assert (target["target_ratio"], target["ratio"]["reached"]) == (ratio, ratio)
        assert (target["repo_id"], target["commit_sha"]) == (f"{REPO}-{name}", repository.head.sha)
        assert target["url"].endswith(f"/{REPO}-{name}/tree/{repository.head.sha}")
        assert f"ratio-{ratio:g}/model.safetensors" in job.artifacts
    assert row.result["targets"][0]["commit_sha"] == first
    assert [report["ratio"]["target"] for report in row.report["targets"]] == [0.125, 0.5]


def test_several_targets_without_publishing(make_job: MakeJob, start: Start, settings: Settings) -> None:
    job = make_job(target_ratio=[0.2])
    start("tests.workers.one_attempt", job.id).wait()
    assert job.row.state == "succeeded" and job.row.result is not None
    [target] = job.row.result["targets"]
    assert target["target_ratio"] == 0.2 and "repo_id" not in target
    assert "ratio-0.2/model.safetensors" in job.artifacts
    assert settings.hub_dir is not None and not settings.hub_dir.exists()


def test_a_forbidden_repository_fails_the_job(service_hub: FakeHub, make_job: MakeJob, start: Start) -> None:
    job = make_job(publish={"repo_id": "stranger/small", "private": True})
    start("tests.workers.one_attempt", job.id).wait()
    assert job.row.state == "failed" and job.row.error is not None and job.row.error["code"] == "hub_forbidden"


def test_the_services_token_publishes_for_those_it_is_lent_to(
    service_hub: FakeHub, make_job: MakeJob, start: Start, monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # which huggingface_hub would send by itself
    job = make_job(publish={"repo_id": REPO, "private": True})
    auth.change(session, job.row.owner_id, KeySettings(lend_hub_token=False))
    start("tests.workers.one_attempt", job.id).wait()
    assert job.row.state == "failed" and job.row.error is not None and job.row.error["code"] == "hub_forbidden"
    assert not service_hub.repositories


def test_a_repository_of_another_key_is_not_written(
    service_hub: FakeHub, make_job: MakeJob, start: Start, session: Session
) -> None:
    first, second = (make_job(publish={"repo_id": REPO, "private": True}) for _ in range(2))
    other, _ = auth.create(session, "other", settings=KeySettings(namespace="org", lend_hub_token=True))
    second.sql(f"owner_id = '{other.id}'")
    for job in (first, second):
        start("tests.workers.one_attempt", job.id).wait()
    row = second.row
    assert first.row.state == "succeeded" and row.state == "failed" and row.error is not None
    assert (row.error["code"], row.error["field"], row.failures) == ("repository_taken", "publish.repo_id", 1)
    assert len(service_hub.repositories[REPO].commits) == 2, "the initial one, and the first job's"
    assert not (second.folder / "artifacts").exists()


def test_folder_a_second_job_replaces_the_first(tmp_path: Path, folder: Path) -> None:
    hub: Hub = FolderHub(tmp_path / "hub")
    first = publish(hub, REPO, True, folder, "Pruned model of job job-1")
    assert publish(hub, REPO, True, folder, "Pruned model of job job-1") == first, "its own commit is adopted"
    second = publish(hub, REPO, True, make_model(tmp_path / "output2", "job-2"), "Pruned model of job job-2")
    assert second != first and hub.head(REPO, True) == second
    assert publish(hub, REPO, True, folder, "Pruned model of job job-1") == first, "from below the second's too"
    assert hub.head(REPO, True) == second
    assert json.loads((tmp_path / "hub" / REPO / "secateur.json").read_text()) == {"job_id": "job-2"}
    with pytest.raises(HeadMoved):
        hub.commit(REPO, first, folder, "late")


def _publish_in_folder(root: Path, folder: Path, job_id: str) -> None:
    publish(FolderHub(root), REPO, True, folder, job_id)


def test_folder_publishers_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    root = tmp_path / "hub"
    processes = [
        context.Process(
            target=_publish_in_folder, args=(root, make_model(tmp_path / f"output-{n}", f"job-{n}"), f"job-{n}")
        )
        for n in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((root / "models--org--small" / "snapshots").iterdir())) == 3


LOAD = """
import sys
from transformers import AutoModelForCausalLM
for name in sys.argv[1:]:
    print(AutoModelForCausalLM.from_pretrained(name).config.hidden_size)
"""


def test_folder_loads_by_path_and_as_a_cache(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    output = tmp_path / "output"
    LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, **sizes)).save_pretrained(output)
    (output / "secateur.json").write_text('{"job_id": "job-1"}')
    root = tmp_path / "hub"
    publish(FolderHub(root), REPO, True, output, "Pruned model of job job-1")
    environment = {**os.environ, "HF_HUB_CACHE": str(root), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-c", LOAD, str(root / REPO), REPO]
    done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["16", "16"], done.stderr


def test_folder_a_kill_between_the_commit_and_its_link_is_made_good(tmp_path: Path, folder: Path) -> None:
    hub = FolderHub(tmp_path / "hub")
    commit = publish(hub, REPO, True, folder, "Pruned model of job job-1")
    (tmp_path / "hub" / REPO).unlink()
    assert publish(hub, REPO, True, folder, "Pruned model of job job-1") == commit
    assert (tmp_path / "hub" / REPO / "secateur.json").exists()
