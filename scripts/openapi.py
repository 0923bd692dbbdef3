"""Write the service's OpenAPI document to a file: ``make openapi``.

The changelog must tell the changes of the document (tests/api/test_contract.py).
"""

import hashlib
import json
import sys
from pathlib import Path

from app.main import create_app


def document() -> str:
    """Return the document as text; the same code gives the same text."""
    return json.dumps(create_app().openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def digest(text: str) -> str:
    """Return the digest by which the changelog names a document."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    text = document()
    Path(sys.argv[1]).write_text(text)
    print(f"{sys.argv[1]}: contract {digest(text)}; CHANGELOG.md must name it")
