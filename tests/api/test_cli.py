"""The command line in a process of its own, against the API on a socket."""

import datetime as dt
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.config import Settings
from secateur.cli.jobs import _line
from secateur.cli.prune import _show
from secateur.contract.jobs import JobView
from secateur.contract.report import Change, ParameterChange, RatioSummary, Report
from secateur.contract.states import State
from tests.api import play
from tests.forked import secateur as run
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
JOB_ID = uuid.UUID(int=0)


@pytest.fixture
def service(url: str, api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address and key in the environment."""
    monkeypatch.setenv("SECATEUR_URL", url)
    monkeypatch.setenv("SECATEUR_API_KEY", api.headers["Authorization"].removeprefix("Bearer "))
    return url


def test_keys(url: str, settings: Settings) -> None:
    made = json.loads(run("keys", "create", "carol", "--json").stdout)
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert httpx2.get(f"{url}/v1/jobs", headers=headers).status_code == 200
    [row] = json.loads(run("keys", "list", "--json").stdout)
    assert (row["id"], row["name"], row["revoked_at"]) == (made["id"], "carol", None)
    assert made["secret"] not in run("keys", "list").stdout
    assert run("keys", "revoke", made["id"]).returncode == 0
    assert httpx2.get(f"{url}/v1/jobs", headers=headers).status_code == 401
    assert "revoked" in run("keys", "list").stdout
    assert run("keys", "revoke", "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10").returncode == 2
    plain = run("keys", "create", "dave")
    assert plain.stdout.startswith("sk-secateur-") and len(plain.stdout.split()) == 1


def test_metrics_are_a_table(service: str, api: httpx2.Client, body: dict[str, Any], session: Session) -> None:
    job_id = api.post("/v1/jobs", json=body).json()["id"]
    attempt = play.start(session, job_id)
    for number in (0, 1):
        play.finish_round(session, job_id, attempt, number)
    lines = run("metrics", job_id).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "0", "1"] and len({len(line) for line in lines}) == 1
    assert "11" in lines[2].split() and "-" in lines[2].split()
    rows = [json.loads(line) for line in run("metrics", job_id, "--json").stdout.splitlines()]
    assert rows == api.get(f"/v1/jobs/{job_id}/metrics").json()["items"]


def test_a_job_is_derived(service: str, api: httpx2.Client, body: dict[str, Any], tmp_path: Path) -> None:
    earlier = api.post("/v1/jobs", json=body | {"method": "flap", "seed": 7}).json()
    recipe = tmp_path / "changes.yaml"
    recipe.write_text("seed: null\nlabels: {run: '2'}\n")
    arguments = ["submit", "--from", earlier["id"], "--recipe", str(recipe), "--ratio", "0.3"]
    made = json.loads(run(*arguments, "--json").stdout)
    asked = made["request"]
    assert (made["derived_from"], asked["model_id"], asked["method"]) == (earlier["id"], body["model_id"], "flap")
    assert (asked["target_ratio"], asked["seed"], asked["labels"]) == (0.3, 0, {"run": "2"})
    absent = run("submit", "--from", str(JOB_ID))
    assert absent.returncode == 2 and str(JOB_ID) in absent.stderr


def test_migrate(empty_database_url: str) -> None:
    environment = {"SECATEUR_DATABASE_URL": empty_database_url}
    assert run("migrate", environment=environment).returncode == 0
    assert run("keys", "list", environment=environment).returncode == 0
    away = run("migrate", environment={"SECATEUR_DATABASE_URL": "postgresql+psycopg://x@127.0.0.1:9/x"})
    assert away.returncode == 3 and "cannot be reached" in away.stderr and "Traceback" not in away.stderr


def test_what_is_wrong_around_it_is_said_without_a_traceback(settings: Settings, empty_database_url: str) -> None:
    cases: list[tuple[list[str], dict[str, str], int, str]] = [
        (["status", str(JOB_ID)], {}, 2, "no API key: set SECATEUR_API_KEY or --api-key"),
        (["status", str(JOB_ID), "--api-key", "é"], {}, 2, "characters"),
        (["keys", "list"], {"DATABASE_URL": "nonsense"}, 2, "SECATEUR_DATABASE_URL: "),
        (["migrate"], {"DATABASE_URL": "mysql://hunter2@h/x"}, 2, "SECATEUR_DATABASE_URL: "),
        (["up"], {"LEASE_TTL": "long"}, 2, "SECATEUR_LEASE_TTL: "),
        (["keys", "list"], {"DATABASE_URL": empty_database_url}, 2, "run 'secateur migrate'"),
        (["up", "--port", "99999"], {}, 2, "'--port'"),
        (["keys", "create", ""], {}, 2, "NAME: "),
        (["keys", "create", "a\nb"], {}, 2, "NAME: "),
        (["prune", "m", "--ratio", "0.2", "--output", __file__], {}, 2, "'--output'"),
        (["prune", "m", "--output", "x"], {}, 2, "give either 'target_ratio' or 'goal'"),
        (["prune", "m", "--ratio", "0.2", "--ratio", "2", "--output", "x"], {}, 2, "target_ratio.1"),
        (["prune", "m", "--ratio", "0.2", "--recovery", "x", "--output", "x"], {}, 2, "recovery.layerwise.kind"),
        (["prune", "m", "--ratio", "0.2", "--output", "x", "--calibration", sys.executable], {}, 2, "UTF-8"),
    ]
    for arguments, variables, code, hint in cases:
        ended = run(*arguments, environment={f"SECATEUR_{name}": value for name, value in variables.items()})
        assert ended.returncode == code, (arguments, ended.stderr)
        assert hint in ended.stderr and "Traceback" not in ended.stderr, (arguments, ended.stderr)
        assert "hunter2" not in ended.stderr


def test_submit_status_cancel(service: str, body: dict[str, Any], tmp_path: Path) -> None:
    submitted = run("submit", "local:tiny", "--ratio", "0.2", "--method", "piem", "--rounds", "2", "--repo-id", "org/b")
    job_id = submitted.stdout.strip()
    assert submitted.returncode == 0, submitted.stderr
    shown = run("status", job_id, "--json")
    job = json.loads(shown.stdout)
    assert shown.returncode == 0
    assert (job["state"], job["request"]["rounds"], job["request"]["publish"]["repo_id"]) == ("queued", 2, "org/b")
    assert "queued" in run("cancel", job_id).stdout or "cancelled" in run("status", job_id).stdout
    assert run("status", job_id).returncode == 1
    request = tmp_path / "request.json"
    request.write_text(json.dumps(body | {"labels": {"a": "b"}}))
    job = json.loads(run("submit", "--recipe", str(request), "--ratio", "0.3", "--json").stdout)
    assert (job["request"]["target_ratio"], job["labels"]) == (0.3, {"a": "b"})
    request.write_text(json.dumps(body | {"recovery": {"training": {"kind": "distill", "rank": 4}}}))
    several = ("--ratio", "0.2", "--ratio", "0.5", "--training", "lora")
    job = json.loads(run("submit", "--recipe", str(request), *several, "--json").stdout)
    assert job["request"]["target_ratio"] == [0.2, 0.5]
    assert [job["request"]["recovery"]["training"][name] for name in ("kind", "rank")] == ["lora", 4]


def test_a_job_of_several_targets_shows_every_repository() -> None:
    made = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    job = JobView(
        id=JOB_ID, state=State.SUCCEEDED, model_id="a/b", method="piem", labels={}, attempt=1, failures=0,
        pause_requested=False, created_at=made, request={},
    )  # fmt: skip
    job.result = {"targets": [{"repo_id": "org/a-20"}, {"repo_id": "org/a-50"}]}
    assert _line(job).endswith("succeeded  published to org/a-20, org/a-50")
    job.result = {"targets": [{"target_ratio": 0.2}]}
    assert "published" not in _line(job)


def test_refusals(service: str, body: dict[str, Any], tmp_path: Path) -> None:
    refused = run("submit", "local:tiny", "--ratio", "2", "--method", "piem")
    assert refused.returncode == 2 and "target_ratio" in refused.stderr and "at most 0.9" in refused.stderr
    assert run("submit", "--request", str(tmp_path / "none")).returncode == 2
    assert run("status", "no-uuid").returncode == 2
    assert run("status", "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10").returncode == 2
    assert run("status", "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10", "--api-key", "x").returncode == 2
    for url in ("http://127.0.0.1:9", "nonsense"):
        away = run("watch", "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10", "--url", url)
        assert away.returncode == 3, away.stderr
        assert "cannot be reached" in away.stderr and "Traceback" not in away.stderr


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_watch(
    service: str, api: httpx2.Client, body: dict[str, Any], session: Session, settings: Settings, good: bool, code: int
) -> None:
    job_id: str = api.post("/v1/jobs", json=body).json()["id"]
    attempt = play.start(session, job_id)
    play.progress(session, job_id, attempt, 0.25)

    def work() -> None:
        play.progress(session, job_id, attempt, 0.75)
        if good:
            play.succeed(session, settings, job_id, attempt)
        else:
            play.fail(session, job_id, attempt)

    argv = [sys.executable, "-m", "secateur", "watch", job_id]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(argv, **pipes) as watching:
        assert watching.stdout is not None
        first = watching.stdout.readline()
        work()
        rest, complaint = watching.communicate(timeout=PATIENCE)
    assert watching.returncode == code, complaint
    lines = [first, *rest.splitlines()]
    assert "scoring" in lines[0] and "25%" in lines[0] and "step 1/2" in lines[0]
    assert ("published to secateur/tiny" if good else "The weights have NaN. (nan_weights)") in lines[-1]
    assert run("status", job_id).returncode == code


def test_a_perplexity_beyond_all_numbers_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    parts: dict[str, Any] = {
        "parameters": ParameterChange(before=10, after=8, prunable_before=10, prunable_after=8),
        "ratio": RatioSummary(target=0.2, reached=0.2, of_all_parameters=0.2, of_flops=0.2),
        "perplexity": Change(before=9.5, after=None),
    }
    _show(Path("out"), Report.model_construct(**parts))
    assert "perplexity 9.50 -> infinite" in capsys.readouterr().out
