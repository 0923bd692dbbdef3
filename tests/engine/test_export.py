"""What is written loads with plain transformers, in a process that has never seen this project."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.architectures import ModelShape
from secateur.catalog.resolve import components
from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.report import (
    BenchmarkChange,
    Change,
    ComponentNames,
    CountChange,
    LatencyChange,
    ParameterChange,
    Published,
    RatioSummary,
    Report,
    Source,
    Step,
    StepKind,
    Text,
    WidthChange,
)
from secateur.engine.export import check_checkpoint, checkpoint, shards
from secateur.engine.export.card import model_card
from secateur.engine.model.cutting import apply_plan, padded
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.model.plan import Plan, PlanData, widths_of
from tests.engine.models import FAMILIES, LIKE_LLAMA, VOCABULARY, decoder_of, layer_plan, make_model, save
from tests.engine.test_slicing import of_each, some_plan
from tests.tiers import slow_but

STRANGER = """
import copy, pickle, sys, torch
from pathlib import Path
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
def capped(logits, config):
    logits = logits * getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
for case in map(Path, sys.argv[1:]):
    folder, tokens = case / "pruned", load_file(case / "probe")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    AutoTokenizer.from_pretrained(folder)
    results = {
        "logits": model(tokens).logits.float(),
        "base_logits": capped(model.get_output_embeddings()(base(tokens).last_hidden_state).float(), model.config),
        "dynamic": model.generate(tokens, **options),
        "none": model.generate(tokens, use_cache=False, **options),
        "static": model.generate(tokens, cache_implementation="static", **options),
    }
    padded = torch.cat([torch.zeros(len(tokens), 3, dtype=tokens.dtype), tokens], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    results["left_padded"] = model.generate(padded, attention_mask=mask, **options)[:, 3:]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    results["copied"] = copied(tokens).logits.float()
    model.save_pretrained(case / "resaved")
    again = AutoModelForCausalLM.from_pretrained(case / "resaved", trust_remote_code=True, dtype="auto").eval()
    results["resaved"] = again(tokens).logits.float()
    model.set_attn_implementation("eager")
    results["eager"] = model(tokens).logits.float()
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, case / "results")
assert not any(name.split(".")[0] in ("app", "workers") for name in sys.modules)
"""

CASES = [*FAMILIES, "bfloat16", "sharded", "added-biases"]
TWIN = "llama-multi-head five"
STOCK_CASES = [*(f"{name} {layout}" for name in FAMILIES for layout in ("uniform", "padded")), TWIN]
QUICK = [*STOCK_CASES[::4], *STOCK_CASES[3::4], TWIN]
"""Each family in one of the two layouts."""
OWN_NAMES = {
    "gpt2": ("n_head", "n_head", "n_inner"),
    "chatglm6b": ("num_attention_heads", "num_attention_heads", "intermediate_size"),
    "gpt-neox": ("num_attention_heads", "num_attention_heads", "intermediate_size"),
    "gpt-neox-serial": ("num_attention_heads", "num_attention_heads", "intermediate_size"),
    "opt": ("num_attention_heads", "num_attention_heads", "ffn_dim"),
    "qwen3-moe": ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size"),
}
"""What configs call heads, KV heads and channels, where not as llama's does."""


@dataclass
class Case:
    """A pruned model in memory, with its ``logits`` for the probe, and on disk."""

    folder: Path
    decoder: Decoder
    plan: Plan
    logits: Tensor


def report_of(decoder: Decoder, plan: Plan) -> Report:
    spec, text = (
        PruningSpec(target_ratio=0.4, method="magnitude"),
        Text(source="x", windows=1, sequence_length=8, tokens=8),
    )
    source = Source(
        model_id="org/base", revision="abc", gguf_file=None, fingerprint="", family="llama", model_type="llama"
    )
    counts = CountChange(before=2, after=1)
    return Report(
        source=source,
        spec=spec.published(),
        components=components(spec).names,
        rounds=1,
        ratio=RatioSummary(target=0.4, reached=0.41, of_all_parameters=0.4, of_flops=0.4),
        redundancy_removed=0.4,
        benchmarks=BenchmarkChange(perplexity={}, zero_shot={}, zero_shot_mean=None),
        retained_accuracy=None,
        generations=[],
        parameters=ParameterChange(before=2, after=1, prunable_before=2, prunable_after=1),
        perplexity=Change(before=2, after=1),
        flops=counts,
        weights_bytes=counts,
        latency=LatencyChange(before=None, after=None),
        peak_memory_bytes=CountChange(before=None, after=None),
        widths=WidthChange(before=widths_of(decoder.shape.layers), after=plan.widths(decoder.shape)),
        steps=[],
        calibration=text,
        evaluation=text,
        dtype="float32",
        device="cpu",
        seed=0,
        versions={},
        published=Published(parameters=1, weights_bytes=1),
    )


@pytest.fixture(scope="module")
def cases(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    """Every case of a selected test pruned and written, then all of them loaded by one stranger."""
    root = tmp_path_factory.mktemp("export")
    tests = [item for item in request.session.items if "cases" in getattr(item, "fixturenames", ())]
    names = {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")} | {*CARDS, "llama"}
    made = {name: make_case(name, root / name, tokenizer) for name in sorted(names)}
    show_stranger(sys.executable, made.values())
    return made


def show_stranger(python: str | Path, made: Iterable[Case]) -> None:
    """What a process of another interpreter makes of the cases lies beside each of them then."""
    command = [python, "-I", "-c", STRANGER, *(case.folder for case in made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_case(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Case:
    """``name``: a family, or something about a llama, and a layout after a blank; ``changes`` of the family's config."""
    family, _, layout = name.partition(" ")
    model = make_model(family if family in FAMILIES | LIKE_LLAMA else "llama", **changes)
    model = model.bfloat16() if name == "bfloat16" else model
    shard = {"max_shard_size": "100KB"} if name == "sharded" else {}
    source = locate(str(save(model, tokenizer, folder / "source", **shard)), allow_paths=True)
    decoder = load(source, "auto")
    plan = PLANS[layout](decoder.shape)
    apply_plan(decoder, plan)
    if family == "added-biases":
        for layer in decoder.layers:
            for output in (layer.attention_output, layer.channel_output):
                output.bias = torch.nn.Parameter(torch.randn(output.out_features), requires_grad=False)
    tokens = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    logits = decoder.model(tokens).logits.float()
    report = report_of(decoder, plan)
    (folder / "pruned").mkdir()
    with pytest.MonkeyPatch.context() as patch, padded(decoder, enabled=layout == "padded"):
        if shard:
            patch.setattr(shards, "SHARD_BYTES", 100_000)
        checkpoint.write_model(decoder, source, folder / "pruned", bool(layout))
    checkpoint.write_manifest(decoder, plan, folder / "pruned", report, {"job_id": "j", "repo_id": "o/n"})
    save_file({"tokens": tokens}, folder / "probe")
    return Case(folder, decoder, plan, logits)


def pruned(folder: Path, layout: str = "") -> tuple[Decoder, Path]:
    """The model of ``folder`` cut, and where it was written and checked: beside it."""
    source = locate(str(folder), allow_paths=True)
    decoder = load(source, "auto")
    plan = PLANS[layout](decoder.shape)
    apply_plan(decoder, plan)
    out = folder.parent / "pruned"
    out.mkdir()
    with padded(decoder, enabled=layout == "padded"):
        checkpoint.write_model(decoder, source, out, bool(layout))
        checkpoint.write_manifest(decoder, plan, out, report_of(decoder, plan), {})
        check_checkpoint(decoder, out, own_code=True)
    return decoder, out


def alike(shape: ModelShape) -> Plan:
    """The same cut in every layer, of heads as far as the stock class takes it."""
    first = shape.layers[0]
    groups = next(gone for gone in range(first.kv_groups - 1, -1, -1) if shape.takes_heads(first.without(gone)))
    kept = layer_plan(tuple(range(groups, first.kv_groups)), of_each(shape, range(0, 160, 2)))
    return Plan((kept,) * len(shape.layers))


def none_whole(shape: ModelShape) -> Plan:
    """Layers that differ, and none that keeps everything."""
    first, _, last = some_plan(shape).layers
    return Plan((first, layer_plan(first["kv_groups"], of_each(shape, range(96))), last))


def five(shape: ModelShape) -> Plan:
    """Five heads of six in every layer, which do not divide the hidden size."""
    return Plan((layer_plan((0, 1, 3, 4, 5), tuple(range(80))),) * len(shape.layers))


PLANS = {"": some_plan, "uniform": alike, "padded": none_whole, "five": five}


@pytest.mark.parametrize(
    "name",
    slow_but(
        [name for name in QUICK if not name.startswith("chatglm6b")],
        [name for name in STOCK_CASES if not name.startswith("chatglm6b")],
    ),
)
def test_layouts_for_the_stock_class_need_no_code(name: str, cases: dict[str, Case]) -> None:
    case, out = cases[name], cases[name].folder / "pruned"
    config = json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py")) and not {"auto_map", "per_layer_config"} & config.keys()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    widths = {layer.shape for layer in decoder_of(loaded, case.decoder.tokenizer).layers}
    assert len(widths) == 1
    (width,) = widths
    as_another = case.decoder.shape.family.name == "llama" and 48 % width.heads != 0
    assert config["architectures"] == ["MistralForCausalLM" if as_another else type(case.decoder.model).__name__]
    assert as_another or name != TWIN
    assert width.channels_per_expert == (96 if name.endswith("padded") else 80)
    if name.startswith(("mistral", "qwen", "phi", "glm")):
        assert width.kv_groups == (1 if name.endswith("uniform") else 2)
    if name.startswith(("gpt", "opt")):
        assert width.kv_groups == case.decoder.shape.layers[0].kv_groups


@pytest.mark.parametrize("name", slow_but([*CASES, *QUICK], [*CASES, *STOCK_CASES]))
def test_a_stranger_can_load_it(name: str, cases: dict[str, Case]) -> None:
    assert not disagreements(cases[name])


def disagreements(case: Case) -> set[str]:
    """Which of the stranger's results are not what they must be."""
    results = load_file(case.folder / "results")
    scale = float(case.logits.abs().max())
    rounded = case.decoder.model.dtype == torch.bfloat16
    exact, eager = (0.02, 0.1) if rounded else (1e-5, 1e-4)
    close = {"logits": exact, "base_logits": exact, "eager": eager}
    agree = {name: torch.allclose(results[name], case.logits, atol=share * scale) for name, share in close.items()}
    agree |= {name: torch.equal(results[name], results["logits"]) for name in ("resaved", "copied")}
    if not rounded:  # ties in rounded logits may fall either way
        agree |= {name: torch.equal(results[name], results["dynamic"]) for name in ("none", "static", "left_padded")}
    return {name for name, agrees in agree.items() if not agrees}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written(name: str, cases: dict[str, Case]) -> None:
    case, out = cases[name], cases[name].folder / "pruned"
    config, manifest = (json.loads((out / file).read_text()) for file in ("config.json", "secateur.json"))
    source = json.loads((case.folder / "source" / "config.json").read_text())
    added = {
        "per_layer_config",
        "added_biases",
        "allow_global_per_layer_attribute_access",
        "auto_map",
        "architectures",
        "head_dim",
        "rope_theta",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "rotary_emb_base",
        "rotary_pct",
        "num_experts",
    }
    assert {key: value for key, value in config.items() if key not in added} == {
        key: value for key, value in source.items() if key not in added
    }
    assert config["head_dim"] == case.decoder.shape.layers[0].head_dim
    names = OWN_NAMES.get(name, ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    last = dict(zip(names, (case.decoder.shape.layers[0].heads_per_group, 1, 64), strict=True))
    assert config["per_layer_config"]["2"] == last
    assert config["added_biases"] == (["mlp.down_proj", "self_attn.o_proj"] if name == "added-biases" else [])
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (
        Plan.from_data(TypeAdapter(PlanData).validate_python(manifest["plan"])) == case.plan
        and manifest["job_id"] == "j"
    )
    assert set(manifest["files"]) == {file.name for file in out.iterdir()} - {"secateur.json"}
    assert (len(list(out.glob("*.safetensors"))) > 1) == (name == "sharded")
    assert (out / "tokenizer.json").read_bytes() == (case.folder / "source" / "tokenizer.json").read_bytes()
    if name not in ("sharded", "added-biases"):
        source_weights, weights = (load_file(case.folder / kind / "model.safetensors") for kind in ("source", "pruned"))
        assert weights.keys() == source_weights.keys(), "names that transformers 4 and vLLM know too"
    tokenizer_class = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert tokenizer_class == "PreTrainedTokenizerFast", "the name that transformers 4 and 5 both know"


ROTATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"rope_theta": 5e5},
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 2e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 4.0],
            },
        },
        {
            "rope_theta": 2e4,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]},
        },
    ),
    "partial": (
        "glm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}},
        {"rope_theta": 5e4, "partial_rotary_factor": 0.25},
    ),
    "two": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            }
        },
        {"rope_theta": 5e5, "rope_local_base_freq": 700.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "neox": (
        "gpt-neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 300.0, "rotary_pct": 0.5},
    ),
}
"""Family, what transformers 5 has in its config, and the same in transformers 4's words."""


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_said_in_the_words_of_transformers_4_too(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    family, changes, legacy = ROTATIONS[name]
    case = make_case(family, tmp_path, tokenizer, **changes)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert {**config, **legacy} == config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    tokens = load_file(tmp_path / "probe")["tokens"]
    assert torch.allclose(loaded(tokens).logits, case.logits, atol=1e-5 * float(case.logits.abs().max()))


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_scaled_rotations_keep_the_heads_of_a_stock_phi3(
    layout: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    family, changes, _ = ROTATIONS["longrope"]
    case = make_case(f"{family} {layout}", tmp_path, tokenizer, **changes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    tokens = load_file(tmp_path / "probe")["tokens"]
    assert torch.allclose(loaded(tokens).logits, case.logits, atol=1e-5 * float(case.logits.abs().max()))


def test_the_card_tells_the_method_only_where_it_was_followed(cases: dict[str, Case]) -> None:
    trained = [Step(number=number, kind=StepKind.TRAINING) for number in range(3)]
    plain = report_of(cases["llama"].decoder, cases["llama"].plan).model_copy(update={"steps": trained})
    card = model_card(plain, {})
    assert "`magnitude` — L1 norm" in card and "Rounds: 1;" in card, "training is no round of pruning"
    own = ComponentNames(scorer="wanda", allocator="uniform", layerwise_recovery="none", training="lora")
    card = model_card(plain.model_copy(update={"components": own}), {})
    assert "L1 norm" not in card
    assert "scorer `wanda`, allocator `uniform`, layer-wise recovery `none`, training `lora`" in card


@pytest.mark.parametrize("layout", ["", "uniform"])
def test_code_of_the_source_is_neither_run_nor_published(
    layout: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder, ran = save(make_model("llama"), tokenizer, tmp_path / "source"), tmp_path / "ran"
    (folder / "foreign.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "foreign.Model", "AutoTokenizer": ["foreign.Tokenizer", None]}
        (folder / name).write_text(json.dumps(config))
    _, out = pruned(folder, layout)
    assert not ran.exists()
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    named = json.loads((out / "config.json").read_text()).get("auto_map", {})
    assert not any("foreign" in name for name in named.values()) and bool(named) is not bool(layout)


CARDS = {"llama": True, "llama uniform": False, "chatglm6b uniform": True}
"""Cases, and whether each is loaded with code of its repository."""


def test_the_card_tells_how_to_load_it(cases: dict[str, Case]) -> None:
    for name, code in CARDS.items():
        card = (cases[name].folder / "pruned" / "README.md").read_text()
        assert ("modeling_chatglm6b.py" in card) == name.startswith("chatglm6b")
        assert ("vllm serve" in card) != name.startswith("chatglm6b")
        assert "trust_remote_code=True" in card or not code
