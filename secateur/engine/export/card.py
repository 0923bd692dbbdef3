"""The model card, which describes a pruned model to its users."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from secateur.catalog.methods import METHODS, Method
from secateur.contract.report import ComponentNames, LayerWidths, Report, VocabularyChange
from secateur.engine.evaluation import unsteady

PICTURE = "widths.png"


def model_card(
    report: Report,
    extra: Mapping[str, Any],
    gguf_file: str | None = None,
    own_class: str | None = None,
    picture: bool = True,
    code: bool = True,
) -> str:
    """Return the text of README.md of the published repository.

    ``report`` is the run's report; ``extra`` holds the manifest's additional entries (job id, repo_id). ``own_class``
    is the file with the model's class, if transformers has no class for the model. ``picture`` says whether the
    repository has the picture of the widths, and ``code`` whether it has Python files.
    """
    spec, ratio, source = report.spec, report.ratio, report.source
    method = METHODS[spec["method"]]
    base = source.model_id.removeprefix("local:")
    repo_id = extra.get("repo_id") or "path/to/this/folder"
    on_hub = source.revision is not None
    head = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "structured-pruning", "secateur", method.name],
    )
    return f"""---
{head.to_yaml()}
---

{_opening(method, base, f"[{base}](https://huggingface.co/{base})" if on_hub else base, report)}

| | before | after |
|---|---|---|
{_table(report)}

Perplexity on {report.evaluation.tokens:,} tokens ({report.evaluation.source}){", the second half of each window when the first is read" if method.dynamic else ""}.{_compared(report)} Latency on
{_device(report)}, batch 1.

## Use

{_use(spec["layout"], repo_id, gguf_file, own_class, method.dynamic, code)}

## How it was made

- Method: `{method.name}`{_description(method, report.components, spec["layout"])}
- Components: scorer `{report.components.scorer}`, allocator `{report.components.allocator}`, layer-wise recovery `{report.components.layerwise_recovery}`, training `{report.components.training or "none"}`
- Rounds: {report.rounds}; target ratio {ratio.target:g}; seed {spec["seed"]}; dtype {report.dtype}
- Calibration: {report.calibration.windows} × {report.calibration.sequence_length} tokens, {report.calibration.source}
- Source: `{source.model_id}`{f" at `{source.revision}`" if source.revision else ""}

{f"![Heads and feed-forward channels by layer, before and after]({PICTURE}){chr(10) * 2}" if picture else ""}| layer | KV groups | heads | feed-forward channels |
|---|---|---|---|
{_widths(report)}

`secateur.json` holds the request, the exact units kept, versions and file hashes. The same request on the same kind of
machine gives the same weights:

```json
{json.dumps({"model_id": source.model_id, **spec}, indent=1)}
```

Pruning changes what a model knows and says. Evaluate this model on your own task before you rely on it; the limits and
the licence of the base model apply.
"""


def _opening(method: Method, base: str, linked: str, report: Report) -> str:
    reached, vocabulary = report.ratio.reached, report.vocabulary
    if method.dynamic:
        return f"""# {base}, pruning itself for each prompt

All of {linked} reads the prompt and measures which units the prompt needs. The KV groups and feed-forward channels that matter
most are gathered into smaller weights, which generate the answer; this saves {reached:.2%} of the work in the attention and
feed-forward weights. The stored weights are unchanged.
"""
    if vocabulary is not None and report.ratio.target == 0:
        return f"""# {base}, with {vocabulary.after:,} tokens

{_tokens(vocabulary)} All other weights are those of {linked}.
"""
    return f"""# {base}, pruned by {reached:.1%}

{reached:.2%} of the parameters in the attention and feed-forward weights of {linked} were removed: {_removed(report)}
were cut out of the model. It needs no masks and no special kernels.
{"" if vocabulary is None else f"{chr(10)}{_tokens(vocabulary)}{chr(10)}"}"""


def _removed(report: Report) -> str:
    """Return what was removed, in words: whole units with their numbers, and whether widths were cut."""
    pairs = list(zip(report.widths.before, report.widths.after, strict=True))
    lost = Counter(_lost(before, after) for before, after in pairs)
    experts = max((before.experts - after.experts for before, after in pairs), default=0)
    parts = [
        (lost["layer"], f"{lost['layer']} of {len(pairs)} layers"),
        (lost["attention"], f"the attention of {lost['attention']} layers"),
        (lost["feed-forward"], f"the feed-forward of {lost['feed-forward']} layers"),
        (experts, f"{experts} experts of every layer that has some"),
        (lost["widths"], "whole KV groups of attention heads and whole feed-forward channels"),
    ]
    return ", ".join(words for there, words in parts if there) or "no units"


def _lost(before: LayerWidths, after: LayerWidths) -> str:
    """Return the largest part of a layer that is gone."""
    if not after.kv_groups and not after.channels:
        return "layer"
    if before.kv_groups and not after.kv_groups:
        return "attention"
    if before.channels and not after.channels:
        return "feed-forward"
    return "nothing" if (before.kv_groups, before.channels) == (after.kv_groups, after.channels) else "widths"


def _tokens(vocabulary: VocabularyChange) -> str:
    return f"""{vocabulary.before - vocabulary.after:,} of {vocabulary.before:,} tokens were removed from the tokenizer, the embedding and the head. Every
text can still be written, and is read as it was; a text of the kind by which the tokens were chosen takes
{vocabulary.growth:.1%} more tokens than before."""


def _compared(report: Report) -> str:
    if report.vocabulary is None:
        return ""
    return " Perplexity is a figure per token, so with other tokens it cannot be compared; nats per byte can."


DYNAMIC = """The repository carries a small modeling file; without `trust_remote_code` the stock class loads the plain model.
`config.json` has under `dynamic_pruning` what can be set, and the modeling file says what it means:"""

LAYOUTS = {
    "per-layer": "Layers differ in width.",
    "uniform": "All layers have the same widths.",
    "padded": "Layers that are narrower than the widest are filled up with zeros, which changes nothing that the model says.",
}


def _use(layout: str, repo_id: str, gguf_file: str | None, own_class: str | None, dynamic: bool, has_code: bool) -> str:
    code = has_code and (layout == "per-layer" or own_class is not None)
    classes = "The stock class loads it, without code from this repository:"
    if own_class is not None:
        classes = f"transformers has no class for this model: `{own_class}`, in this repository, is one."
    elif code:
        classes = "The repository carries a small modeling file, which cuts the stock classes to size:"
    text = f"""{DYNAMIC if dynamic else f"{LAYOUTS[layout if has_code or layout != 'per-layer' else 'uniform']} {classes}"}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", {"trust_remote_code=True, " if code else ""}dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
inputs = tokenizer("The river", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```"""
    if own_class is None and not dynamic:  # vLLM cannot run weights that change
        text += f"""

vLLM{", through its Transformers backend" if code else ""}:

```sh
vllm serve {repo_id}{" --model-impl transformers --trust-remote-code" if code else ""}
```"""
    if gguf_file is not None:
        text += f"""

llama.cpp:

```sh
llama-cli -m {gguf_file} -p "The river"
```"""
    return text


def _description(method: Method, components: ComponentNames, layout: str) -> str:
    """Describe the method of the paper, or say that the request replaced a component."""
    equal = layout == "uniform"
    own = ComponentNames(
        scorer=method.scorer,
        allocator=components.allocator if equal else method.allocator,
        layerwise_recovery=method.layerwise_recovery,
        training=None,
    )
    if components != own:
        return ", with components of the request's own"
    but = (
        "; the same widths in every layer, as the layout has it"
        if equal and components.allocator != method.allocator
        else ""
    )
    return f" — {method.summary} ({method.paper}; {method.equations}){but}"


def _table(report: Report) -> str:
    lines = [
        _row("parameters", f"{report.parameters.before:,}", f"{report.parameters.after:,}"),
        _row("weights (bytes)", f"{report.weights_bytes.before:,}", f"{report.weights_bytes.after:,}"),
        _row("FLOPs of 256 tokens", f"{report.flops.before:.3g}", f"{report.flops.after:.3g}"),
        _row("perplexity", _perplexity(report.perplexity.before), _perplexity(report.perplexity.after)),
    ]
    if report.nats_per_byte is not None:
        pair = report.nats_per_byte
        lines.append(_row("nats per byte", _nats(pair.before), _nats(pair.after)))
    if (tokens := report.vocabulary) is not None:
        lines.append(_row("tokens", f"{tokens.before:,}", f"{tokens.after:,}"))
        lines.append(_row("embedding and head (bytes)", f"{tokens.bytes_before:,}", f"{tokens.bytes_after:,}"))
    published = report.published
    if published is not None and published.parameters != report.parameters.after:
        lines.append(_row("parameters in the files, with the zeros", "", f"{published.parameters:,}"))
        lines.append(_row("weights in the files (bytes)", "", f"{published.weights_bytes:,}"))
    for name, pair in report.benchmarks.perplexity.items():
        lines.append(_row(f"perplexity, {name}", _perplexity(pair.before), _perplexity(pair.after)))
    for name, task in report.benchmarks.zero_shot.items():
        title = f"{name} ({task.metric}, {task.examples} examples)"
        lines.append(_row(title, f"{task.before:.3f}", f"{task.after:.3f}"))
    before, after = report.latency.before, report.latency.after
    if before is not None and after is not None:
        lines.append(_row("prefill (ms)", f"{before.prefill_ms:.1f}", f"{after.prefill_ms:.1f}"))
        lines.append(
            _row("decode (ms a token)", f"{before.decode_ms_per_token:.1f}", f"{after.decode_ms_per_token:.1f}")
        )
    if unsteady(before) or unsteady(after):
        lines += ["", "Repeats of prefill and decode are far apart: the machine was busy, and these times mean little."]
    return "\n".join(lines)


def _row(title: str, before: str, after: str) -> str:
    return f"| {title} | {before} | {after} |"


def _perplexity(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def _nats(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"


def _device(report: Report) -> str:
    latency = report.latency.after
    return f"{latency.device} ({latency.threads} CPU threads)" if latency else "no device: it was not measured"


def _widths(report: Report) -> str:
    return "\n".join(
        f"| {old.layer} | {_change(old.kv_groups, new.kv_groups)} | {_change(old.heads, new.heads)} | {_change(old.channels, new.channels)} |"
        for old, new in zip(report.widths.before, report.widths.after, strict=True)
    )


def _change(old: int, new: int) -> str:
    return f"{new}" if old == new else f"{old} → {new}"
