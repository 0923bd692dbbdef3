"""``make bench-hostile``: what one API key notices while another attacks the service.

The benchmark starts its own Postgres, Valkey, a Hub that accepts requests and answers none, and one API process. One key
reads and submits all the time; the other runs one attack after the other. It prints the first key's response times
before and during each attack, and their ratio: the aim is a 95th percentile of at most three times that of before.
"""

import argparse
import asyncio
import json
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

from app.auth import service as auth
from benchmarks.load import Bench
from benchmarks.load_client import Client
from benchmarks.table import markdown
from tests import hub as fake

ATTACKERS = 16
STREAMS = 1000
PAUSE = 0.02
"""Seconds between an answer and the next request of the key that is measured."""
AIM = 3.0
MEBIBYTE = 2**20
SILENT = "a silent Hub"
JOB: dict[str, Any] = {"model_id": "local:tiny", "target_ratio": 0.2, "method": "flap"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each attack, and of the time before")
    arguments = parser.parse_args()
    files = {"config.json": b" " * 300 * MEBIBYTE, "tokenizer.json": b"{}", "model.safetensors": b""}
    with fake.running() as hub, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        hub.create("org/tiny", files=files | {"config.json": b"{}"})
        hub.create("org/huge", files=files)
        os.environ |= {
            "SECATEUR_HF_ENDPOINT": hub.url,
            "SECATEUR_HF_TOKEN": fake.TOKEN,
            "SECATEUR_MAX_OPEN_JOBS": "1000000",
        }
        with Bench() as bench:
            print(asyncio.run(besiege(bench, hub, pool, arguments.seconds)))


async def besiege(bench: Bench, hub: fake.FakeHub, pool: ProcessPoolExecutor, seconds: float) -> str:
    """Return a table of one key's response times, with a row for each attack of another key."""
    with bench.sessions() as session:
        _, secret = auth.create(session, "hostile")
    rows = []
    for name in ATTACKS:
        before, _ = await measure(bench, asyncio.sleep(seconds, Counter()))
        if name == SILENT:
            hub.speaks.clear()
        attack = asyncio.get_running_loop().run_in_executor(pool, run_attack, name, bench.api_port, secret, seconds)
        if name == SILENT:
            threading.Timer(seconds, hub.speaks.set).start()
        during, statuses = await measure(bench, attack)
        ratio = during[1] / before[1]
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        figures = [f"{1000 * value:.1f}" for value in (*before, *during)]
        rows.append([name, *figures, f"{ratio:.1f}" + ("" if ratio <= AIM else " (!)"), answers])
        print("\t".join(rows[-1]), flush=True)
    percentiles = [f"p{part} {when}, ms" for when in ("before", "during") for part in (50, 95, 99)]
    return markdown(["attack", *percentiles, "p95 ratio", "answers to the attacker"], rows)


async def measure(bench: Bench, attack: Awaitable[Counter[int]]) -> tuple[tuple[float, float, float], Counter[int]]:
    """Return the 50th, 95th and 99th percentile of the measured key's response times (s) during ``attack``."""
    times: list[float] = []
    user = asyncio.create_task(use(bench, times))
    try:
        statuses = await attack
    finally:
        user.cancel()
        with suppress(asyncio.CancelledError):
            await user
    cuts = statistics.quantiles(times, n=100)
    return (cuts[49], cuts[94], cuts[98]), statuses


async def use(bench: Bench, times: list[float]) -> None:
    """Read and submit as the measured key does, and add the response times (s) to ``times``."""
    async with Client(bench.api_port, bench.headers, timeout=600) as client:
        made = json.loads((await client.request("POST", "/v1/jobs", JOB)).body)["id"]
        while True:
            for method, path, body in (
                ("GET", f"/v1/jobs/{made}", None),
                ("GET", "/v1/jobs", None),
                ("GET", "/healthz", None),
                ("POST", "/v1/jobs", JOB),
            ):
                began = time.perf_counter()
                answer = await client.request(method, path, body)
                times.append(time.perf_counter() - began)
                assert answer.status < 300, answer
                await asyncio.sleep(PAUSE)


def run_attack(name: str, port: int, secret: str, seconds: float) -> Counter[int]:
    """Run an attack of :data:`ATTACKS` in a process of its own; return the number of answers by status."""
    path, content = ATTACKS[name]()
    return asyncio.run(post(path, content, port, secret, seconds) if content else hold(port, secret, seconds))


def _job(**fields: Any) -> bytes:
    return json.dumps(JOB | fields).encode()


ATTACKS: dict[str, Callable[[], tuple[str, bytes]]] = {
    "many unknown fields": lambda: ("/v1/jobs", b"{" + b",".join(b'"f%d":1' % n for n in range(5_000_000)) + b"}"),
    "190 unknown fields": lambda: ("/v1/jobs", b"{" + b",".join(b'"f%d":1' % n for n in range(190)) + b"}"),
    "deep nesting": lambda: ("/v1/jobs", b"[" * 60 * MEBIBYTE),
    "huge arrays": lambda: ("/v1/jobs", b"[" + b"0," * 30 * MEBIBYTE + b"0]"),
    "a huge number": lambda: ("/v1/jobs", b'{"seed":' + b"1" * MEBIBYTE + b"}"),
    "lone surrogates": lambda: ("/v1/jobs", b'{"method":"\\ud800"}'),
    "60 MB of texts": lambda: ("/v1/jobs?validate_only=true", _job(calibration={"texts": ["word " * 200_000] * 60})),
    SILENT: lambda: ("/v1/jobs", _job(model_id="org/tiny")),
    "a config.json of 300 MB": lambda: ("/v1/models/inspect", b'{"model_id":"org/huge"}'),
    f"{STREAMS} streams": lambda: ("/v1/jobs", b""),
}
"""The path and the body of each attack; an attack without a body holds event streams open."""


async def post(path: str, content: bytes, port: int, secret: str, seconds: float) -> Counter[int]:
    """Post ``content`` again and again over several connections; return the number of answers by status."""
    statuses: Counter[int] = Counter()
    until = time.monotonic() + seconds
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"

    async def attacker() -> None:
        while time.monotonic() < until:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(60):
                    writer.write(head.encode())
                    writer.write(content)
                    statuses[int((await reader.readuntil(b"\r\n")).split()[1])] += 1
            writer.close()

    await asyncio.gather(*(attacker() for _ in range(ATTACKERS)))
    return statuses


async def hold(port: int, secret: str, seconds: float) -> Counter[int]:
    """Hold :data:`STREAMS` event streams of one job open; return the number of answers by status."""
    statuses: Counter[int] = Counter()
    headers = {"Authorization": f"Bearer {secret}"}
    async with Client(port, headers) as client:
        job = json.loads((await client.request("POST", "/v1/jobs", JOB)).body)["id"]
    head = f"GET /v1/jobs/{job}/events/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\n\r\n"
    writers: list[asyncio.StreamWriter] = []

    async def stream() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        writer.write(head.encode())
        statuses[int((await reader.readuntil(b"\r\n")).split()[1])] += 1

    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    await asyncio.sleep(seconds)
    for writer in writers:
        writer.close()
    return statuses


if __name__ == "__main__":
    main()
