"""A pruned model as GGUF: what the file says, what llama.cpp makes of it, and what is refused before any work."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from sentencepiece import SentencePieceTrainer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.gguf import GgufKind, gguf_architecture, gguf_obstacle
from secateur.catalog.sources import ModelSource, locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.export import gguf as export
from secateur.engine.export.gguf import check_gguf, check_ready, compare, write_gguf
from secateur.engine.export.gguf_tokenizer import DIGITS, GPT2, PRE_TOKENIZERS
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.model.plan import Plan
from secateur.engine.run.whole import without
from secateur.engine.scoring.depth import Unit
from secateur.engine.structures.layers import publish
from tests.engine.models import FAMILIES, SIZES, VOCABULARY, english, layer_plan, make_model, save
from tests.engine.running import prune
from tests.engine.test_slicing import of_each, some_plan

DIFFERENT = some_plan(shape_from_config({"model_type": "llama", **SIZES}))
UNIFORM = Plan((layer_plan((0, 2), tuple(range(64))),) * 3)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DIFFERING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "llama-biased": ("llama-biased", {}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
}
UNIFORM_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3-moe": ("qwen3-moe", {"norm_topk_prob": True}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gemma3-long": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
}
MODELS = DIFFERING | UNIFORM_ALONE
CASES = [
    *((name, DIFFERENT) for name in DIFFERING),
    *((name, UNIFORM) for name in (*DIFFERING, *UNIFORM_ALONE)),
]
IDS = [f"{name}-{'uniform' if plan is UNIFORM else 'differing'}" for name, plan in CASES]

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


def loaded(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> tuple[Decoder, ModelSource]:
    """A model with heads of 16, so that a layer's rows are multiples of 32 where KV groups are two or more."""
    family, own = MODELS[name]
    model = make_model(family, **{"hidden_size": 96, **own, **changes})
    source = locate(str(save(model, tokenizer, folder / "source")), allow_paths=True)
    return load(source, "auto"), source


def pruned(
    name: str, plan: Plan, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any
) -> tuple[Decoder, ModelSource]:
    decoder, source = loaded(name, folder, tokenizer, **changes)
    if decoder.shape.family.experts:
        plan = Plan(
            tuple(layer_plan(kept["kv_groups"], of_each(decoder.shape, kept["channels"])) for kept in plan.layers)
        )
    apply_plan(decoder, plan)
    return decoder, source


@pytest.mark.parametrize(("name", "plan"), CASES, ids=IDS)
def test_what_the_file_says(name: str, plan: Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned(name, plan, tmp_path, tokenizer)
    write_gguf(decoder, source, tmp_path / "model.gguf", "F16")
    reader = GGUFReader(tmp_path / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = gguf_architecture(decoder.shape.model_type, plan is UNIFORM)
    assert fields["general.architecture"] == architecture
    sizes = [layer.shape for layer in decoder.layers]
    for key, expected in (
        ("feed_forward_length", [layer.channels_per_expert for layer in sizes]),
        ("attention.head_count", [layer.heads for layer in sizes]),
        ("attention.head_count_kv", [layer.kv_groups for layer in sizes]),
    ):
        assert fields[f"{architecture}.{key}"] == (expected[0] if plan is UNIFORM else expected)
    context = (
        32 if name in ("mistral", "mixtral", "phi3") else 128
    )  # beyond their windows llama.cpp would see more than they do
    assert fields[f"{architecture}.context_length"] == context
    assert fields[f"{architecture}.attention.key_length"] == 16
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY and fields["tokenizer.ggml.eos_token_id"] == 0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in tensors) is not decoder.shape.tied_embeddings
    assert ("rope_freqs.weight" in tensors) is (name in ("llama-3", "llama-linear"))
    for index, layer in enumerate(decoder.layers):
        if layer.mixture is None:
            name, down = f"blk.{index}.ffn_down.weight", layer.channel_output.weight
        else:
            name, down = f"blk.{index}.ffn_down_exps.weight", layer.mixture.stacked()[2]
            assert tensors[f"blk.{index}.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.tensor(tensors[name].data), down.half())
        assert tensors[f"blk.{index}.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    stored = sum(int(tensor.n_elements) for name, tensor in tensors.items() if name != "rope_freqs.weight")
    assert stored == decoder.parameters


@needs_llama_cpp
@pytest.mark.parametrize(("name", "plan"), CASES, ids=IDS)
def test_llama_cpp_runs_it(name: str, plan: Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned(name, plan, tmp_path, tokenizer)
    write_gguf(decoder, source, tmp_path / "model.gguf", "F32")
    check_gguf(decoder, tmp_path / "model.gguf", "F32")


WITHOUT: list[tuple[str, list[Unit]]] = [
    ("llama", [("layers", 1)]),
    ("llama", [("attention", 0), ("feed_forward", 2)]),
    ("mixtral", [("layers", 1)]),
    ("gemma2", [("layers", 0)]),
    ("gemma3", [("layers", 1)]),
]


@pytest.mark.parametrize(("name", "gone"), WITHOUT)
def test_whole_units_are_gone(name: str, gone: list[Unit], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = loaded(name, tmp_path, tokenizer)
    apply_plan(decoder, without(decoder, gone))
    publish(decoder)
    write_gguf(decoder, source, tmp_path / "model.gguf", "F32")
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    architecture = fields["general.architecture"]
    fewer = ("layers", gone[0][1]) in gone
    assert fields[f"{architecture}.block_count"] == (2 if fewer else 3)
    if name.startswith("gemma"):
        kinds = [index % 2 == 0 for index in range(3) if index != gone[0][1]]
        assert fields[f"{architecture}.attention.sliding_window_pattern"] == kinds
    if importlib.util.find_spec("llama_cpp") is not None:
        check_gguf(decoder, tmp_path / "model.gguf", "F32")


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_half_precision(dtype: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned("llama", DIFFERENT, tmp_path, tokenizer)
    decoder.model.to(getattr(torch, dtype))
    write_gguf(decoder, source, tmp_path / "model.gguf", "F16")
    check_gguf(decoder, tmp_path / "model.gguf", "F16")


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_kinds(kind: GgufKind, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    plan = Plan((layer_plan((0,), tuple(range(256))), *(layer_plan((0, 1), tuple(range(512))),) * 2))
    decoder, source = pruned("llama", plan, tmp_path, tokenizer, **sizes, intermediate_size=512)
    path = tmp_path / "model.gguf"
    check_ready(decoder, source)
    write_gguf(decoder, source, path, kind)
    check_gguf(decoder, path, kind)
    down = {tensor.name: tensor for tensor in GGUFReader(path).tensors}["blk.0.ffn_down.weight"].tensor_type.name
    assert down in {"F16": ("F16",), "Q8_0": ("Q8_0",), "Q4_K_M": ("Q4_K", "Q6_K")}[kind]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.gguf", "source"]


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("wrong", ["attn_q", "attn_v", "ffn_gate"])
def test_a_file_that_disagrees_is_refused(
    kind: GgufKind, wrong: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, source = pruned("llama", DIFFERENT, tmp_path, tokenizer)
    real = export._tensors

    def altered(decoder: Decoder, architecture: str) -> Any:
        for name, tensor in real(decoder, architecture):
            yield name, tensor.flip(0) if name == f"blk.1.{wrong}.weight" else tensor

    monkeypatch.setattr(export, "_tensors", altered)
    write_gguf(decoder, source, tmp_path / "model.gguf", kind)
    with pytest.raises(PruningError, match="logits differ") as caught:
        check_gguf(decoder, tmp_path / "model.gguf", kind)
    assert caught.value.code == "export_invalid"
    with pytest.raises(PruningError, match="logits differ"):
        write_gguf(decoder, source, tmp_path / "small.gguf", "Q8_0")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_another_greedy_token_is_refused() -> None:
    """Though logits as a whole are as near as they have to be."""
    expected = torch.randn(12, 50000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best, second = expected[8].topk(2).indices
    expected[8, best] += 1
    expected[9] = expected[9].round(decimals=1)
    near = expected + 1e-3 * torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    compare(expected, near, 7, 1e-2)  # row 9 has several tokens that are as good
    near[8, second] += 2
    with pytest.raises(PruningError, match="other greedy tokens"):
        compare(expected, near, 7, 1e-2)
    compare(expected, near, 10, 1e-2)


@needs_llama_cpp
def test_quantised_weights_of_another_model_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned("llama", UNIFORM, tmp_path, tokenizer)
    write_gguf(decoder, source, tmp_path / "model.gguf", "Q8_0")
    weight = decoder.layers[1].channel_output.weight
    weight.copy_(weight.flip(0))
    with pytest.raises(PruningError, match=r"tensor blk\.1\.ffn_down\.weight of the GGUF file differs"):
        check_gguf(decoder, tmp_path / "model.gguf", "Q8_0")


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_kinds_of_a_mixture(kind: GgufKind, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_model("qwen3-moe", **sizes, num_hidden_layers=1, moe_intermediate_size=256, norm_topk_prob=True)
    source = locate(str(save(model, tokenizer, tmp_path / "source")), allow_paths=True)
    decoder = load(source, "auto")
    path = tmp_path / "model.gguf"
    write_gguf(decoder, source, path, kind)
    check_gguf(decoder, path, kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == {"Q8_0": "Q8_0", "Q4_K_M": "Q4_K"}[kind]
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"


@needs_llama_cpp
def test_no_gguf_file_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, _ = pruned("llama", UNIFORM, tmp_path, tokenizer)
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(PruningError, match="does not take the GGUF file") as caught:
        check_gguf(decoder, tmp_path / "model.gguf", "F16")
    assert caught.value.code == "export_invalid"


def sentencepiece_source(folder: Path) -> tuple[Decoder, ModelSource]:
    """A model whose tokenizer is a SentencePiece one, like Llama 2's."""
    text = folder / "text.txt"
    text.write_text("\n".join(english("calibration")))
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY - 2, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    tokenizer = LlamaTokenizer.from_pretrained(str(folder))
    source = save(make_model("llama", hidden_size=96), tokenizer, folder / "source")
    (folder / "tokenizer.model").rename(source / "tokenizer.model")
    located = locate(str(source), allow_paths=True)
    return load(located, "auto"), located


def test_sentencepiece(tmp_path: Path) -> None:
    decoder, source = sentencepiece_source(tmp_path)
    write_gguf(decoder, source, tmp_path / "model.gguf", "F16")
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert kinds[:4] == [2, 3, 3, 6] and kinds[-1] == 5
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 2


@needs_llama_cpp
def test_llama_cpp_reads_text_as_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_ready(*sentencepiece_source(tmp_path))
    decoder, source = pruned("llama", UNIFORM, tmp_path / "bpe", tokenizer)
    check_ready(decoder, source)
    write_gguf(decoder, source, tmp_path / "model.gguf", "F16")
    again = locate(str(tmp_path / "model.gguf"), allow_paths=True)
    check_ready(load(again, "float32"), again)
    real = GGUFWriter.add_token_merges
    monkeypatch.setattr(GGUFWriter, "add_token_merges", lambda self, merges: real(self, merges[:2]))
    with pytest.raises(PruningError, match="other tokens") as caught:
        check_ready(decoder, source)
    assert caught.value.code == "gguf_unsupported"


def test_a_gguf_source_lends_its_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned("llama", UNIFORM, tmp_path, tokenizer)
    write_gguf(decoder, source, tmp_path / "first.gguf", "F16")
    again = locate(str(tmp_path / "first.gguf"), allow_paths=True)
    write_gguf(load(again, "float32"), again, tmp_path / "second.gguf", "F16")
    first, second = (GGUFReader(tmp_path / name) for name in ("first.gguf", "second.gguf"))
    assert set(first.fields) == set(second.fields)
    for key, field in first.fields.items():
        if key.startswith(("tokenizer.", "llama.")):
            assert second.fields[key].contents() == field.contents(), key
            assert second.fields[key].types == field.types, key
    weights = {tensor.name: tensor.data for tensor in second.tensors}
    assert all((weights[tensor.name] == tensor.data).all() for tensor in first.tensors)


@needs_llama_cpp
def test_a_path_may_be_relative(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, source = pruned("llama", UNIFORM, tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    write_gguf(decoder, source, Path("model.gguf"), "Q8_0")
    check_gguf(decoder, Path("model.gguf"), "Q8_0")


def test_a_killed_check_is_for_want_of_memory() -> None:
    with pytest.raises(PruningError) as caught:
        export._run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert caught.value.code == "out_of_memory"
    with pytest.raises(PruningError, match="it ended with -6") as caught:
        export._run("import os; os.abort()")
    assert caught.value.code == "export_invalid"


def test_without_llama_cpp(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, source = pruned("llama", UNIFORM, tmp_path, tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PruningError, match="install llama-cpp-python") as caught:
        check_ready(decoder, source)
    assert caught.value.code == "gguf_unavailable" and caught.value.field == "formats"


def split(pattern: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer that takes words apart by a pattern."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]


def test_an_unknown_pre_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned("llama", UNIFORM, tmp_path, tokenizer)
    assert source.path is not None
    path = source.path / "tokenizer.json"
    description = json.loads(path.read_text())
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split(r"\w+")}
    path.write_text(json.dumps(description))
    with pytest.raises(PruningError, match="no name for how its tokenizer takes words apart") as caught:
        write_gguf(decoder, source, tmp_path / "model.gguf", "F16")
    assert caught.value.code == "gguf_unsupported"


@needs_llama_cpp
@pytest.mark.parametrize(("steps", "ignore_merges"), PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_llama_cpp_takes_words_apart_alike(
    steps: tuple[str, ...], ignore_merges: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    decoder, source = pruned("llama", UNIFORM, tmp_path, tokenizer)
    assert source.path is not None
    made: dict[str, list[dict[str, Any]]] = {
        GPT2: [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
        DIGITS: [{"type": "Digits", "individual_digits": True}],
    }
    whole = {"type": "Sequence", "pretokenizers": [step for name in steps for step in made.get(name) or split(name)]}
    path = source.path / "tokenizer.json"
    description = json.loads(path.read_text())
    description["pre_tokenizer"], description["model"]["ignore_merges"] = whole, ignore_merges
    path.write_text(json.dumps(description))
    decoder.tokenizer = PreTrainedTokenizerFast.from_pretrained(source.path)
    check_ready(decoder, source)


def obstacle(name: str, kind: GgufKind = "F16", uniform: bool = False, **options: Any) -> PruningError | None:
    changes = options.pop("changes", {})
    config_class, own = FAMILIES[name]
    config = config_class(**{**SIZES, **own, **changes}).to_dict()
    return gguf_obstacle(shape_from_config(config), config, kind, uniform=uniform, **options)


@pytest.mark.parametrize(("name", "plan"), CASES, ids=IDS)
def test_no_obstacle(name: str, plan: Plan) -> None:
    family, own = MODELS[name]
    assert obstacle(family, uniform=plan is UNIFORM, changes=own) is None
    assert obstacle(family, "Q8_0", plan is UNIFORM, changes=own) is None
    assert obstacle(family, "Q4_K_M", plan is UNIFORM, changes=own, width_multiple=256) is None


@pytest.mark.parametrize(
    ("name", "options", "field", "reason"),
    [
        ("opt", {"uniform": True}, "formats", "has no such architecture; types that can: llama, mistral"),
        ("gpt2", {"uniform": True}, "formats", "gpt2, and llama.cpp takes its heads only where"),
        ("gpt-neox", {"uniform": True}, "formats", "gpt_neox, and llama.cpp takes its heads only where"),
        ("glm4", {"uniform": True}, "formats", "glm4, and this is not supported yet"),
        ("gemma2", {}, "layout", "layout 'uniform' or 'padded'"),
        ("qwen3", {}, "layout", "only where embeddings and head are tied; layout 'uniform' or 'padded'"),
        ("qwen3", {"uniform": True, "added_biases": True}, "recovery.layerwise.kind", "no place for the biases"),
        ("llama", {"changes": {"hidden_act": "gelu"}}, "formats", "its activation is 'gelu'"),
        ("llama", {"changes": {"rope_parameters": {**LINEAR_ROPE, "rope_type": "dynamic"}}}, "formats", "'dynamic'"),
        ("qwen3", {"uniform": True, "changes": {"rope_parameters": LINEAR_ROPE}}, "formats", "'linear'"),
        ("mixtral", {}, "layout", "layout 'uniform' or 'padded'"),
        ("qwen3-moe", {"uniform": True}, "formats", "norm_topk_prob"),
        ("phi3", {"changes": {"partial_rotary_factor": 0.75}}, "formats", "only 0.75 of each head"),
        ("gemma2", {"uniform": True, "changes": {"query_pre_attn_scalar": 24}}, "formats", "scaled by 24"),
        ("llama", {"kind": "Q4_K_M"}, "allocation.width_multiple", "ask for allocation.width_multiple 256"),
        ("llama", {"kind": "Q8_0", "width_multiple": 16}, "allocation.width_multiple", "width_multiple 32"),
    ],
)
def test_obstacles(name: str, options: dict[str, Any], field: str, reason: str) -> None:
    found = obstacle(name, **options)
    assert found is not None and reason in found.message, found
    assert found.code == "gguf_unsupported" and found.field == field


def test_biases_that_a_recovery_adds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = pruned("qwen3-tied", DIFFERENT, tmp_path, tokenizer)
    decoder.layers[0].channel_output.bias = torch.nn.Parameter(torch.ones(96), requires_grad=False)
    with pytest.raises(PruningError, match="no place for the biases"):
        write_gguf(decoder, source, tmp_path / "model.gguf", "F16")


@needs_llama_cpp
@pytest.mark.parametrize("plan", [DIFFERENT, UNIFORM], ids=["differing", "uniform"])
def test_llama_cpp_runs_biases_that_a_recovery_adds(
    plan: Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    decoder, source = pruned("qwen2", plan, tmp_path, tokenizer)
    for layer in decoder.layers:
        for output in (layer.attention_output, layer.channel_output):
            output.bias = torch.nn.Parameter(torch.randn(96), requires_grad=False)
    write_gguf(decoder, source, tmp_path / "model.gguf", "F32")
    check_gguf(decoder, tmp_path / "model.gguf", "F32")


FORMATS: dict[str, Any] = {
    "target_ratio": 0.3,
    "method": "magnitude",
    "formats": ["safetensors", "gguf"],
    "calibration": {"texts": english("calibration"), "samples": 2, "sequence_length": 32},
    "evaluation": {
        "texts": english("evaluation"),
        "samples": 2,
        "sequence_length": 32,
        "latency": False,
        "prompts": [],
    },
}


@needs_llama_cpp
@pytest.mark.parametrize("layout", ["per-layer", "uniform", "padded"])
def test_a_job_makes_it_beside_the_checkpoint(layout: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = save(make_model("mistral"), tokenizer, tmp_path / "source")
    spec = PruningSpec.model_validate({**FORMATS, "layout": layout, "gguf_quantization": "F32"})
    folder = prune(str(source), spec, tmp_path / "out").folder
    assert "model-F32.gguf" in json.loads((folder / "secateur.json").read_text())["files"]
    assert "llama-cli -m model-F32.gguf" in (folder / "README.md").read_text()
    fields = GGUFReader(folder / "model-F32.gguf").fields
    assert fields["general.architecture"].contents() == ("deci" if layout == "per-layer" else "llama")


def test_a_job_that_cannot_make_it_is_refused_before_any_work(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = save(make_model("gpt2"), tokenizer, tmp_path / "source")
    events: list[Any] = []
    with pytest.raises(PruningError, match="its type is gpt2") as caught:
        prune(str(source), PruningSpec.model_validate(FORMATS), tmp_path / "out", on_event=events.append)
    assert (caught.value.code, caught.value.field) == ("gguf_unsupported", "formats")
    assert {event.get("stage") for event in events} <= {"downloading", "loading"} and not (tmp_path / "out").exists()
