"""What is checked on the Hub before a job is accepted, and what is let in when the Hub does not answer."""

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet

from app.config import Settings, get_settings
from app.jobs.admission import admit
from app.jobs.tokens import HubAccess
from secateur.catalog.request import JobRequest
from tests import hub as fake
from tests.api.conftest import CONFIG

REQUEST: dict[str, Any] = {"model_id": "org/tiny", "target_ratio": 0.2, "method": "piem"}


@pytest.fixture
def hub_api(hub: fake.FakeHub, api: httpx2.Client) -> httpx2.Client:
    """The API, started on the Hub's settings."""
    return api


def test_a_job_keeps_the_commit(hub: fake.FakeHub, hub_api: httpx2.Client) -> None:
    first = hub.repositories["org/tiny"].head
    response = hub_api.post("/v1/jobs", json=REQUEST)
    assert response.status_code == 202, response.text
    assert response.json()["request"]["revision"] == first.sha
    assert response.json()["request"]["publish"] is None
    plan = hub_api.post("/v1/jobs?validate_only=true", json=REQUEST | {"revision": "main"}).json()
    assert plan["revision"] == first.sha


def test_what_the_hub_has_not(hub: fake.FakeHub, hub_api: httpx2.Client) -> None:
    hub.create("org/bare", files={"config.json": b"{}"})
    for change, code, field in [
        ({"model_id": "org/none"}, "model_not_found", "model_id"),
        ({"revision": "nope"}, "revision_not_found", "revision"),
        ({"gguf_file": "x.gguf"}, "model_not_found", "gguf_file"),
        ({"model_id": "org/bare"}, "weights_missing", "model_id"),
    ]:
        response = hub_api.post("/v1/jobs", json=REQUEST | change)
        assert (response.status_code, response.json()["code"]) == (422, code), response.text
        assert response.json()["errors"][0]["field"] == field


def test_who_may_publish_where(hub: fake.FakeHub, hub_api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    response = hub_api.post("/v1/jobs", json=REQUEST | {"publish": {"repo_id": "org/out"}})
    assert (response.status_code, response.json()["request"]["publish"]["repo_id"]) == (202, "org/out")
    for repo_id in ("tester/out", "google/out"):
        refused = hub_api.post("/v1/jobs", json=REQUEST | {"publish": {"repo_id": repo_id}})
        assert (refused.status_code, refused.json()["code"]) == (422, "namespace_forbidden")
        assert refused.json()["errors"][0]["allowed"] == "namespace org"


def test_who_may_publish_where_with_a_token_of_its_own(
    hub: fake.FakeHub, settings: Settings, make_client: Callable[..., httpx2.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_SECRET_KEYS", Fernet.generate_key().decode())
    get_settings.cache_clear()
    wanted, client = REQUEST | {"hub_token": fake.TOKEN}, make_client("bob")
    for repo_id in ("org/out", "tester/out"):
        response = client.post("/v1/jobs", json=wanted | {"publish": {"repo_id": repo_id}})
        assert (response.status_code, response.json()["request"]["publish"]["repo_id"]) == (202, repo_id)
    refused = client.post("/v1/jobs", json=wanted | {"publish": {"repo_id": "google/out"}})
    assert (refused.status_code, refused.json()["code"]) == (422, "hub_forbidden")
    assert refused.json()["errors"][0] == {
        "field": "publish.repo_id",
        "message": "the Hub token may not write there",
        "allowed": "namespaces org, tester",
    }


def test_each_of_several_repositories_is_checked(hub: fake.FakeHub, hub_api: httpx2.Client) -> None:
    several = REQUEST | {"target_ratio": [0.2, 0.5]}
    accepted = hub_api.post("/v1/jobs?validate_only=true", json=several | {"publish": {"repo_id": "org/out"}})
    assert [target["repo_id"] for target in accepted.json()["targets"]] == ["org/out-20", "org/out-50"]
    refused = hub_api.post("/v1/jobs", json=several | {"publish": {"repo_id": "google/out"}})
    assert (refused.status_code, refused.json()["code"]) == (422, "namespace_forbidden")
    unpublished = hub_api.post("/v1/jobs?validate_only=true", json=several).json()
    assert [target["repo_id"] for target in unpublished["targets"]] == [None, None]


def test_what_a_gguf_file_on_the_hub_comes_to_is_not_known_yet(hub: fake.FakeHub, hub_api: httpx2.Client) -> None:
    hub.create("org/gguf", files={"model.gguf": b""})
    wanted = {"model_id": "org/gguf", "gguf_file": "model.gguf", "method": "piem"}
    cases: list[tuple[dict[str, Any], list[float | None]]] = [
        ({"target_ratio": 0.2}, [0.2]),
        ({"target_ratio": [0.2, 0.89]}, [0.2, 0.89]),
        ({"goal": {"parameters": 1e6}}, [None]),
    ]
    for target, ratios in cases:
        response = hub_api.post("/v1/jobs?validate_only=true", json=wanted | target)
        assert response.status_code == 200, response.text
        assert [(found["target_ratio"], found["nearest_ratio"]) for found in response.json()["targets"]] == [
            (ratio, None) for ratio in ratios
        ]


@pytest.mark.parametrize(("token", "message"), [("hf_wrong", "does not accept"), ("", "no Hub token")])
def test_without_a_good_token(hub: fake.FakeHub, monkeypatch: pytest.MonkeyPatch, token: str, message: str) -> None:
    if token:
        monkeypatch.setenv("SECATEUR_HF_TOKEN", token)
    else:
        monkeypatch.delenv("SECATEUR_HF_TOKEN")
        monkeypatch.delenv("HF_TOKEN", raising=False)
    get_settings.cache_clear()
    request = JobRequest.model_validate(REQUEST | {"publish": {"repo_id": "org/out"}})
    with pytest.raises(Exception, match=message) as refused:
        admit(request, get_settings(), HubAccess(get_settings().hf_token, "org", True))
    assert refused.value.status == 422  # type: ignore[attr-defined]


def test_a_hub_that_is_away_lets_jobs_in(
    hub: fake.FakeHub, hub_api: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = REQUEST | {"publish": {"repo_id": "org/out"}, "revision": "main"}
    hub.broken = True
    made = hub_api.post("/v1/jobs", json=wanted)
    assert made.status_code == 202, made.text
    assert made.json()["request"]["revision"] == "main"
    asked = hub_api.post("/v1/jobs?validate_only=true", json=wanted)
    assert (asked.status_code, asked.json()["code"]) == (503, "hub_unavailable")
    assert int(asked.headers["Retry-After"]) > 0


def test_names_for_the_folder_hub(settings: Settings, make_model: Callable[..., str]) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("org/SmolLM2-135M", 0.2, "secateur/SmolLM2-135M-piem-20"),
        ("local:Qwen2.5_7B..v1", 0.125, "secateur/Qwen2-5-7B-v1-piem-12_5"),
        ("local:" + "x" * 96, 0.5, f"secateur/{'x' * 60}-piem-50"),
        ("org/a", 0.29, "secateur/a-piem-29"),
        ("org/a", 1 / 3, "secateur/a-piem-33_3333"),
        ("org/a", [0.2, 0.5], "secateur/a-piem"),
        ("org/a", {"parameters": 110e6}, "secateur/a-piem-110m"),
        ("org/a", {"parameters": 1.14e9}, "secateur/a-piem-1_14b"),
        ("org/a", {"parameters": 999_999}, "secateur/a-piem-1m"),
        ("org/a", {"parameters": 950}, "secateur/a-piem-950"),
        ("org/a", {"bytes": 5e8}, "secateur/a-piem-500mb"),
        ("org/a", {"bytes": 2.5e9}, "secateur/a-piem-2_5gb"),
    ]
    for model_id, ratio, name in cases:
        target = {"goal" if isinstance(ratio, dict) else "target_ratio": ratio}
        request = JobRequest.model_validate({"model_id": model_id, "method": "piem"} | target)
        publish = admit(request, settings, HubAccess(None, "secateur", True)).publish
        assert publish is not None and publish.repo_id == name
        assert JobRequest.model_validate(request.model_dump() | {"publish": {"repo_id": name}})


def test_inspect(api: httpx2.Client, make_model: Callable[..., str]) -> None:
    found = api.post("/v1/models/inspect", json={"model_id": make_model()}).json()
    assert (found["supported"], found["reason"]) == (True, None)
    assert found["shape"]["family"] == "llama"
    layer = found["shape"]["layers"][0]
    prices, parameters = layer.pop("prices"), layer.pop("parameters")
    assert layer["kv_groups"] * prices["kv_groups"] + layer["channels"] * prices["channels"] == parameters
    assert layer == {
        "layer": 0,
        "kv_groups": 4,
        "heads": 8,
        "head_dim": 8,
        "channels": 256,
        "experts": 1,
    }
    assert [size["target_ratio"] for size in found["sizes"]] == [0.2, 0.5]
    for size in found["sizes"]:
        gone = round(size["nearest_ratio"] * found["shape"]["prunable_parameters"])
        assert size["parameters"] == found["shape"]["parameters"] - gone and size["bytes"] == 4 * size["parameters"]
    by_layout = {layout["layout"]: layout for layout in found["layouts"]}
    assert list(by_layout) == ["per-layer", "uniform", "padded"]
    assert by_layout["per-layer"]["gguf"] == ["F32", "F16", "Q8_0"]
    assert "width_multiple 256" in by_layout["per-layer"]["gguf_reason"]
    by_structure = {each["structure"]: each for each in found["structures"]}
    assert list(by_structure) == ["layers", "attention", "feed_forward", "kv_groups", "channels", "vocabulary"]
    whole = by_structure["layers"]
    assert (whole["units"], whole["without_code"]) == (
        len(found["shape"]["layers"]),
        ["per-layer", "uniform", "padded"],
    )
    assert whole["parameters"] == found["shape"]["prunable_parameters"]
    assert whole["max_ratio"] == pytest.approx(1 - 1 / whole["units"]) and whole["reason"] is None
    assert by_structure["kv_groups"]["without_code"] == ["uniform", "padded"]
    widths = [by_structure[name]["max_ratio"] for name in ("kv_groups", "channels")]
    assert sum(widths) == pytest.approx(found["shape"]["max_ratio"])
    assert by_structure["vocabulary"]["max_ratio"] is None
    like = make_model("like", CONFIG | {"model_type": "granite"})
    unknown = api.post("/v1/models/inspect", json={"model_id": like}).json()
    assert (unknown["supported"], unknown["shape"]) == (True, None), "its modules tell, when it is loaded"
    odd = make_model(
        "odd", {key: value for key, value in CONFIG.items() if "heads" not in key} | {"model_type": "rwkv"}
    )
    refused = api.post("/v1/models/inspect", json={"model_id": odd}).json()
    assert (refused["supported"], refused["shape"]) == (False, None)
    assert refused["reason"]["code"] == "unsupported_architecture" and "llama" in refused["reason"]["message"]
    missing = api.post("/v1/models/inspect", json={"model_id": "local:none"})
    assert (missing.status_code, missing.json()["code"]) == (422, "model_not_found")
    assert api.post("/v1/models/inspect", json={"model_id": "a", "x": 1}).json()["errors"][0]["allowed"] == (
        "model_id, revision, gguf_file, hub_token"
    )


def test_methods(api: httpx2.Client) -> None:
    methods = {method["name"]: method for method in api.get("/v1/methods").json()["items"]}
    assert {"piem-lsps", "piem", "lsps", "magnitude", "random"} <= set(methods)
    assert methods["piem-lsps"]["needs_gradients"] and not methods["random"]["needs_gradients"]
    assert methods["piem-lsps"]["needs"] == ["gates"]
    chosen = {"scorer": "piem", "allocator": "lsps", "layerwise_recovery": "none", "default_rounds": 4}
    assert chosen.items() <= methods["piem-lsps"].items()
    assert methods["sleb"]["structures"] == ["layers"] and methods["sleb"]["scorers"]["attention"] == "sleb"
    ours = methods["secateur"]["scorers"]
    assert (ours["channels"], ours["layers"], ours["experts"]) == ("obs", "compensated-loss", "reap")
    kinds = api.get("/v1/methods").json()["kinds"]["structures"]
    assert kinds["experts"] == ["frequency", "random", "reap"] and "obs" in kinds["kv_groups"]


def test_every_kind_that_is_listed_is_taken(api: httpx2.Client, body: dict[str, Any]) -> None:
    answer = api.get("/v1/methods").json()
    fields = {
        "scorer": ("scoring",),
        "allocator": ("allocation",),
        "layerwise_recovery": ("recovery", "layerwise"),
        "training": ("recovery", "training"),
    }
    del answer["kinds"]["structures"]  # it lists the scorers by structure
    assert answer["kinds"].keys() == fields.keys()
    for component, kinds in answer["kinds"].items():
        assert {method[component] for method in answer["items"] if component in method} <= set(kinds)

        def asking(kind: str, path: tuple[str, ...] = fields[component]) -> dict[str, Any]:
            settings: dict[str, Any] = {"kind": kind}
            for name in reversed(path):
                settings = {name: settings}
            return body | settings

        for kind in kinds:
            response = api.post("/v1/jobs?validate_only=true", json=asking(kind))
            assert response.status_code == 200, response.text
        [error] = api.post("/v1/jobs", json=asking("no such")).json()["errors"]
        assert error["field"] == ".".join((*fields[component], "kind"))
        assert all(f"'{kind}'" in error["allowed"] for kind in kinds)


def test_texts(api: httpx2.Client, body: dict[str, Any], settings: Settings) -> None:
    settings.texts_dir.mkdir(parents=True)
    (settings.texts_dir / "novel.txt").write_text("Once upon a time.")
    for dataset in ("wikitext2", "org/name", "org/name:config", "local:novel.txt"):
        response = api.post("/v1/jobs", json=body | {"calibration": {"dataset": dataset}})
        assert response.status_code == 202, response.text
    for dataset, allowed in [
        ("local:none", "a text of the service's library"),
        ("local:nowel.txt", "local:novel.txt"),
        ("local:../novel.txt", "local:novel.txt"),
        ("local:", "a text of the service's library"),
        ("/etc/passwd", "local:NAME"),
        ("../x", "local:NAME"),
        ("a/../b", "local:NAME"),
    ]:
        response = api.post("/v1/jobs", json=body | {"evaluation": {"dataset": dataset}})
        assert response.status_code == 422, dataset
        [error] = response.json()["errors"]
        assert error["field"] == "evaluation.dataset"
        assert allowed in error["allowed"]
