"""``make openapi``: the service's OpenAPI document as a file, whose changes the changelog must tell (tests/api/test_contract.py)."""

import hashlib
import json
import sys
from pathlib import Path

from app.main import create_app


def document() -> str:
    """The document as text: the same for the same code."""
    return json.dumps(create_app().openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def digest(text: str) -> str:
    """What the changelog names a document by."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    text = document()
    Path(sys.argv[1]).write_text(text)
    print(f"{sys.argv[1]}: contract {digest(text)}; CHANGELOG.md must name it")
