"""Requests for whole layers, sub-layers and experts: from the request to files that a fresh process loads."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.budget import whole_units, without_whole
from secateur.catalog.memory import Place, estimate
from secateur.catalog.methods import SCORERS
from secateur.catalog.resolve import components, resolve
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.catalog.structures import EQUAL, STRUCTURES
from secateur.contract.errors import PruningError
from secateur.engine import structures
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.run.run import LoadedModel, open_run
from secateur.engine.run.whole import EQUAL_SCORERS
from secateur.engine.run.workspace import Listener, Workspace
from tests.engine.models import SIZES, VOCABULARY, decoder_of, english, make_model, save
from tests.engine.running import prune
from tests.tiers import slow_but

DEPTH = 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("llama", {"target_ratio": 0.34, "structures": ["layers"]}),
    "shortgpt": ("llama", {"target_ratio": 0.34, "method": "shortgpt"}),
    "sleb": ("llama", {"target_ratio": 0.34, "method": "sleb"}),
    "attention": ("llama", {"target_ratio": 0.1, "structures": ["attention"]}),
    "feed_forward": ("llama", {"target_ratio": 0.13, "structures": ["feed_forward"]}),
    "sublayers": (
        "llama",
        {
            "target_ratio": 0.17,
            "structures": ["attention", "feed_forward"],
            "shares": {"attention": 0.04, "feed_forward": 0.13},
            "layout": "padded",
        },
    ),
    "layers-and-widths": (
        "llama",
        {
            "target_ratio": 0.4,
            "rounds": 2,
            "structures": ["layers", "kv_groups", "channels"],
            "shares": {"layers": 0.17},
        },
    ),
    "layers-and-widths-padded": (
        "llama",
        {
            "target_ratio": 0.4,
            "structures": ["layers", "kv_groups", "channels"],
            "shares": {"layers": 0.17},
            "layout": "padded",
        },
    ),
    "layers-and-widths-uniform": (
        "llama",
        {
            "target_ratio": 0.45,
            "structures": ["layers", "kv_groups", "channels"],
            "shares": {"layers": 0.17},
            "layout": "uniform",
            "allocation": {"width_multiple": 8},
        },
    ),
    "reap": ("mixtral", {"target_ratio": 0.23, "method": "reap"}),
    "experts-and-widths": (
        "mixtral",
        {"target_ratio": 0.4, "structures": ["experts", "kv_groups", "channels"], "shares": {"experts": 0.23}},
    ),
    "layers-and-experts": (
        "mixtral",
        {"target_ratio": 0.4, "structures": ["layers", "experts"], "shares": {"layers": 0.17, "experts": 0.23}},
    ),
    "layers-without-compensation": ("gemma2", {"target_ratio": 0.34, "structures": ["layers"]}),
    "layers-and-gradients": (
        "llama",
        {
            "target_ratio": 0.4,
            "method": "piem-lsps",
            "rounds": 2,
            "structures": ["layers", "kv_groups", "channels"],
            "shares": {"layers": 0.17},
            "scoring": {"kind": "sleb"},
        },
    ),
    "layers-and-training": (
        "llama",
        {
            "target_ratio": 0.34,
            "method": "shortgpt",
            "recovery": {"training": {"kind": "lora", "epochs": 1.0, "batch_size": 4}},
        },
    ),
}
QUICK = ["layers", "attention", "layers-and-widths", "layers-and-experts"]


def spec(**changes: Any) -> PruningSpec:
    plain = {
        "method": "secateur",
        "rounds": 1,
        "calibration": Calibration(texts=english("calibration"), samples=8, sequence_length=32),
        "evaluation": Evaluation(texts=english("evaluation"), samples=4, sequence_length=32, latency=False, prompts=[]),
    }
    return PruningSpec(**{**plain, **changes})


def source(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    return save(make_model(family, num_hidden_layers=DEPTH), tokenizer, folder / "source")


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_from_the_request_to_the_files(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The export itself compares logits and text with those of the model in memory, in a fresh process."""
    family, changes = CASES[name]
    made, asked = source(family, tokenizer, tmp_path), spec(**changes)
    shape = shape_from_config(json.loads((made / "config.json").read_text()))
    if asked.layout == "uniform":
        ratio = shape.nearest_ratio(0.45, 8, uniform=True)
        removed = without_whole(shape, {"layers": 1})
        share = removed.nearest_ratio(0.3, 8, uniform=True)
        ratio = 1 - (1 - share) * removed.prunable_parameters / shape.prunable_parameters
        asked = spec(**{**changes, "target_ratio": ratio})
    report = prune(str(made), asked, tmp_path / "out").report
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    counts = whole_units(shape, {}, components(asked).structures, asked.shares, report["ratio"]["target"])
    after = report["widths"]["after"]
    assert sum(not layer["kv_groups"] and not layer["channels"] for layer in after) == counts.get("layers", 0)
    assert config["num_hidden_layers"] == DEPTH - counts.get("layers", 0)
    for structure, width in (("attention", "kv_groups"), ("feed_forward", "channels")):
        assert sum(not layer[width] for layer in after) == counts.get(structure, 0) + counts.get("layers", 0)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == report["published"]["parameters"]
    widths = any(name in components(asked).structures for name in ("kv_groups", "channels"))
    held = counts.keys() & {"attention", "feed_forward"}
    needs_code = asked.layout == "per-layer" and (widths or bool(held))
    assert bool(list((tmp_path / "out").glob("*.py"))) == needs_code, "a stock class holds fewer layers and experts"
    if not widths and len(counts) == 1:
        ((structure, count),) = counts.items()
        together = sum(shape.price(structure, index) for index in range(DEPTH))
        unit = together if structure in EQUAL else together / DEPTH
        assert report["ratio"]["reached"] == pytest.approx(count * unit / shape.prunable_parameters)
    if not needs_code:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.config.num_hidden_layers == config["num_hidden_layers"]


@pytest.mark.parametrize(
    "name", slow_but(["layers-and-widths"], ["layers-and-widths", "layers-and-experts", "experts-and-widths"])
)
def test_a_run_resumes_from_every_step(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    family, changes = CASES[name]
    made, asked = source(family, tokenizer, tmp_path), spec(**{**changes, "target_ratio": [0.4, 0.5]})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    events: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            (tmp_path / f"scratch-{event['number']}").mkdir()
            for file in scratch.iterdir():
                if file.is_file():
                    (tmp_path / f"scratch-{event['number']}" / file.name).write_bytes(file.read_bytes())
            events.append(json.loads(json.dumps(event)))

    straight = prune(str(made), asked, tmp_path / "straight", scratch=scratch, on_event=listen).report
    for event in events[1:]:
        out = tmp_path / f"resumed-{event['number']}"
        kept = tmp_path / f"scratch-{event['number']}"
        report = prune(str(made), asked, out, scratch=kept, resume=event["state"]).report
        for one, other in zip(report["targets"], straight["targets"], strict=True):
            assert one["perplexity"] == other["perplexity"] and one["widths"] == other["widths"]
        for file in (tmp_path / "straight").rglob("model.safetensors"):
            again = load_file(out / file.relative_to(tmp_path / "straight"))
            assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(file).items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"structures": ["heads"]}, "there is no 'heads'"),
        ({"structures": ["layers", "layers"]}, "named once"),
        ({"structures": []}, "at least 1"),
        ({"structures": ["layers"], "shares": {"experts": 0.1}}, "'experts' has no share; allowed: layers"),
        ({"shares": {"layers": 0.1}}, "'layers' has no share; allowed: no shares"),
        (
            {"structures": ["layers", "experts"], "shares": {"layers": 0.1}},
            "'experts' needs a share too, or no structure may have one",
        ),
        ({"structures": ["layers", "kv_groups", "channels"], "shares": {"layers": 0.4}}, "more than the ratio 0.3"),
        ({"structures": ["layers"], "shares": {"layers": 0}}, "greater than 0"),
        ({"structures": ["feed_forward"], "layout": "uniform"}, "without their 'feed_forward'; allowed: 'per-layer'"),
        (
            {"method": "wanda", "structures": ["layers"]},
            "'wanda' has no scores of 'layers'; allowed: kv_groups, channels",
        ),
        ({"method": "shortgpt", "structures": ["experts"]}, "'shortgpt' has no scores of 'experts'"),
        ({"method": "dsgp", "rounds": None, "structures": ["layers"]}, "chooses among kv_groups and channels alone"),
    ],
)
def test_what_cannot_be_asked_for(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        spec(**{"target_ratio": 0.3, **changes})


@pytest.mark.parametrize(
    ("family", "structures", "shares", "ratio", "code", "says"),
    [
        ("llama", ["experts"], {}, 0.2, "structure_unsupported", "no 'experts'; allowed: layers, attention"),
        ("llama", ["layers"], {}, 0.05, "ratio_unreachable", "from 1 to 5 units"),
        ("llama", ["layers"], {}, 0.9, "ratio_unreachable", "from 1 to 1 units"),
        ("mixtral", ["experts"], {}, 0.01, "ratio_unreachable", "from 1 to 3 units"),
        (
            "llama",
            ["layers", "attention"],
            {"layers": 0.8, "attention": 0.1},
            0.9,
            "ratio_unreachable",
            "at most one of",
        ),
    ],
)
def test_what_a_model_cannot_give_is_refused_at_the_door(
    family: str, structures: list[str], shares: dict[str, float], ratio: float, code: str, says: str
) -> None:
    config = config_of(family, num_hidden_layers=2 if ratio == 0.9 and not shares else DEPTH)
    with pytest.raises(PruningError, match=says) as caught:
        whole_units(shape_from_config(config), config, structures, shares, ratio)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("family", "changes", "asked", "field", "says"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {}, "structures", "scale_attn_by_inverse_layer_idx"),
        ("llama", {"num_hidden_layers": 1}, {}, "structures", "too few 'layers'"),
        ("llama", {"num_key_value_heads": 1}, {"structures": ["attention"]}, "structures", "too few 'attention'"),
        (
            "mixtral",
            {},
            {"structures": ["attention"], "target_ratio": 0.05, "formats": ["safetensors", "gguf"]},
            "layout",
            "layers of one width alone",
        ),
    ],
)
def test_what_a_config_rules_out_is_refused_at_the_door(
    family: str, changes: dict[str, Any], asked: dict[str, Any], field: str, says: str
) -> None:
    config = config_of(family, **{"num_hidden_layers": DEPTH, **changes})
    request = spec(**{"target_ratio": 0.34, "structures": ["layers"], **asked})
    with pytest.raises(PruningError, match=says) as caught:
        resolve(request, shape_from_config(config), config=config, source_dtype="float32")
    assert caught.value.field == field


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_fewer_layers_of_one_width_fit_llama_cpp_in_every_layout(family: str) -> None:
    config = config_of(family, num_hidden_layers=DEPTH)
    request = spec(target_ratio=0.34, structures=["layers"], formats=["safetensors", "gguf"], gguf_quantization="F16")
    resolve(request, shape_from_config(config), config=config, source_dtype="float32")


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(make_model(family, **changes).config.to_json_string())
    return found


def test_a_plan_of_whole_units_is_that_of_their_removal(tokenizer: PreTrainedTokenizerFast) -> None:
    """A plan that was written as data and read again gives, applied to the source at once, the model that was cut step by step."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 16))
    decoder = decoder_of(make_model("mixtral", num_hidden_layers=4), tokenizer)
    first = Plan(({"layers": (), "kv_groups": (), "channels": ()}, {}, {"attention": (), "kv_groups": ()}, {}))
    width = 160
    experts = {"experts": (0, 2, 3), "channels": tuple(e * width + c for e in (0, 2, 3) for c in range(width))}
    second = Plan(({}, experts, experts, experts))
    narrow = {"channels": tuple(place * width + c for place in range(3) for c in range(place, 96 + place))}
    third = Plan(({}, {**narrow, "kv_groups": (0, 2)}, narrow, {}))
    for step in (first, second, third):
        apply_plan(decoder, step)
    whole = Plan.full(decoder.shape.layers)
    plan = whole.then(first).then(second).then(third)
    plan = Plan.from_data(type(plan.as_data()).model_validate(json.loads(plan.as_data().model_dump_json())))
    at_once = decoder_of(make_model("mixtral", num_hidden_layers=4), tokenizer)
    apply_plan(at_once, plan)
    assert torch.equal(logits(at_once, tokens), logits(decoder, tokens))
    assert at_once.widths == decoder.widths == plan.shapes(decoder.shape)
    assert plan.parameters(decoder.shape) == decoder.prunable_parameters


def logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = decoder.model(tokens, use_cache=False).logits
    return found


ALONE = [
    (structure, method, layout, rounds)
    for structure in ("channels", "kv_groups")
    for method, layout, rounds in (
        ("secateur", "per-layer", 1),
        ("wanda", "uniform", 1),
        ("flap", "per-layer", 1),
        ("piem-lsps", "per-layer", 3),
        ("magnitude", "padded", 1),
    )
]


@pytest.mark.parametrize(
    ("structure", "method", "layout", "rounds"),
    slow_but([("channels", "secateur", "per-layer", 1), ("kv_groups", "flap", "per-layer", 1)], ALONE),
)
def test_a_width_that_is_cut_alone(
    structure: str, method: str, layout: str, rounds: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = source("llama", tokenizer, tmp_path)
    shape = shape_from_config(json.loads((made / "config.json").read_text())).cutting([structure])
    wanted = {"channels": 0.2, "kv_groups": 0.1}[structure]
    ratio = shape.nearest_ratio(wanted, 8, uniform=layout == "uniform")
    assert 0.05 < ratio < 0.3
    asked = spec(
        structures=[structure],
        method=method,
        layout=layout,
        rounds=rounds,
        target_ratio=ratio,
        allocation={"width_multiple": 8},
    )
    report = prune(str(made), asked, tmp_path / "out").report
    assert abs(report["ratio"]["reached"] - ratio) * shape.prunable_parameters <= shape.block(8) / 2 + 1
    (other,) = {"channels", "kv_groups"} - {structure}
    before, after = report["widths"]["before"], report["widths"]["after"]
    assert [layer[other] for layer in after] == [layer[other] for layer in before]
    assert sum(layer[structure] for layer in after) < sum(layer[structure] for layer in before)


def test_one_kv_group_is_no_obstacle_unless_it_is_cut_alone() -> None:
    config = config_of("llama", num_hidden_layers=DEPTH, num_key_value_heads=1)
    shape = shape_from_config(config)
    resolve(spec(target_ratio=0.3), shape, config=config, source_dtype="float32")
    with pytest.raises(PruningError, match=r"too few 'kv_groups'.*allowed: layers, feed_forward, channels"):
        resolve(spec(target_ratio=0.1, structures=["kv_groups"]), shape, config=config, source_dtype="float32")


@pytest.mark.parametrize(
    ("family", "changes", "reference"),
    [
        ("llama", {}, False),
        ("llama", {"rounds": 2}, True),
        ("llama", {"rounds": 2, "method": "wanda"}, False),
        ("llama", {"rounds": 2, "structures": ["layers", "channels"], "shares": {"layers": 0.17}}, False),
        ("mixtral", {"structures": ["experts", "channels"], "shares": {"experts": 0.23}}, True),
        ("mixtral", {"structures": ["experts", "channels"]}, True),
        ("llama", {"structures": ["layers"], "target_ratio": 0.34}, False),
    ],
)
def test_memory_counts_the_unpruned_model_where_a_round_needs_it(
    family: str, changes: dict[str, Any], reference: bool
) -> None:
    config = config_of(family, num_hidden_layers=DEPTH)
    shape = shape_from_config(config)
    asked = spec(**{"target_ratio": 0.4, "allocation": {"width_multiple": 8}, **changes})
    weights = estimate(resolve(asked, shape, config=config, source_dtype="float32"), shape, Place.RESIDENT).weights
    assert weights == shape.parameters * 4 * (1 + reference)


def test_the_nearest_ratio_is_that_of_whole_units() -> None:
    config = config_of("llama", num_hidden_layers=DEPTH)
    shape = shape_from_config(config)

    def nearest(**changes: Any) -> float | None:
        return resolve(spec(**changes), shape, config=config, source_dtype="float32").nearest_ratio(shape, 0)

    assert nearest(target_ratio=0.3, structures=["layers"]) == pytest.approx(2 / DEPTH)
    assert nearest(target_ratio=0.3, structures=["layers", "kv_groups", "channels"]) is None, "it is decided later"
    group = shape.price("kv_groups", 0) / shape.prunable_parameters
    alone = nearest(target_ratio=0.1, structures=["kv_groups"])
    assert alone == pytest.approx(round(0.1 / group) * group)


def test_a_ratio_that_one_width_cannot_give_is_refused() -> None:
    config = config_of("llama", num_hidden_layers=DEPTH)
    with pytest.raises(PruningError, match="the nearest ratio that can be met") as caught:
        resolve(
            spec(target_ratio=0.6, structures=["kv_groups"]),
            shape_from_config(config),
            config=config,
            source_dtype="float32",
        )
    assert caught.value.code == "ratio_unreachable"


def test_engine_and_catalogue_know_the_same_structures() -> None:
    assert list(structures.STRUCTURES) == list(STRUCTURES), "in the same order, which is the one of cutting"
    assert tuple(EQUAL_SCORERS) == EQUAL
    for name in STRUCTURES:
        assert any(name in scorer.structures for scorer in SCORERS.values()), f"nothing scores {name}"


def test_widths_are_fitted_to_the_compensated_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """The layer before a gap stands for the layers in it, so a fit to the unpruned model would undo the compensation."""
    model = make_model("llama", num_hidden_layers=8)
    for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        projection.weight.mul_(0.1)  # layer 1 is removed, and layer 0, whose widths stay whole, stands for it
    ids = torch.tensor(tokenizer("\n\n".join(english("calibration"))).input_ids)
    evaluation = Evaluation(texts=english("evaluation"), samples=1, sequence_length=32, latency=False, prompts=[])
    weights = []
    for request in (
        {"target_ratio": 0.125, "structures": ["layers"]},
        {"target_ratio": 0.2, "structures": ["layers", "kv_groups", "channels"], "shares": {"layers": 0.125}},
    ):
        spec = PruningSpec.model_validate(
            {
                **request,
                "method": "secateur",
                "scoring": {"kind": "shortgpt"},
                "evaluation": evaluation,
                "allocation": {"width_multiple": 8},
            }
        )
        loaded = LoadedModel(copy.deepcopy(model), tokenizer)
        with open_run(loaded, spec, Workspace(device="cpu"), Listener(), tokens=ids[: 8 * 32].view(8, 32)) as run:
            pruned = run.prune(0)
        assert pruned.plan.layers[1]["layers"] == () and len(pruned.decoder.layers) == 7
        assert pruned.decoder.layers[0].shape.channels == SIZES["intermediate_size"]
        weights.append(pruned.decoder.layers[0].channel_output.weight)
    assert not torch.equal(weights[0], model.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(weights[1], weights[0])
