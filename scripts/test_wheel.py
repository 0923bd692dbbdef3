"""Build the distribution, install it outside the checkout, and test it: ``make test-wheel``, ``make test-base``.

The wheel with the extra ``engine`` prunes a small model in a folder with an ``app/`` of its own, by a call and by the
command line. The wheel without extras has the client and the command line, and says which extra the other features
need.
"""

import argparse
import json
import struct
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

from scripts import fresh
from scripts.fresh import ROOT, Venv, check, run, step

METHODS = ("secateur", "dsgp")
"""One method that cuts tensors, and one method whose models prune themselves.

Each of the methods writes a different template.
"""
EXTRAS = {"all", "dev", "engine", "eval", "gguf", "server", "telemetry"}
HEAVY = ("torch", "transformers", "fastapi", "starlette", "celery", "sqlalchemy", "matplotlib", "lm_eval")
SLOWEST_IMPORT = 2.0
"""Longest time of ``import secateur`` that is allowed, in times of ``import pydantic``."""
REPEATS = 9

LIBRARY = """
import sys
from pathlib import Path

import app
from secateur import prune
from transformers import AutoModelForCausalLM, AutoTokenizer

assert app.OWN, "the folder's own package is imported"
text = Path("calibration.txt").read_text()
texts = [text[start : start + 2000] for start in range(0, len(text), 2000)]
for method in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained("model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    before = model.num_parameters()
    result = prune(model, tokenizer=tokenizer, ratio=0.3, method=method, data=texts, progress=False)
    if method != "dsgp":
        assert result.model is model and model.num_parameters() < before, "a loaded model is pruned in place"
    result.save(Path("library") / method)
"""

LOAD = """
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = AutoTokenizer.from_pretrained(folder)("The keeper of the", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
assert not [name for name in sys.modules if name.partition(".")[0] == "secateur"]
"""

LIGHT = """
import importlib, pkgutil, sys

import secateur

for part in pkgutil.iter_modules(secateur.__path__, "secateur."):
    if part.name in ("secateur.engine", "secateur.library", "secateur.__main__", "secateur.launch"):
        continue
    module = importlib.import_module(part.name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{part.name}."):
        importlib.import_module(found.name)
from secateur.client import AsyncClient, Client

heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:]))
assert not heavy, f"imported: {heavy}"
"""

REFUSED_CALL = """
try:
    from secateur import prune

    prune("model", ratio=0.3)
except ImportError as error:
    assert "pip install 'secateur[engine]'" in str(error), error
else:
    raise AssertionError("pruned without torch")
"""

IMPORT_SECONDS = (
    "import sys, time; began = time.perf_counter(); __import__(sys.argv[1]); print(time.perf_counter() - began)"
)


def main() -> None:
    """Build the distribution, and run the tests that the arguments select."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", action="store_true", help="only the wheel without extras")
    base_alone = parser.parse_args().base
    with tempfile.TemporaryDirectory(prefix="secateur-wheel-") as name:
        folder = Path(name)
        with step("build wheel and source distribution"):
            names = [path.name for path in ROOT.iterdir() if not path.name.startswith(".")]
            source = fresh.copy_checkout(folder / "source", names)
            wheel, sdist = fresh.build(source, folder / "tools", folder / "dist")
            check_contents(wheel, sdist)
        with step("install the wheel without extras"):
            base = Venv(folder / "base")
            base.install(str(wheel))
        with step("use the wheel without extras"):
            test_base(base, folder / "base-project", source)
        if base_alone:
            return
        with step("install the wheel with the extra 'engine'"):
            engine = Venv(folder / "engine")
            engine.install(f"{wheel}[engine]")
        with step("prune with the wheel"):
            test_engine(engine, folder / "engine-project")


def check_contents(wheel: Path, sdist: Path) -> None:
    """Check that the whole library is packed, and nothing else."""
    info = f"secateur-{fresh.version()}.dist-info"
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "secateur").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    check({"secateur/py.typed"} < ours and any(name.endswith(".tmpl") for name in ours), "the checkout is incomplete")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    tops = {PurePosixPath(name).parts[0] for name in packed}
    check(tops == {"secateur", info}, f"the wheel holds {sorted(tops)}")
    check(packed >= ours, f"the wheel lacks {sorted(ours - packed)}")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    check(packed >= ours, f"the source distribution lacks {sorted(ours - packed)}")
    strange = packed & {"app", "workers", "migrations", "tests", "benchmarks", "demo", "scripts", "docs"}
    check(not strange, f"the source distribution holds {sorted(strange)}")
    extras = set(metadata.get_all("Provides-Extra", []))
    check(extras == EXTRAS, f"the extras are {sorted(extras)}")
    check(metadata["Requires-Python"] == ">=3.11", f"the wheel requires Python {metadata['Requires-Python']}")


def test_base(venv: Venv, project: Path, checkout: Path) -> None:
    """Test the client and the command line, without torch and without a web framework."""
    project.mkdir()
    check(not (heavy := venv.has(*HEAVY)), f"the base installs {heavy}")
    run([venv.python, "-c", LIGHT, *HEAVY], project)
    secateur = venv.bin / "secateur"
    check("prune" in run([secateur, "--help"], project).stdout, "--help does not name the command 'prune'")
    shown = run([secateur, "--version"], project).stdout
    check(shown == f"secateur {fresh.version()}\n", f"--version prints {shown!r}")
    make_model_files(project / "model")
    shown = run([secateur, "inspect", "model"], project).stdout
    check("family llama" in shown, f"'inspect' prints {shown!r}")

    run([venv.python, "-c", REFUSED_CALL], project)
    prune: list[str | Path] = [secateur, "prune", "model", "--ratio", "0.3", "--output", "pruned"]
    check_refused(prune, project, "pip install 'secateur[engine]'")
    make_model_files(project / "unknown", model_type="granite")
    check_refused([secateur, "inspect", "unknown"], project, "pip install 'secateur[engine]'")
    for command in ("up", "worker", "scheduler", "migrate", "keys", "doctor"):
        check_refused([secateur, command], project, "SECATEUR_HOME")
    check_refused([secateur, "up"], checkout, "pip install 'secateur[server]'")

    seconds = {name: import_seconds(venv, name, project) for name in ("pydantic", "secateur")}
    ratio = seconds["secateur"] / seconds["pydantic"]
    print(f"  import secateur takes {seconds['secateur']:.3f} s, {ratio:.2f} times as long as import pydantic")
    check(ratio <= SLOWEST_IMPORT, f"'import secateur' takes {ratio:.1f} times as long as 'import pydantic'")


def check_refused(argv: list[str | Path], folder: Path, advice: str) -> None:
    """Check that a command ends with exit code 2 and one line on stderr that contains ``advice``."""
    told = run(argv, folder, code=2).stderr
    check(len(told.splitlines()) == 1 and advice in told, f"'{' '.join(map(str, argv))}' prints {told!r}")


def import_seconds(venv: Venv, module: str, folder: Path) -> float:
    """Return the seconds of importing ``module`` in a new process: the fastest of several runs."""
    return min(float(run([venv.python, "-c", IMPORT_SECONDS, module], folder).stdout) for _ in range(REPEATS))


def make_model_files(folder: Path, model_type: str = "llama") -> None:
    """Make a model folder with every file that is read before the weights."""
    folder.mkdir()
    config = {
        "model_type": model_type,
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def test_engine(venv: Venv, project: Path) -> None:
    """Prune with both methods, by a call with a loaded model and by the command line."""
    check(not (found := venv.has("matplotlib", "lm_eval", "fastapi", "celery")), f"the extra 'engine' installs {found}")
    (project / "app").mkdir(parents=True)
    (project / "app" / "__init__.py").write_text("OWN = True\n")
    one_thread = {"OMP_NUM_THREADS": "1"}
    run([venv.python, ROOT / "scripts" / "tiny_model.py", "."], project)
    run([venv.python, "-c", LIBRARY, *METHODS], project, changes=one_thread)
    texts = ["--calibration", "calibration.txt", "--evaluation", "evaluation.txt"]
    for method in METHODS:
        options = ["--ratio", "0.3", "--method", method, *texts, "--output", f"command/{method}"]
        run([venv.bin / "secateur", "prune", "model", *options], project, changes=one_thread)
    folders = [f"{way}/{method}" for way in ("library", "command") for method in METHODS]
    for folder in folders:
        card = (project / folder / "README.md").read_text()
        check("widths.png" not in card, f"the card of {folder} shows a picture that matplotlib would have drawn")
    run([venv.python, "-c", LOAD, *folders], project, changes=one_thread)


if __name__ == "__main__":
    fresh.main(main)
