"""The JSON file of a benchmark. It is written after every case, so a run that was killed continues after its last case."""

import json
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from secateur.files import write_whole


class Results:
    """The results by case. ``settings`` are the settings that all cases of the file share.

    Raises:
        SystemExit: the file has results of other settings (for example, of another version of torch), which cannot be compared.
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
        """Return all cases that have a result, in the order in which they were measured."""
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
