"""The benchmarks' pure parts: an exact rewrite of the model, results that outlive a kill, cases and tables."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.ablations import ablations
from benchmarks.case import Case, prune
from benchmarks.model import repeat_kv_heads
from benchmarks.removal import remove
from benchmarks.results import Results
from benchmarks.sections import grid, trained, variants
from benchmarks.structures import Rows, loss_at, points
from benchmarks.table import excess_loss, markdown, mean_cell, perplexity_cell
from secateur.catalog.methods import STATIC_METHODS
from secateur.catalog.resolve import components
from secateur.catalog.spec import Evaluation, PruningSpec
from secateur.engine.measure.cache import Statistics
from secateur.engine.run.run import LoadedModel, open_run
from secateur.engine.run.workspace import Listener, Workspace
from tests.engine.models import SIZES, VOCABULARY, decoder_of, english, make_model, make_tokenizer

BASE = Case("random", 0.5, 1, 0, "repeated", 24, 256)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen2", "qwen3"])
def test_repeating_kv_heads_changes_no_logit(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model(family).double(), tokenizer)
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    repeated = repeat_kv_heads(decoder)
    tokens = torch.arange(40).view(2, 20) * 7 % VOCABULARY
    assert [layer.kv_groups for layer in repeated.widths] == [SIZES["num_attention_heads"]] * len(repeated.layers)
    assert repeated.shape.layers[0].heads_per_group == 1
    assert repeated.projection_parameters == repeated.shape.prunable_parameters > decoder.projection_parameters
    torch.testing.assert_close(repeated.model(tokens).logits, decoder.model(tokens).logits, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.model.state_dict().items())


def test_a_case_prunes_to_its_ratio_and_says_so_when_it_cannot(tokenizer: PreTrainedTokenizerFast) -> None:
    finest = {"allocation": {"width_multiple": 1}}
    case = Case("sparsegpt", 0.4, 2, 0, "repeated", 4, 32, finest)
    ids = torch.tensor(tokenizer("\n\n".join(english("calibration"))).input_ids)
    tokens = ids[: case.samples * case.sequence_length].view(case.samples, -1)
    whole, pruned, other = (repeat_kv_heads(decoder_of(make_model("llama"), tokenizer)) for _ in range(3))
    prune(pruned, whole, case, tokens, Statistics(None, {}))
    assert pruned.projection_parameters == pytest.approx(0.6 * whole.projection_parameters, rel=0.005)
    assert whole.projection_parameters == whole.shape.prunable_parameters
    # No sum of whole heads (1536 parameters) and blocks of 32 channels (4608) comes nearer than 1.2 % to this ratio.
    coarse = replace(case, method="magnitude", ratio=0.405, rounds=1, changes={"allocation": {"width_multiple": 32}})
    with pytest.raises(RuntimeError, match="magnitude left"):
        prune(other, whole, coarse, tokens, Statistics(None, {}))


def test_results_outlive_the_process(tmp_path: Path) -> None:
    changed = Case("piem", 0.2, 1, 0, "repeated", 24, 256, {"scoring": {"gamma": 0.0}})
    results = Results(tmp_path / "quality.json", {"dtype": "bfloat16"})
    assert results.get(BASE) is None
    results.add(BASE, {"perplexity": 30.0})
    results.add(changed, {"perplexity": 40.0})
    again = Results(tmp_path / "quality.json", {"dtype": "bfloat16"})
    assert again.get(BASE) == {"perplexity": 30.0} and again.get(changed) == {"perplexity": 40.0}
    assert again.get(Case("piem", 0.2, 1, 0, "repeated", 24, 256)) is None
    with pytest.raises(SystemExit, match="dtype"):
        Results(tmp_path / "quality.json", {"dtype": "float32"})


def test_every_case_of_every_table_is_a_valid_request() -> None:
    sections = [
        grid(BASE, list(STATIC_METHODS), [0.2, 0.4, 0.5], [1, 4], [0, 1, 2]),
        *variants(BASE, list(STATIC_METHODS), [0.2], [0]),
        *ablations(BASE, [0, 1, 2]),
        trained(BASE, [0]),
    ]
    cases = [case for section in sections for case in section.cases()]
    for case in cases:
        spec = case.spec
        assert (spec.method, spec.target_ratio, components(spec).rounds) == (case.method, case.ratio, case.rounds)
    assert len({case.key for case in cases[: len(STATIC_METHODS) * 18]}) == len(STATIC_METHODS) * 18
    assert len({section.title for section in sections}) == len(sections)
    by_title = {section.title: [row.case.spec for row in section.rows] for section in sections}
    slimllm = by_title["SlimLLM, table 4: its strategies"]
    assert [components(spec).allocator.name for spec in slimllm] == ["cosine", "cosine", "cosine", "uniform"]
    assert [components(spec).layerwise.name for spec in by_title["SlimLLM, table 6: linear regression"]] == [
        "linear-regression",
        "none",
    ]
    assert [spec.recovery.training and spec.recovery.training.kind for spec in by_title["With training"]] == [
        "distill",
        "lora",
    ]


def test_a_table_shows_what_is_known_by_ratio_and_seed() -> None:
    section = grid(BASE, ["flap", "wanda"], [0.2, 0.4], [1], [0, 1])
    known = {
        case.key: {"perplexity": perplexity, "unpruned": 20.0, "seconds": 3.0}
        for case, perplexity in zip(section.cases(), [20.0, 80.0, 5000.0], strict=False)
    }
    lines = section.render(lambda case: known.get(case.key)).splitlines()
    assert lines[0] == "## KV heads repeated to the query heads, 24 × 256 tokens"
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|") == 9
    excess, spread = math.log(4) / 2, math.log(4) / math.sqrt(2)
    assert lines[4] == (
        f"| flap | 1 | 40.0 (20.0 to 80.0) | {excess:.3f} ± {spread:.3f} | 3 | 5.0e+03 | {math.log(250):.3f} | 3 |"
    )
    assert lines[5] == "| wanda | 1 | – | – | – | – | – | – |"


def test_excess_loss_is_in_nats_over_the_unpruned_model() -> None:
    assert excess_loss(27.1 * math.e, 27.1) == pytest.approx(1)
    assert excess_loss(27.1, 27.1) == 0


def test_cells() -> None:
    assert perplexity_cell([10.0, 40.0]) == "20.0 (10.0 to 40.0)"
    assert perplexity_cell([27.101, 27.102]) == "27.1"
    assert mean_cell([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert mean_cell([math.inf, 1.0], 1) == "inf"
    assert perplexity_cell([]) == mean_cell([], 1) == "–"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


WIDTHS_TOO: dict[str, Any] = {"structures": ["layers", "kv_groups", "channels"], "shares": {"layers": 1 / 6}}


@pytest.mark.parametrize(
    ("search", "request_"),
    [
        ("sleb", {"method": "sleb", "target_ratio": 1 / 6}),
        ("compensated-loss", {"method": "secateur", "target_ratio": 1 / 6, "structures": ["layers"]}),
        ("compensated-loss", {"method": "secateur", "target_ratio": 0.4, **WIDTHS_TOO}),
    ],
)
def test_a_shared_search_gives_the_model_of_the_request(
    search: Any, request_: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    evaluation = Evaluation(texts=english("evaluation"), samples=1, sequence_length=32, latency=False, prompts=[])
    spec = PruningSpec.model_validate({**request_, "allocation": {"width_multiple": 8}, "evaluation": evaluation})
    decoder = decoder_of(make_model("llama", num_hidden_layers=6), tokenizer)
    ids = torch.tensor(tokenizer("\n\n".join(english("calibration"))).input_ids)
    tokens = ids[: 5 * 32].view(5, 32)
    orders: dict[str, list[int]] = {}

    def kept(kind: str, key: str, measure: Any) -> Any:
        return orders.setdefault(key, measure())

    found = remove(decoder, spec, tokens, search, kept, Statistics(None, {}))
    model = LoadedModel(copy.deepcopy(decoder.model), tokenizer)
    with open_run(model, spec, Workspace(device="cpu"), Listener(), tokens=tokens) as run:
        expected = run.prune(0).decoder
    assert len(orders[search]) == 2 and len(found.layers) == 5  # the order serves a larger ratio too
    assert torch.equal(found.model(tokens).logits, expected.model(tokens).logits)


def test_points_of_structures_are_valid_requests_that_differ() -> None:
    assert all(components(point.spec).structures for point in points())
    assert len({point.key for point in points()}) == len(points())


def test_rows_outlive_the_process(tmp_path: Path) -> None:
    def fail() -> None:
        raise AssertionError("a known row was measured again")

    rows = Rows(tmp_path / "structures.jsonl", {"dtype": "float32"})
    assert rows.kept("order", "sleb", lambda: [3, 1]) == [3, 1]
    assert Rows(tmp_path / "structures.jsonl", {"dtype": "float32"}).kept("order", "sleb", fail) == [3, 1]
    with pytest.raises(SystemExit, match="other settings"):
        Rows(tmp_path / "structures.jsonl", {"dtype": "bfloat16"})


def test_a_loss_is_read_between_measured_points() -> None:
    curve = [{"time": time, "loss": loss} for time, loss in ((0.7, 0.9), (0.9, 0.3), (1.0, 0.0))]
    assert loss_at(curve, 0.8) == pytest.approx(0.6)
    assert loss_at(curve, 0.9) == pytest.approx(0.3)
    assert loss_at(curve, 0.6) is None
