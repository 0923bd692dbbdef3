"""``make bench-sizes``: models that are larger than the memory, pruned on a CPU under a limit of the kernel.

A random Llama whose files are several budgets large is pruned by each method in a process of its own. The memory control
group of the process allows what its libraries hold, for it and for the check's process, and the budget. A twin of four
layers is pruned with and without the limit, and its plans are compared. The benchmark writes ``sizes.jsonl`` after each
run, and ``sizes.md`` at the end.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common import versions_line
from benchmarks.table import NONE, markdown

MIB = 2**20
GROUPS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
"""The folders in which the kernel has memory control groups of version 1 and 2, with the file that limits a group."""
TWIN_LAYERS = 4


def main() -> None:
    if sys.argv[1:2] == ["prune"]:
        prune(json.loads(sys.argv[2]))
        return
    made = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__)
    made.add_argument("--methods", nargs="+", default=["secateur", "slimllm", "flap"])
    made.add_argument("--budget-mib", type=int, default=96)
    made.add_argument("--multiple", type=float, default=3.0, help="size of the model in budgets")
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--samples", type=int, default=8)
    made.add_argument("--sequence-length", type=int, default=128)
    made.add_argument("--ratio", type=float, default=0.5)
    made.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = made.parse_args()
    results = arguments.output / "sizes.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    budget = arguments.budget_mib * MIB
    with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
        whole = make_model(Path(scratch, "whole"), arguments.width, arguments.multiple * budget)
        twin = make_model(Path(scratch, "twin"), arguments.width, 0)
        for method in arguments.methods:
            for model, limit in ((whole, budget), (whole, None), (twin, budget), (twin, None)):
                size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
                about = {
                    "method": method,
                    "model": model.name,
                    "bytes": size,
                    "budget": limit,
                    "width": arguments.width,
                }
                if any(about.items() <= row.items() for row in rows):
                    continue
                given = {name: getattr(arguments, name) for name in ("samples", "sequence_length", "ratio")}
                rows.append({**about, **given, **run({**about, **given, "folder": str(model)}, limit)})
                results.write_text("".join(json.dumps(row) + "\n" for row in rows))
                print(rows[-1], file=sys.stderr, flush=True)
    text = render(rows)
    (arguments.output / "sizes.md").write_text(text)
    print(text)


def make_model(folder: Path, width: int, size: float) -> Path:
    """Write a random Llama in float32 of at least ``size`` bytes and at least :data:`TWIN_LAYERS` layers, and return ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.engine.models import make_tokenizer

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 256}
    layer = 4 * (2 * width**2 + 2 * width * width // 4 + 12 * width**2)
    layers = max(-int(-size // layer), TWIN_LAYERS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, num_hidden_layers=layers))
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return folder


def run(asked: Mapping[str, Any], budget: int | None) -> dict[str, Any]:
    """Prune in a process of its own, whose control group allows ``budget`` bytes, and return what it measured."""
    limit = None if budget is None else make_group()
    command = [sys.executable, "-m", "benchmarks.sizes", "prune", json.dumps({**asked, "limit": limit and str(limit)})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if limit is not None:
        limit.parent.rmdir()
    if done.returncode:
        return {"ended": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_group() -> Path | None:
    """Return the file that limits a new memory control group, or ``None`` where this process may not make one."""
    for parent, file in GROUPS.items():
        group = parent / f"secateur-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / file).exists():
                return group / file
            group.rmdir()
    return None


def prune(asked: Mapping[str, Any]) -> None:
    """Prune as ``asked``, and print the largest anonymous memory beyond that of the libraries, the seconds, and the plan's hash."""
    import torch

    from secateur.catalog.spec import PruningSpec
    from secateur.engine.run.run import NamedModel, prune_to_folder
    from tests.engine.models import english

    torch.set_num_threads(1)
    peak = libraries = anonymous()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.02)

    if asked["limit"]:
        limit = Path(asked["limit"])
        limit.write_text(str(2 * libraries + asked["budget"]))
        (limit.parent / "cgroup.procs").write_text(str(os.getpid()))
    threading.Thread(target=watch, daemon=True).start()
    size = {name: asked[name] for name in ("samples", "sequence_length")}
    spec = PruningSpec.model_validate(
        {
            "method": asked["method"],
            "target_ratio": asked["ratio"],
            "rounds": 1,
            "calibration": {"texts": english("calibration"), **size},
            "evaluation": {"texts": english("evaluation"), **size, "latency": False, "prompts": []},
        }
    )
    with tempfile.TemporaryDirectory(dir=Path(asked["folder"]).parent) as out:
        began = time.monotonic()
        prune_to_folder(NamedModel(asked["folder"]), spec, Path(out, "pruned"))
        seconds = time.monotonic() - began
        plan = json.loads(Path(out, "pruned", "secateur.json").read_text())["plan"]
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    found = {"peak": peak - libraries, "seconds": seconds, "plan": digest[:16], "limited": bool(asked["limit"])}
    print(json.dumps(found))


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    from secateur.engine.export import versions

    def of(method: str, model: str, limited: bool) -> Mapping[str, Any]:
        found = (row for row in rows if (row["method"], row["model"], bool(row["budget"])) == (method, model, limited))
        return next(found, {})

    def ratio(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
        return f"{one[name] / other[name]:.2f}" if name in one and other.get(name) else NONE

    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        under, free = of(method, "whole", True), of(method, "whole", False)
        twins = [of(method, "twin", limited).get("plan") for limited in (True, False)]
        plans = [of(method, "whole", limited).get("plan") for limited in (True, False)]
        lines.append(
            [
                f"`{method}`",
                ratio(under, {"peak": under.get("budget")}, "peak"),
                ratio(under, {"peak": under.get("bytes")}, "peak"),
                ratio(under, free, "seconds"),
                "yes" if None not in plans and plans[0] == plans[1] else "no",
                "yes" if None not in twins and twins[0] == twins[1] else "no",
            ]
        )
    first = next(row for row in rows if row["model"] == "whole" and row["budget"])
    heads = [
        "method",
        "peak / budget",
        "peak / model",
        "seconds / without a limit",
        "same plan",
        "same plan of the twin",
    ]
    how = (
        "under a memory control group"
        if first.get("limited")
        else "without a limit, because no control group could be made"
    )
    return f"""# Sizes

`make bench-sizes`: a random Llama of width {first["width"]} in float32, {first["bytes"] / MIB:.0f} MiB in files, pruned by {first["ratio"]:.0%} on
one thread of a CPU, {how}. The budget is {first["budget"] / MIB:.0f} MiB beyond what the
libraries hold ({first["bytes"] / first["budget"]:.1f} budgets in the model). The group also allows the libraries of the process that checks the
files. Calibrated on {first["samples"]} × {first["sequence_length"]} tokens.

| column | meaning |
| --- | --- |
| peak | largest anonymous memory of the pruning process, beyond that of its libraries; pages of files, which the kernel may drop, are not counted |
| seconds | of the whole run, with measuring, export and check, as a ratio to the same run without a limit |
| same plan | whether the runs with and without the limit keep the same units; the twin has {TWIN_LAYERS} layers |

{markdown(heads, lines)}

{versions_line({"versions": versions()})}
"""


if __name__ == "__main__":
    main()
