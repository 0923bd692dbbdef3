"""``make reference``: plans and weights of every method on every family of the test models, held against a kept reference.

The script shows that a change of the code changes no result: it prunes a tiny random model of each family by each method, a Llama in
two rounds too, and hashes the plan (over layer, structure and sorted kept units) and the weights. Hashes are equal on one machine
with one thread; the kept reference (``tests/engine/reference.json``) therefore also has the plans themselves and the tensors' norms,
which are compared on any machine: plans exactly but for ties, norms within a tolerance.

A change that is meant to change results writes the reference anew (``--write``); the printed differences belong into its report.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from secateur.catalog.methods import METHODS
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.catalog.structures import WIDTHS
from secateur.contract.errors import PruningError
from secateur.engine.model.plan import Plan, PlanData
from secateur.engine.run.run import NamedModel, open_run
from secateur.engine.run.workspace import Listener, Workspace
from tests.engine.models import FAMILIES, LIKE_LLAMA, english, make_model, make_tokenizer, save

REFERENCE = Path(__file__).parents[1] / "tests" / "engine" / "reference.json"
RATIO = 0.4
TIED = 0.03
"""Share of a layer's units that may differ although their numbers are equal: units whose scores tie to within rounding."""
PLAN: TypeAdapter[Any] = TypeAdapter(PlanData)
TOLERANCE = 2e-3
"""Relative difference of a tensor's norm."""

Result = dict[str, Any]
"""``error``, or ``plan``, ``plan_hash``, ``weights_hash`` and ``norms``."""


def names() -> list[str]:
    """All cases, as ``family/method/rounds``."""
    return [
        f"{family}/{method.name}/{rounds}"
        for family in (*FAMILIES, *LIKE_LLAMA)
        for method in METHODS.values()
        if method.structures == WIDTHS  # whole units have tests of their own
        for rounds in ((1, 2) if family == "llama" and not method.dynamic else (1,))
    ]


def run(cases: list[str]) -> Iterator[tuple[str, Result]]:
    """Prune every case; cases of one family must follow each other."""
    torch.set_num_threads(1)
    tokenizer, family, source = make_tokenizer(), "", Path()
    with tempfile.TemporaryDirectory() as folder:
        for name in cases:
            wanted, method, rounds = name.split("/")
            if wanted != family:
                family, source = wanted, save(make_model(wanted), tokenizer, Path(folder, wanted))
            yield name, prune(source, method, int(rounds), Path(folder, "out"))


def prune(source: Path, method: str, rounds: int, folder: Path) -> Result:
    """What one case comes to. ``folder`` is where the files are written for a moment."""
    spec = PruningSpec(
        target_ratio=RATIO,
        method=method,
        rounds=rounds,
        calibration=Calibration(texts=english("calibration"), samples=4, sequence_length=32),
        evaluation=Evaluation(texts=english("evaluation"), samples=2, sequence_length=32, latency=False, prompts=[]),
        allocation={"width_multiple": 8},
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as written:
        try:
            with open_run(NamedModel(str(source)), spec, Workspace(device="cpu"), Listener()) as opened:
                pruned = opened.prune(0)
                pruned.write(Path(written), spec.layout, spec.formats)
        except PruningError as error:
            return {"error": error.code}
        tensors = {
            name: tensor
            for file in sorted(Path(written).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
    return {
        "plan": pruned.plan.as_data().model_dump(mode="json"),
        "plan_hash": plan_hash(pruned.plan),
        "weights_hash": weights_hash(tensors),
        "norms": [float(f"{tensors[name].double().norm():.6g}") for name in sorted(tensors)],
    }


def plan_hash(plan: Plan) -> str:
    """A hash over layer, structure and sorted kept units, whatever the plan's JSON form."""
    kept = [{structure: sorted(units) for structure, units in layer.items()} for layer in plan.layers]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def weights_hash(tensors: dict[str, torch.Tensor]) -> str:
    """A hash over every tensor's name and bytes."""
    digests = {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, tensor in tensors.items()
    }
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def difference(expected: Result, found: Result) -> str | None:
    """How ``found`` differs from ``expected`` beyond ties and tolerance, in words; ``None``: it does not."""
    if "error" in expected or "error" in found:
        one, other = expected.get("error"), found.get("error")
        return None if one == other else f"error {one} became {other}"
    plans = [Plan.from_data(PLAN.validate_python(each["plan"])) for each in (expected, found)]
    for index, (old, new) in enumerate(zip(plans[0].layers, plans[1].layers, strict=True)):
        for structure in sorted(old.keys() | new.keys(), reverse=True):
            was, now = old.get(structure, ()), new.get(structure, ())
            if len(was) != len(now):
                return f"layer {index} keeps {len(now)} {structure}, not {len(was)}"
            if len(set(was) - set(now)) > max(TIED * len(was), 1 if structure == "channels" else 0):
                return f"layer {index} keeps other {structure}"
    if plans[0] != plans[1]:
        return None  # other units of tied scores have other weights
    if len(expected["norms"]) != len(found["norms"]):
        return f"{len(found['norms'])} tensors, not {len(expected['norms'])}"
    far = [
        at
        for at, (was, now) in enumerate(zip(expected["norms"], found["norms"], strict=True))
        if not math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=1e-6)
    ]
    return f"the weights of {len(far)} tensors differ" if far else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the reference anew")
    parser.add_argument("--exact", action="store_true", help="compare by hash: on the machine that wrote the reference")
    parser.add_argument("--file", type=Path, default=REFERENCE, help="the reference")
    options = parser.parse_args()
    before: dict[str, Result] = json.loads(options.file.read_text()) if options.file.exists() else {}
    after: dict[str, Result] = {}
    changed = 0
    for name, found in run(names()):
        after[name] = found
        expected = before.get(name)
        if expected is None:
            told = "new"
        elif options.exact:
            keys = ("error", "plan_hash", "weights_hash")
            told = "" if all(expected.get(key) == found.get(key) for key in keys) else "another hash"
        else:
            told = difference(expected, found) or ""
        changed += bool(told)
        if told:
            print(f"{name}: {told}", flush=True)
    print(f"{len(after)} cases, {changed} differ")
    if options.write:
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in after.items()
        )
        options.file.write_text("{\n" + lines + "\n}\n")
    elif changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
