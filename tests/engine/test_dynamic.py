"""Dynamic checkpoints as anybody loads them: what writes is what the prompt needs, exactly, and for every family."""

import copy
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.dynamic.calibrate import kept_units, nystrom, priors, saved_share
from secateur.engine.dynamic.modeling import DAMPING, PRIORS
from secateur.engine.dynamic.pruner import write_dynamic
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.run.workspace import Paused
from secateur.engine.scoring.base import Context
from secateur.engine.structures import WIDTHS
from tests.engine.models import FAMILIES, VOCABULARY, decoder_of, english, make_model, save
from tests.engine.running import prune, resolved
from tests.tiers import slow_but

DENSE = [name for name in FAMILIES if name not in ("chatglm6b", "mixtral", "qwen3-moe")]
SEVERAL = ["llama", "gemma2", "phi3", "gpt2", "gpt-neox", "opt"]
"""One of each make of layer."""
PROMPTS = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
NEXT = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(2))
CALIBRATION = torch.randint(3, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(3))


class Case:
    """A dynamic checkpoint on disk, loaded, beside the plain model that it was made of."""

    def __init__(self, source: Path, folder: Path, **settings: Any) -> None:
        self.source, self.folder = locate(str(source), allow_paths=True), folder
        folder.mkdir()
        self.plain = load(self.source, "auto")
        self.kept = [[layer.shape.kv_groups - 1, 96] for layer in self.plain.layers]
        self.kept[1] = [self.plain.layers[1].shape.kv_groups, 128]
        known = priors(self.plain, CALIBRATION, 2, 0, lambda share: None)
        asked = {"enabled": True, "kept": self.kept, "prior_weight": 0.5, "per_sequence": False, "refresh_tokens": None}
        write_dynamic(self.plain, self.source, folder, known, asked | settings)

    def load(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True)
        return model.eval().requires_grad_(False)

    def without_compensation(self) -> "Case":
        known = {name: tensor for name, tensor in load_file(self.folder / PRIORS).items() if "factor" not in name}
        save_file(known, self.folder / PRIORS)
        return self


@pytest.fixture(params=DENSE)
def case(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Case:
    return Case(save(make_model(request.param), tokenizer, tmp_path / "source"), tmp_path / "dynamic")


@pytest.fixture
def llama(trained_folder: Path, tmp_path: Path) -> Case:
    return Case(trained_folder, tmp_path / "dynamic")


def continued(model: Any, prompt: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of ``after``, when ``prompt`` was read."""
    whole = torch.ones(len(prompt), prompt.shape[1] + after.shape[1], dtype=torch.long)
    if mask is not None:
        whole[:, : prompt.shape[1]] = mask
    positions = (whole.cumsum(1) - 1).clamp_min(0)
    read = prompt.shape[1]
    with torch.no_grad():
        first = model(prompt, attention_mask=whole[:, :read], position_ids=positions[:, :read], use_cache=True)
        if hasattr(model, "settle"):
            model.settle(first.past_key_values)
        second = model(
            after,
            attention_mask=whole,
            position_ids=positions[:, read:],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    logits: Tensor = second.logits
    return logits


@contextmanager
def gates(decoder: Decoder, chosen: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    """What enters the output projections is zero but for the chosen units ``[batch, n]``."""
    hooks = []
    for (index, structure), units in chosen.items():
        layer = decoder.layers[index]
        gate = torch.zeros(len(units), WIDTHS[structure].units(layer)).scatter_(1, units, 1.0)
        gate = gate.repeat_interleave(WIDTHS[structure].width(layer), 1)

        def close(_: Any, args: tuple[Tensor], gate: Tensor = gate) -> tuple[Tensor]:
            inputs = args[0].reshape(len(PROMPTS), -1, gate.shape[1])
            return ((inputs * gate[:, None]).reshape(args[0].shape),)

        hooks.append(WIDTHS[structure].output(layer).register_forward_pre_hook(close))
    yield
    for hook in hooks:
        hook.remove()


def needed(case: Case, prompts: Tensor, weight: float, together: bool) -> dict[tuple[int, str], Tensor]:
    """Each prompt's units with the most energy, unit by unit from what enters the output projections."""
    seen: dict[tuple[int, str], Tensor] = {}
    decoder, known, chosen = case.plain, load_file(case.folder / PRIORS), {}
    hooks = [
        WIDTHS[structure]
        .output(layer)
        .register_forward_pre_hook(
            lambda _, args, key=(index, structure): seen.__setitem__(
                key, args[0].reshape(len(prompts), -1, args[0].shape[-1])
            )
        )
        for index, layer in enumerate(decoder.layers)
        for structure in ("kv_groups", "channels")
    ]
    decoder.model(prompts, use_cache=False)
    for hook in hooks:
        hook.remove()
    for (index, structure), inputs in seen.items():
        layer = decoder.layers[index]
        columns, width = WIDTHS[structure].output(layer).weight, WIDTHS[structure].width(layer)
        energies = torch.stack(
            [
                sum(
                    (inputs[:, :, at] ** 2).sum(1) * (columns[:, at] ** 2).sum()
                    for at in range(unit * width, (unit + 1) * width)
                )  # type: ignore[misc]
                for unit in range(WIDTHS[structure].units(layer))
            ],
            1,
        )
        energies = energies / energies.mean(1, keepdim=True)
        energies = energies.mean(0, keepdim=True).expand(len(prompts), -1) if together else energies
        prior = known[f"{index}.{structure}.energy"]
        mixed = (1 - weight) * energies + weight * prior / prior.mean()
        chosen[index, structure] = mixed.topk(case.kept[index][structure == "channels"], 1).indices
    return chosen


@pytest.mark.parametrize("together", [True, False], ids=["shared", "per-sequence"])
def test_what_is_gathered_writes_what_the_masked_model_writes(case: Case, together: bool) -> None:
    model = case.without_compensation().load()
    model.config.dynamic_pruning["per_sequence"] = not together
    chosen = needed(case, PROMPTS, 0.5, together)
    plain = case.plain.model
    positions = torch.arange(29).expand(3, -1)
    with torch.no_grad():
        read = plain(PROMPTS, position_ids=positions[:, :24], use_cache=True)
        with gates(case.plain, chosen):
            cache = read.past_key_values
            expected = plain(NEXT, position_ids=positions[:, 24:], past_key_values=cache, use_cache=True).logits
    found = continued(model, PROMPTS, NEXT)
    scale = expected.abs().max()
    assert torch.allclose(found, expected, atol=float(1e-4 * scale))
    whole = continued(plain, PROMPTS, NEXT)
    assert not torch.allclose(found, whole, atol=float(1e-2 * scale)), "or nothing was left out"


@pytest.mark.parametrize("case", SEVERAL, indirect=True)
def test_a_batch_with_padding_is_each_sequence_alone(case: Case) -> None:
    model = case.load()
    model.config.dynamic_pruning["per_sequence"] = True
    mask = torch.ones_like(PROMPTS)
    mask[1, :9] = 0
    padded = PROMPTS.masked_fill(mask == 0, 0)
    together = continued(model, padded, NEXT, mask)
    for row, start in enumerate((0, 9, 0)):
        alone = continued(model, PROMPTS[row : row + 1, start:], NEXT[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=float(1e-4 * alone.abs().max()))


def test_padding_has_no_say_in_what_a_batch_shares(llama: Case) -> None:
    model = llama.load()
    mask = torch.ones(1, 33, dtype=torch.long)
    mask[0, :9] = 0
    padded = torch.cat([torch.full((1, 9), 5), PROMPTS[:1]], 1)
    assert torch.allclose(continued(model, padded, NEXT[:1], mask), continued(model, PROMPTS[:1], NEXT[:1]), atol=1e-4)


@pytest.mark.parametrize("case", SEVERAL, indirect=True)
def test_off_it_is_the_plain_model_token_by_token(case: Case) -> None:
    model = case.load()
    options = {
        "attention_mask": torch.ones_like(PROMPTS),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = case.plain.model.generate(PROMPTS, **options)
    model.config.dynamic_pruning["enabled"] = False
    assert torch.equal(model.generate(PROMPTS, **options), expected)


def test_without_its_code_it_is_the_plain_model(llama: Case) -> None:
    model, told = AutoModelForCausalLM.from_pretrained(llama.folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(model.eval()(PROMPTS).logits, llama.plain.model(PROMPTS).logits)


def test_token_by_token_is_all_at_once(llama: Case) -> None:
    model = llama.load()
    expected = continued(model, PROMPTS, NEXT)
    with torch.no_grad():
        output = model(PROMPTS, use_cache=True)
        for at in range(NEXT.shape[1]):
            output = model(NEXT[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
            assert torch.allclose(output.logits[:, 0], expected[:, at], atol=1e-4)


def greedy(model: Any, tokens: Tensor, new: int, every: int | None) -> Tensor:
    """What ``generate`` should write, by hand: the text so far is read anew after ``every`` tokens."""
    output = None
    for step in range(new):
        with torch.no_grad():
            if output is None or (every and step % (every + 1) == 0):
                output = model(tokens, use_cache=True)
            else:
                output = model(tokens[:, -1:], past_key_values=output.past_key_values, use_cache=True)
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("every", [None, 3])
def test_generate_and_refresh(llama: Case, every: int | None) -> None:
    model = llama.load()
    model.config.dynamic_pruning["refresh_tokens"] = every
    options = {"attention_mask": torch.ones_like(PROMPTS), "do_sample": False, "eos_token_id": None}
    written = model.generate(PROMPTS, max_new_tokens=11, **options)
    assert torch.equal(written, greedy(model, PROMPTS, 11, every))
    assert torch.equal(written, model.generate(PROMPTS, max_new_tokens=11, **options)), "the same every time"


@pytest.mark.parametrize("per_sequence", [True, False])
def test_beams_and_sampling(llama: Case, per_sequence: bool) -> None:
    model = llama.load()
    model.config.dynamic_pruning["per_sequence"] = per_sequence
    options = {"max_new_tokens": 8, "eos_token_id": None}
    mask = torch.ones_like(PROMPTS)
    beams = model.generate(PROMPTS, attention_mask=mask, num_beams=3, do_sample=False, **options)
    assert beams.shape == (3, 32)
    if per_sequence:
        for row in range(3):
            alone = model.generate(
                PROMPTS[row : row + 1], attention_mask=mask[:1], num_beams=3, do_sample=False, **options
            )
            assert torch.equal(alone[0], beams[row])
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(model.generate(PROMPTS, attention_mask=mask, do_sample=True, num_return_sequences=2, **options))
    assert torch.equal(*drawn) and drawn[0].shape == (6, 32)


def test_what_writes_goes_with_its_cache(llama: Case) -> None:
    model = llama.load()
    with torch.no_grad():
        output = model(PROMPTS, use_cache=True)
        kept_cache = copy.deepcopy(output.past_key_values)
        model.settle(output.past_key_values)
    network = weakref.ref(output.past_key_values.dynamic_prompt.network.model.layers[0].mlp.down_proj)
    narrow = network()
    assert narrow is not None and narrow.in_features == 96
    assert narrow.weight.data_ptr() != model.model.layers[0].mlp.down_proj.weight.data_ptr()
    shared = output.past_key_values.dynamic_prompt.network.model.layers[0].input_layernorm
    assert shared is model.model.layers[0].input_layernorm, "nothing else is copied"
    copied = copy.deepcopy(output.past_key_values)
    assert copied.dynamic_prompt.network is output.past_key_values.dynamic_prompt.network
    assert kept_cache.layers[0].keys.shape[1] == 3 and output.past_key_values.layers[0].keys.shape[1] == 2
    del narrow, output, copied
    gc.collect()
    assert network() is None
    assert model.model.layers[0].mlp.down_proj.in_features == 160, "the model itself stays as it was"


def test_a_static_cache(llama: Case) -> None:
    model = llama.load()
    options = {
        "attention_mask": torch.ones_like(PROMPTS),
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = model.generate(PROMPTS, **options)
    assert torch.equal(
        model.generate(PROMPTS, cache_implementation="static", disable_compile=True, **options), expected
    )


def test_saved_again_it_is_the_same(llama: Case, tmp_path: Path) -> None:
    model = llama.load()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(continued(again, PROMPTS, NEXT), continued(model, PROMPTS, NEXT))


def channel_inputs(case: Case, index: int, tokens: Tensor) -> Tensor:
    """What enters a layer's output projection of channels, float64 ``[batch, length, channels]``."""
    inputs: list[Tensor] = []
    hook = case.plain.layers[index].channel_output.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    case.plain.model(tokens, use_cache=False)
    hook.remove()
    return inputs[0].detach().double()


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_compensation_is_least_squares_under_the_second_moments(llama: Case, prior_weight: float) -> None:
    known = load_file(llama.folder / PRIORS)
    model = llama.load()
    model.config.dynamic_pruning["prior_weight"] = prior_weight
    with torch.no_grad():
        cache = model(PROMPTS, use_cache=True).past_key_values
        model.settle(cache)
    weight = llama.plain.layers[0].channel_output.weight.double()
    factor, rest = (known[f"0.channels.{kind}"].double() for kind in ("factor", "rest"))
    moments = factor @ factor.T + rest.diag()
    own = [rows.T @ rows for rows in channel_inputs(llama, 0, PROMPTS)]
    prompts = sum((each / each.trace() / len(own) for each in own), torch.zeros_like(moments)) * moments.trace()
    moments = prior_weight * moments + (1 - prior_weight) * prompts
    found = cache.dynamic_prompt.network.model.layers[0].mlp.down_proj.weight.double()
    chosen = needed(llama, PROMPTS, prior_weight, True)[0, "channels"][0].sort().values
    left = torch.tensor([channel for channel in range(160) if channel not in chosen])
    ridge = DAMPING * moments.diagonal().mean() * torch.eye(len(chosen), dtype=torch.float64)
    told = torch.linalg.solve(moments[chosen][:, chosen] + ridge, moments[chosen][:, left])
    assert torch.allclose(found, weight[:, chosen] + weight[:, left] @ told.T, atol=1e-5)


def test_a_sketch_has_the_second_moments_on_average_and_padding_none(llama: Case) -> None:
    sketched = vars(sys.modules[type(llama.load()).__module__])["_sketched"]
    rows = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([sketched(rows, 8, seed) for seed in range(2000)])
    assert drawn.shape[2:] == (8, 6)
    assert torch.allclose((drawn.mT @ drawn).mean(0), rows.mT @ rows, atol=2.5)
    padded = torch.cat([torch.zeros(2, 9, 6), rows], 1)
    assert torch.allclose(sketched(padded, 8, 3), sketched(rows, 8, 3), atol=1e-5)
    few = sketched(rows, 64, 0)
    assert torch.allclose(few.mT @ few, rows.mT @ rows, atol=1e-4), "where there are rows enough, nothing is lost"


def test_nystrom_finds_what_has_low_rank() -> None:
    torch.manual_seed(0)
    half = torch.randn(40, 5, dtype=torch.float64)
    probes = torch.randn(40, 12)
    factor = nystrom(probes, (half @ half.T).float() @ probes, 5)
    assert factor.shape == (40, 5)
    assert torch.allclose(factor @ factor.T, half @ half.T, atol=1e-3)


def test_priors_are_those_of_all_tokens(llama: Case) -> None:
    known = load_file(llama.folder / PRIORS)
    inputs = channel_inputs(llama, 2, CALIBRATION).flatten(0, 1)
    moments = inputs.T @ inputs / CALIBRATION.numel()
    norms = llama.plain.layers[2].channel_output.weight.double().square().sum(0)
    assert torch.allclose(known["2.channels.energy"].double(), moments.diagonal() * norms, rtol=1e-4)
    factor, rest = (known[f"2.channels.{kind}"].double() for kind in ("factor", "rest"))
    assert torch.allclose((factor @ factor.T).diagonal() + rest, moments.diagonal(), rtol=1e-3, atol=1e-6)
    assert torch.dist(factor @ factor.T, moments) < 0.3 * moments.norm()


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_widths_save_what_is_asked_and_differ_by_layer(ratio: float, trained: PreTrainedModel, tokenizer: Any) -> None:
    decoder = decoder_of(trained, tokenizer)
    spec = PruningSpec(target_ratio=ratio, method="dsgp")
    context = Context(decoder, CALIBRATION, 2, resolved(spec, decoder.shape), ratio, 0, lambda share: None)
    kept = kept_units(context)
    block = 32 * decoder.shape.price("channels", 0) / decoder.shape.prunable_parameters
    assert abs(saved_share(decoder, kept) - ratio) <= block / 2 + 1e-9
    assert len({tuple(each) for each in kept}) > 1


ASKED: dict[str, Any] = {
    "method": "dsgp",
    "target_ratio": 0.3,
    "calibration": {"texts": english("calibration"), "samples": 8, "sequence_length": 48},
    "evaluation": {
        "texts": english("evaluation"),
        "samples": 8,
        "sequence_length": 48,
        "latency": False,
        "prompts": ["The"],
    },
}


def test_a_whole_pruning_and_its_resumption(trained_folder: Path, tmp_path: Path) -> None:
    spec = PruningSpec.model_validate(ASKED | {"target_ratio": [0.3]})
    events: list[Any] = []
    done = prune(str(trained_folder), spec, tmp_path / "out", on_event=events.append)
    (first,) = done.report["targets"]
    assert first["ratio"]["reached"] == pytest.approx(0.3, abs=0.03) and first["ratio"]["of_flops"] > 0.1
    assert first["parameters"]["before"] == first["parameters"]["after"]
    assert first["perplexity"]["before"] < first["perplexity"]["after"]
    assert 0 <= first["steps"][0]["prior_weight"] <= 1
    assert first["generations"][0]["before"] and "prompt" in (tmp_path / "out" / "ratio-0.3" / "README.md").read_text()
    states = [event["state"] for event in events if event["type"] == "step"]
    assert len(states) == 2
    with pytest.raises(Paused):
        prune(str(trained_folder), spec, tmp_path / "none", resume=states[0], stop=lambda: True)
    again: list[Any] = []
    resumed = prune(str(trained_folder), spec, tmp_path / "again", resume=states[1], on_event=again.append)
    assert [event["number"] for event in again if event["type"] == "step"] == [], "nothing is measured twice"
    for kind in ("perplexity", "widths", "ratio"):
        assert resumed.report["targets"][0][kind] == first[kind]
    for name in ("model.safetensors", PRIORS, "config.json", "modeling_dynamic.py"):
        assert (tmp_path / "again" / "ratio-0.3" / name).read_bytes() == (
            tmp_path / "out" / "ratio-0.3" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 2}, "allowed: 1"),
        ({"recovery": {"training": {"kind": "lora"}}}, "allowed: layerwise.kind 'none' and no training"),
        ({"scoring": {"kind": "piem"}}, "allowed: no kind"),
        ({"allocation": {"kind": "uniform"}}, "allowed: no kind"),
        ({"layout": "uniform"}, "'per-layer'"),
        ({"formats": ["safetensors", "gguf"]}, "safetensors"),
        ({"target_ratio": None, "goal": {"parameters": 1e6}}, "give 'target_ratio'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningSpec.model_validate(ASKED | changes)


@pytest.mark.parametrize("name", ["mixtral", "chatglm6b"])
def test_families_that_cannot_are_refused(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = save(make_model(name), tokenizer, tmp_path / "source")
    with pytest.raises(PruningError, match="mixtures of experts") as caught:
        prune(str(source), PruningSpec.model_validate(ASKED), tmp_path / "out")
    assert (caught.value.code, caught.value.field) == ("method_unsupported", "method")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", slow_but(["padded"], ["uniform", "padded"]))
def test_it_composes_with_a_static_pruning(layout: str, trained_folder: Path, tmp_path: Path) -> None:
    asked = {name: ASKED[name] for name in ("calibration", "evaluation")}
    static = PruningSpec.model_validate(asked | {"method": "magnitude", "target_ratio": 0.3, "layout": layout})
    cut = prune(str(trained_folder), static, tmp_path / "static").report
    both = prune(str(tmp_path / "static"), PruningSpec.model_validate(ASKED), tmp_path / "both").report
    assert both["ratio"]["reached"] == pytest.approx(0.3, abs=0.04)
    assert both["parameters"]["before"] == cut["published"]["parameters"]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(PROMPTS).logits for name in ("static", "both")
        )
    assert torch.equal(first, second), "without its code it is the static model"


def test_a_source_whose_layers_differ_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    asked = {name: ASKED[name] for name in ("calibration", "evaluation")}
    static = PruningSpec.model_validate(asked | {"method": "magnitude", "target_ratio": 0.3})
    prune(str(trained_folder), static, tmp_path / "static")
    with pytest.raises(PruningError, match=r"layout uniform or padded.*this model: secateur") as caught:
        prune(str(tmp_path / "static"), PruningSpec.model_validate(ASKED), tmp_path / "both")
    assert (caught.value.code, caught.value.field) == ("method_unsupported", "method")
