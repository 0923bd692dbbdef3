"""Every command of the documentation is run, page by page, against a running service; those that cannot be are listed here."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.main import get_group

from scripts.docs_site import TOP_LEVEL, site_links
from secateur.cli.main import cli
from tests.engine.models import SIZES, make_tokenizer, save, train
from tests.patience import PATIENCE
from tests.workers.conftest import ROOT, SHORT
from tests.workers.test_stack import address_and_key

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = {
    "make demo": "the README's first command; minutes",
    "make test": "this",
    "make check": ".ci/run calls it",
    ".venv/bin/pip install pre-commit": "changes the environment",
    ".venv/bin/pre-commit install": "changes the checkout",
    "SECATEUR_DATA_DIR=.demo .venv/bin/secateur up": "the fixture's, with another folder",
    ". .venv/bin/activate": "the fixture's environment",
    "export SECATEUR_DATA_DIR=.demo SECATEUR_URL=ADDRESS SECATEUR_API_KEY=KEY": "the fixture's environment",
    'echo "POSTGRES_PASSWORD=$(openssl rand -hex 16)" > .env': "for Docker",
    "docker compose up --build --detach": "needs Docker",
    "docker compose exec api secateur keys create platform-team": "needs Docker",
    "kubectl create namespace secateur": "needs a cluster",
    "kubectl create secret generic secateur --namespace secateur --from-file secrets": "needs a cluster",
    "kubectl apply --kustomize deploy/kubernetes/overlays/cpu": "tests/test_kubernetes.py, without a cluster",
    "kubectl wait --namespace secateur --for condition=complete --timeout 10m job/secateur-migrate": "needs a cluster",
    "kubectl exec --namespace secateur deployment/secateur-api -- secateur keys create platform-team": "needs a cluster",
    "kubectl delete job --namespace secateur --ignore-not-found secateur-migrate": "needs a cluster",
    "kubectl rollout status --namespace secateur deployment/secateur-api": "needs a cluster",
    "secateur workers list": "tests/api/test_workers.py",
    "secateur workers drain gpu-host-3:4711": "tests/api/test_workers.py",
    "secateur workers resume gpu-host-3:4711": "tests/api/test_workers.py",
    'pg_dump --format custom --file secateur.dump "$DATABASE"': "tests/workers/test_backup.py",
    'tar --create --file data.tar -C "$SECATEUR_DATA_DIR" .': "tests/workers/test_backup.py, as a copy",
}
"""Commands in ``console`` blocks, and why they are not run here."""
RUN = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("quickstart", "api", "client", "library", "recipes"))]
MODEL = "smollm2-135m-instruct"
FOLLOWED = ROOT / "CONTRIBUTING.md"
"""tests/test_contributing.py runs what stands there."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Kind and text of a page's blocks, without those that another test runs."""
    elsewhere = ("sh", "python") if page == FOLLOWED else ()
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind not in elsewhere]


def pages() -> list[Path]:
    return [*(ROOT / name for name in TOP_LEVEL), *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a shell beside a running service, whose model is a small one."""
    data = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    save(train(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer, 30), tokenizer, data / "models" / MODEL)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SECATEUR_")}
    plain |= {
        "SECATEUR_DATA_DIR": str(data),
        "SECATEUR_TORCH_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{plain['PATH']}",
        "no_proxy": "*",
    }
    served = plain | {f"SECATEUR_{name}": value for name, value in SHORT.items()}
    process = subprocess.Popen([sys.executable, "-m", "workers", "up"], stdout=subprocess.PIPE, env=served)
    url, key = address_and_key(process, data)
    yield plain | {"SECATEUR_URL": url, "SECATEUR_API_KEY": key}
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)


def script(page: Path) -> str:
    """The page as a shell script. Python blocks that follow each other are one program, like the cells of a notebook; a YAML block
    is written to the file that its first line names."""
    lines = ["set -euo pipefail"]
    runnable = (block for block in blocks(page) if block[0] in ("sh", "python", "yaml"))
    for kind, group in groupby(runnable, key=itemgetter(0)):
        texts = [text for _, text in group]
        if kind == "python":
            lines.append("python - <<'PYTHON'\n" + "".join(texts) + "PYTHON")
        elif kind == "yaml":
            lines += [f"cat > {text.splitlines()[0].removeprefix('# ')} <<'YAML'\n{text}YAML" for text in texts]
        else:
            lines += texts
    return "\n".join(lines)


@pytest.mark.docs
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")  # pages start in a checkout
    done = subprocess.run(
        ["bash", "-c", script(page)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_no_command_slips_in_unrun() -> None:
    shown = set()
    for page in pages():
        for kind, text in blocks(page):
            assert kind in ("sh", "python", "yaml", "console", "http", "text"), f"{page.name}: {kind}"
            assert kind not in ("sh", "python", "yaml") or page in RUN, f"{page.name} has commands that no test runs"
            if kind == "console":
                shown |= set(text.strip().splitlines())
        indented = re.search(r"\n\n    \S.*", re.sub(BLOCK, "", page.read_text()))
        assert not indented or re.match(r"\s+\d\.|\s+-", indented[0]), f"{page.name}: {indented[0]}"
    assert shown == SHOWN.keys()


def test_what_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = get_group(cli).commands.keys()
    for page in pages():
        text = page.read_text()
        if page.name == "CHANGELOG.md":  # names what was renamed or removed, too
            text = re.sub(r"`[^`\n]+`", "", text)
        for target in re.findall(r"[`\n]make ([a-z-]+)", text):
            assert target in targets, f"{page.name}: make {target}"
        for command in re.findall(r"[`\n]secateur ([a-z][a-z-]*)", text):
            assert command in commands, f"{page.name}: secateur {command}"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_sites_navigation() -> None:
    def listed(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from listed(value) if isinstance(value, list) else [value]

    navigation = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    in_docs = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(navigation) == sorted([*in_docs, *TOP_LEVEL.values()]), "see 'nav' in mkdocs.yml"


@pytest.mark.parametrize(
    ("page", "link", "in_site"),
    [
        ("overview.md", "[quickstart](docs/quickstart.md#a)", "[quickstart](quickstart.md#a)"),
        ("overview.md", "[`docs/`](docs/README.md)", "[`docs/`](README.md)"),
        ("client.md", "[CHANGELOG.md](../CHANGELOG.md)", "[CHANGELOG.md](changelog.md)"),
        ("decisions/README.md", "[CONTRIBUTING](../../CONTRIBUTING.md)", "[CONTRIBUTING](../contributing.md)"),
        ("limits.md", "[benchmarks/](benchmarks/)", "[benchmarks/](benchmarks/README.md)"),
        ("contributing.md", "[methods](secateur/catalog/methods.py)", "methods"),
        ("concepts.md", "![units](pictures/units.svg)", "![units](pictures/units.svg)"),
        ("concepts.md", "[here](#units), `[a](b.md)`, [away](https://example.org)", None),
        ("concepts.md", "[nowhere](nowhere.md)", None),
        ("concepts.md", "```text\n[a](../README.md)\n```\n", None),
    ],
)
def test_links_work_in_the_site_too(page: str, link: str, in_site: str | None) -> None:
    assert site_links(link, page) == (link if in_site is None else in_site)
