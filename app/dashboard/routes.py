"""The web page at ``/``: one HTML file and its JavaScript modules, served unchanged.

The page loads all data from ``/v1`` with the reader's API key.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "static"
ASSETS = "/assets"
REVALIDATE = {"Cache-Control": "no-cache"}
"""Headers that make browsers revalidate the files, because the files of one release belong together."""


class _Assets(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(REVALIDATE)
        return response


def install(app: FastAPI) -> None:
    """Add the routes of the page and its files to the application."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FOLDER / "index.html", headers=REVALIDATE)

    app.mount(ASSETS, _Assets(directory=FOLDER))
