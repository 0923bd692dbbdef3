"""A benchmark's JSON file, written after every case: a run that was killed goes on where it was."""

import json
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from secateur.files import write_whole


class Results:
    """What was measured, by case. ``settings`` is what all cases of the file have in common.

    Raises:
        SystemExit: the file's results are of other settings (another version of torch, say), and cannot be compared.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        content: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"settings": settings, "results": []}
        )
        if content["settings"] != settings:
            differing = [name for name, value in settings.items() if content["settings"].get(name) != value]
            raise SystemExit(f"{path} has results of other settings ({', '.join(differing)}): move it away.")
        self._content = content
        self._known = {Case(**row["case"]).key: row["result"] for row in content["results"]}

    def cases(self) -> list[Case]:
        """All that were measured, in that order."""
        return [Case(**row["case"]) for row in self._content["results"]]

    def get(self, case: Case) -> dict[str, Any] | None:
        return self._known.get(case.key)

    def all(self) -> list[dict[str, Any]]:
        return list(self._known.values())

    def add(self, case: Case, result: dict[str, Any]) -> None:
        self._known[case.key] = result
        self._content["results"].append({"case": vars(case), "result": result})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, (json.dumps(self._content, indent=1) + "\n").encode())
