"""The bare route that polling is compared with: FastAPI and psycopg read one row by its id.

It is served by ``uvicorn benchmarks.bare:create_app --factory``.
"""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

CONNECTIONS = 40
"""The largest number of connections of the service's engine, and the number of threads for sync routes."""


def create_app() -> FastAPI:
    """Return the application. It uses the database that the environment names."""
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
