"""The main job as a user sees it: ``secateur up``, HTTP, a real pruning of a small model, a repository that loads."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.catalog.methods import METHODS
from secateur.client import Client, JobFailed
from tests.engine.models import SIZES, english, make_tokenizer, save, train
from tests.patience import PATIENCE, wait_for
from tests.workers.conftest import SHORT, alive
from tests.workers.test_stack import address_and_key

STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The keeper of the", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0])
assert not any(name.split(".")[0] in ("app", "workers") for name in sys.modules)
print(json.dumps({"text": text, "parameters": sum(p.numel() for p in model.parameters())}))
"""


@dataclass
class Service:
    """A running ``secateur up`` and a client with its key."""

    process: subprocess.Popen[bytes]
    client: httpx2.Client
    data: Path

    def post(self, **changes: Any) -> httpx2.Response:
        return self.client.post("/v1/jobs", json=request(**changes))

    def submit(self, **changes: Any) -> str:
        response = self.post(**changes)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/jobs/{job_id}").json())

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        wait_for(lambda: self.job(job_id)["state"] in states)
        return self.job(job_id)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        return list(self.client.get(f"/v1/jobs/{job_id}/events", params={"page_size": 200}).json()["items"])


def request(**changes: Any) -> dict[str, Any]:
    return {
        "model_id": "local:tiny",
        "target_ratio": 0.3,
        "method": "piem-lsps",
        "rounds": 3,
        "calibration": {"texts": english("calibration"), "samples": 8, "sequence_length": 64},
        "evaluation": {
            "texts": english("evaluation"),
            "samples": 8,
            "sequence_length": 64,
            "latency": False,
            "prompts": [],
        },
        **changes,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a trained model, and the same with NaN in its weights."""
    folder = tmp_path_factory.mktemp("acceptance")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    tiny = save(train(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer, 60), tokenizer, folder / "models" / "tiny")
    broken = folder / "models" / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return folder


StartService = Callable[[], Service]


@pytest.fixture(scope="module")
def start_service(data: Path) -> Iterator[StartService]:
    running: list[Service] = []

    def begin() -> Service:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SECATEUR_")}
        environment |= {f"SECATEUR_{name}": value for name, value in SHORT.items()}
        environment |= {"SECATEUR_DATA_DIR": str(data), "SECATEUR_TORCH_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-m", "workers", "up"], stdout=subprocess.PIPE, env=environment)
        url, key = address_and_key(process, data)
        client = httpx2.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE, trust_env=False
        )
        running.append(Service(process, client, data))
        return running[-1]

    yield begin
    for service in running:
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGINT)
        service.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Service:
    return start_service()


def test_the_python_client(service: Service, tmp_path: Path) -> None:
    key = service.client.headers["Authorization"].removeprefix("Bearer ")
    shown: list[float] = []
    with Client(str(service.client.base_url), key) as client:
        job = client.jobs.create(**request(rounds=2))
        job.wait(timeout=PATIENCE, on_progress=lambda job: shown.append(job.progress.share if job.progress else 0.0))
        report = job.report()
        assert shown == sorted(shown) and shown[-1] == 1.0
        assert report.ratio == pytest.approx(0.3, abs=0.02) and len(job.steps()) == 3
        assert [len(axis.containers) for axis in report.plot_widths().axes] == [2, 2]
        weights = load_file(job.download(tmp_path / "pruned") / "model.safetensors")
        assert sum(tensor.numel() for tensor in weights.values()) == report.parameters[1]
        failing = client.jobs.create(**request(model_id="local:broken"))
        with pytest.raises(JobFailed, match="NaN"):
            failing.wait(timeout=PATIENCE)


def test_the_main_job(service: Service, tmp_path: Path) -> None:
    accepted = service.client.post("/v1/jobs", json=request(publish={"repo_id": "secateur/tiny-pruned"}))
    assert accepted.status_code == 202
    path = accepted.headers["Location"]
    while (answer := service.client.get(path, headers={"Prefer": "wait=30"})).json()["state"] not in (
        "succeeded",
        "failed",
    ):
        time.sleep(0.1)
    job = answer.json()
    assert job["state"] == "succeeded", job["error"]
    assert job["attempt"] == 1 and job["progress"]["share"] == 1

    rounds = service.client.get(f"{path}/steps").json()["items"]
    assert [row["number"] for row in rounds] == [0, 1, 2, 3]
    report = service.client.get(f"{path}/report").json()
    assert report["ratio"]["reached"] == pytest.approx(0.3, abs=0.02)
    assert report["perplexity"]["after"] == pytest.approx(rounds[-1]["data"]["perplexity"])
    assert job["result"]["parameters"]["after"] == report["parameters"]["after"] < report["parameters"]["before"]

    hub = service.data / "hub"
    folder = hub / "secateur" / "tiny-pruned"
    assert folder.resolve().name == job["result"]["commit_sha"]
    manifest = json.loads((folder / "secateur.json").read_text())
    assert manifest["job_id"] == job["id"] and "trust_remote_code=True" in (folder / "README.md").read_text()
    for name, environment in (
        (str(folder), {}),
        ("secateur/tiny-pruned", {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}),
    ):
        command = [sys.executable, "-c", STRANGER, name]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        stranger = json.loads(done.stdout.splitlines()[-1])
        assert stranger["parameters"] == report["parameters"]["after"] and len(stranger["text"]) > 20
    artifact = service.client.get(f"{path}/artifacts/model.safetensors")
    assert artifact.content == (folder / "model.safetensors").read_bytes()
    assert not list((service.data / "jobs" / job["id"]).glob("attempt-*"))
    assert not list((service.data / "jobs" / job["id"]).glob("step-*"))


def test_several_targets_in_one_job(service: Service, tmp_path: Path) -> None:
    job_id = service.submit(target_ratio=[0.2, 0.5], rounds=1, publish={"repo_id": "secateur/tiny-several"})
    job = service.wait(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded", job["error"]
    path = f"/v1/jobs/{job_id}"
    rounds = service.client.get(f"{path}/steps").json()["items"]
    assert [row["number"] for row in rounds] == [0, 1, 2]
    assert [row["data"]["target_ratio"] for row in rounds[1:]] == [0.2, 0.5]
    reports = service.client.get(f"{path}/report").json()["targets"]
    artifacts = {item["name"] for item in service.client.get(f"{path}/artifacts").json()["items"]}
    for ratio, name, target, report in zip(
        (0.2, 0.5),
        ("secateur/tiny-several-20", "secateur/tiny-several-50"),
        job["result"]["targets"],
        reports,
        strict=True,
    ):
        assert (target["target_ratio"], target["repo_id"], report["ratio"]["target"]) == (ratio, name, ratio)
        assert report["ratio"]["reached"] == pytest.approx(ratio, abs=0.03)
        folder = service.data / "hub" / name
        assert folder.resolve().name == target["commit_sha"]
        assert f"ratio-{ratio:g}/model.safetensors" in artifacts
    command = [sys.executable, "-c", STRANGER, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["parameters"] == target["parameters"]["after"]
    assert not list((service.data / "jobs" / job_id).glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"method": name, "rounds": None} for name in METHODS]
    + [{"method": "secateur", "rounds": 1, "recovery": {"training": {"kind": kind}}} for kind in ("lora", "distill")],
    ids=lambda changes: "-".join([changes["method"], *(each["kind"] for each in changes.get("recovery", {}).values())]),
)
def test_every_method_through_the_whole_service(changes: dict[str, Any], service: Service, tmp_path: Path) -> None:
    job = service.wait(service.submit(**changes, publish={"repo_id": "secateur/each"}), "succeeded", "failed")
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["ratio"]["reached"] == pytest.approx(0.3, abs=0.03)
    folder = service.data / "hub" / "secateur" / "each"
    done = subprocess.run([sys.executable, "-c", STRANGER, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["parameters"] == job["result"]["parameters"]["after"]


@pytest.mark.slow
def test_a_size_as_the_target(service: Service) -> None:
    whole = service.client.post("/v1/models/inspect", json={"model_id": "local:tiny"}).json()["shape"]
    wanted = whole["parameters"] - 0.3 * whole["prunable_parameters"]
    job_id = service.submit(target_ratio=None, goal={"parameters": wanted}, rounds=1, method="magnitude")
    job = service.wait(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded", job["error"]
    block = 32 * whole["layers"][0]["prices"]["channels"]
    assert job["result"]["parameters"]["after"] == pytest.approx(wanted, abs=block)


def test_a_model_that_is_broken_inside_fails_the_job_and_not_the_worker(service: Service) -> None:
    job = service.wait(service.submit(model_id="local:broken"), "failed", "succeeded")
    assert job["error"]["code"] == "weights_not_finite" and job["error"]["retryable"] is False
    assert "up_proj" in job["error"]["message"] and job["failures"] == 1
    assert service.wait(service.submit(rounds=1, method="magnitude"), "failed", "succeeded")["state"] == "succeeded"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_id": "local:absent"}, "model_id"),
        ({"target_ratio": 0.89}, "target_ratio"),
        ({"method": "magic"}, "method"),
        ({"rounds": 0}, "rounds"),
        ({"publish": {"repo_id": "not a repo"}}, "publish.repo_id"),
        ({"calibration": {"texts": ["short"]}}, "calibration"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(changes: dict[str, Any], field: str, service: Service) -> None:
    answer = service.post(**changes)
    assert answer.status_code == 422 and answer.headers["Content-Type"] == "application/problem+json"
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_pause_resume_and_cancel(service: Service) -> None:
    job_id = service.submit(rounds=64, target_ratio=0.4)
    wait_for(lambda: any(event["type"] == "step" for event in service.events(job_id)))
    assert service.client.post(f"/v1/jobs/{job_id}/pause").status_code == 200
    service.wait(job_id, "paused")
    done = len(service.client.get(f"/v1/jobs/{job_id}/steps").json()["items"])
    assert 1 <= done < 65
    assert service.client.post(f"/v1/jobs/{job_id}/resume").status_code == 200
    wait_for(lambda: len(service.client.get(f"/v1/jobs/{job_id}/steps").json()["items"]) > done)
    assert service.client.post(f"/v1/jobs/{job_id}/cancel").status_code in (200, 202)
    assert service.wait(job_id, "cancelled", "succeeded")["state"] == "cancelled"


def test_kill_9_of_everything_and_the_next_up_goes_on(service: Service, start_service: StartService) -> None:
    job_id = service.submit(rounds=16, publish={"repo_id": "secateur/survivor"})
    wait_for(lambda: len(service.client.get(f"/v1/jobs/{job_id}/steps").json()["items"]) >= 3)
    family = psutil.Process(service.process.pid).children(recursive=True)
    service.process.kill()
    service.process.wait()
    wait_for(lambda: not any(alive(process.pid) for process in family))

    again = start_service()
    with psycopg.connect((again.data / "database-url").read_text().strip().replace("+psycopg", "")) as connection:
        connection.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 second' WHERE id = %s", [job_id])
    job = again.wait(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded", job["error"]
    assert job["attempt"] == 2 and job["failures"] == 0, "rounds were completed since"
    numbers = [event["data"]["number"] for event in again.events(job_id) if event["type"] == "step"]
    assert numbers == list(range(17)), "no round was done twice, none was left out"
    assert (service.data / "hub" / "secateur" / "survivor" / "model.safetensors").exists()
