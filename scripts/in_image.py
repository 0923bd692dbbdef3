"""Run the service, a job of each method, and the health check of each role: ``python in_image.py METHOD...``.

``make test-image`` runs this file in the image's layout, and ``make image`` runs it in a container. The file needs the
standard library and the installed packages alone, and takes the environment as the image sets it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOME = Path(os.environ["SECATEUR_HOME"])
DATA = Path(os.environ["SECATEUR_DATA_DIR"])
ROLES = ("api", "worker", "scheduler")
TEXTS = {"calibration": {}, "evaluation": {"latency": False}}
READY_SECONDS = 240.0
GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("the river", return_tensors="pt").input_ids
assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
"""


def run(*argv: str | Path, folder: Path = DATA, code: int = 0) -> str:
    """Run a command and return what it printed; any exit code other than ``code`` ends this process."""
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    if done.returncode != code:
        sys.exit(f"'{argv}' ended with exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


@contextmanager
def service() -> Iterator[None]:
    """Run ``secateur up``, and put its address and its API key into the environment."""
    log = DATA / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen(["secateur", "up"], cwd=DATA, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "Ctrl-C" not in log.read_text():
            if up.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"'secateur up' is not ready:\n{log.read_text()}")
            time.sleep(0.2)
        os.environ["SECATEUR_URL"] = re.findall(r"running at (\S+)", log.read_text())[0]
        os.environ["SECATEUR_API_KEY"] = (DATA / "api-key").read_text().strip()
        yield
    finally:
        up.send_signal(signal.SIGINT)
        up.wait()
    if up.returncode != 0:
        sys.exit(f"'secateur up' ended with exit code {up.returncode}:\n{log.read_text()}")


def make_model() -> None:
    """Make the model ``local:tiny``, and a recipe with texts."""
    (DATA / "models").mkdir(exist_ok=True)
    run(sys.executable, Path(__file__).with_name("tiny_model.py"), DATA)
    (DATA / "model").rename(DATA / "models" / "tiny")
    recipe = {
        name: {"texts": [(DATA / f"{name}.txt").read_text()], "samples": 8, "sequence_length": 64, **changes}
        for name, changes in TEXTS.items()
    }
    (DATA / "recipe.json").write_text(json.dumps(recipe))


def run_job(method: str) -> None:
    """Submit a job by the command line, wait for its success, and generate with the model that it published."""
    options = ("--recipe", "recipe.json", "--ratio", "0.3", "--method", method, "--repo-id", f"secateur/{method}")
    job = run("secateur", "submit", "local:tiny", *options)
    print(run("secateur", "watch", job).splitlines()[-1])
    published = DATA / "hub" / "secateur" / method
    if not (published / "widths.png").is_file():
        sys.exit(f"{published} lacks the picture of the widths")
    run(sys.executable, "-c", GENERATE, published)


def check_health(code: int) -> None:
    """Run the health check of every role; each must end with exit code ``code``."""
    for role in ROLES:
        address = ("--url", os.environ["SECATEUR_URL"]) if role == "api" else ()
        told = run(sys.executable, "-m", "workers", "health", role, *address, folder=HOME, code=code)
        print(told or f"The health check of the {role} fails.")


def main() -> None:
    """Make the model, run the jobs and run the health checks."""
    make_model()
    with service():
        for method in sys.argv[1:]:
            run_job(method)
        check_health(0)
    check_health(1)


if __name__ == "__main__":
    main()
