"""What polling is compared with: FastAPI and psycopg alone, one row by its id. ``uvicorn benchmarks.bare:create_app --factory``."""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

CONNECTIONS = 40
"""As many as the service's engine may open, and as there are threads for sync routes."""


def create_app() -> FastAPI:
    """The application, on the database of the environment."""
    url = os.environ["SECATEUR_DATABASE_URL"].replace("+psycopg", "")
    pool = ConnectionPool(url, min_size=10, max_size=CONNECTIONS, open=False, kwargs={"row_factory": dict_row})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with pool:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/jobs/{job_id}")
    def get(job_id: uuid.UUID) -> dict[str, Any]:
        with pool.connection() as connection:
            row: Any = connection.execute("SELECT * FROM jobs WHERE id = %s", [job_id]).fetchone()
        if row is None:
            raise HTTPException(404)
        return dict(row)

    return app
