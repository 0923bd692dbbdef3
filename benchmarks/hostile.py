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
from contextlib import suppress
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each attack, and of the time before")
    arguments = parser.parse_args()
    with fake.running() as hub:
        hub.create("org/tiny", files={"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b""})
        hub.create(
            "org/huge",
            files={"config.json": b" " * 300 * MEBIBYTE, "tokenizer.json": b"{}", "model.safetensors": b""},
        )
        os.environ |= {
            "SECATEUR_HF_ENDPOINT": hub.url,
            "SECATEUR_HF_TOKEN": fake.TOKEN,
            "SECATEUR_MAX_OPEN_JOBS": "1000000",
        }
        with Bench() as bench:
            print(asyncio.run(Siege(bench, hub, arguments.seconds).run()))


class Siege:
    """The two keys of a running API, and the attacks of one of them."""

    def __init__(self, bench: Bench, hub: fake.FakeHub, seconds: float) -> None:
        self.port, self.hub, self.seconds = bench.api_port, hub, seconds
        self.good = bench.headers
        with bench.sessions() as session:
            _, secret = auth.create(session, "hostile")
        self.bad = {"Authorization": f"Bearer {secret}"}
        self.job = {"model_id": "local:tiny", "target_ratio": 0.2, "method": "flap"}

    async def run(self) -> str:
        """Return a table of the measured key's response times, with a row for each attack."""
        texts = json.dumps(self.job | {"calibration": {"texts": ["word " * 200_000] * 60}}).encode()
        attacks: dict[str, Callable[[], Awaitable[Counter[int]]]] = {
            "many unknown fields": lambda: self._post(
                b"{" + b",".join(b'"f%d":1' % n for n in range(5_000_000)) + b"}"
            ),
            "900 unknown fields": lambda: self._post(b"{" + b",".join(b'"f%d":1' % n for n in range(900)) + b"}"),
            "deep nesting": lambda: self._post(b"[" * 60 * MEBIBYTE),
            "huge arrays": lambda: self._post(b"[" + b"0," * 30 * MEBIBYTE + b"0]"),
            "a huge number": lambda: self._post(b'{"seed":' + b"1" * MEBIBYTE + b"}"),
            "lone surrogates": lambda: self._post(b'{"method":"\\ud800"}'),
            "60 MB of texts, dry run": lambda: self._post(texts, "/v1/jobs?validate_only=true"),
            "a silent Hub": self._silent_hub,
            "a config.json of 300 MB": lambda: self._post(b'{"model_id":"org/huge"}', "/v1/models/inspect"),
            f"{STREAMS} streams": lambda: self._hold(STREAMS),
        }
        rows = []
        for name, attack in attacks.items():
            before, _ = await self._measure(asyncio.sleep(self.seconds, Counter()))
            during, statuses = await self._measure(attack())
            ratio = during[1] / before[1]
            answers = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
            figures = [f"{1000 * value:.1f}" for value in (*before, *during)]
            rows.append([name, *figures, f"{ratio:.1f}" + ("" if ratio <= AIM else " (!)"), answers])
            print("\t".join(rows[-1]), flush=True)
        head = [
            "attack",
            *(f"p{p} {when}, ms" for when in ("before", "during") for p in (50, 95, 99)),
            "p95 ratio",
            "answers to the attacker",
        ]
        return markdown(head, rows)

    async def _measure(self, attack: Awaitable[Counter[int]]) -> tuple[tuple[float, float, float], Counter[int]]:
        """Return the 50th, 95th and 99th percentile of the measured key's response times (s) during ``attack``."""
        times: list[float] = []
        reader = asyncio.create_task(self._use(times))
        try:
            statuses = await attack
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
        cuts = statistics.quantiles(times, n=100)
        return (cuts[49], cuts[94], cuts[98]), statuses

    async def _use(self, times: list[float]) -> None:
        async with Client(self.port, self.good, timeout=600) as client:
            made = json.loads((await client.request("POST", "/v1/jobs", self.job)).body)["id"]
            calls = [
                ("GET", f"/v1/jobs/{made}", None),
                ("GET", "/v1/jobs", None),
                ("GET", "/healthz", None),
                ("POST", "/v1/jobs", self.job),
            ]
            while True:
                for method, path, body in calls:
                    began = time.perf_counter()
                    answer = await client.request(method, path, body)
                    times.append(time.perf_counter() - began)
                    assert answer.status < 300, answer
                    await asyncio.sleep(PAUSE)

    async def _post(self, content: bytes, path: str = "/v1/jobs") -> Counter[int]:
        """Post ``content`` again and again over several connections; return the number of answers by status."""
        statuses: Counter[int] = Counter()
        until = time.monotonic() + self.seconds
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {self.bad['Authorization']}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"

        async def attacker() -> None:
            while time.monotonic() < until:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                    async with asyncio.timeout(60):
                        writer.write(head.encode() + content)
                        statuses[int((await reader.readuntil(b"\r\n")).split()[1])] += 1
                writer.close()

        await asyncio.gather(*(attacker() for _ in range(ATTACKERS)))
        return statuses

    async def _silent_hub(self) -> Counter[int]:
        self.hub.speaks.clear()
        wake = threading.Timer(self.seconds, self.hub.speaks.set)
        wake.start()
        return await self._post(json.dumps(self.job | {"model_id": "org/tiny"}).encode())

    async def _hold(self, count: int) -> Counter[int]:
        """Hold ``count`` event streams of one job open; return the number of answers by status."""
        statuses: Counter[int] = Counter()
        async with Client(self.port, self.bad) as client:
            job = json.loads((await client.request("POST", "/v1/jobs", self.job)).body)["id"]
        head = f"GET /v1/jobs/{job}/events/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: {self.bad['Authorization']}\r\n\r\n"
        writers: list[Any] = []

        async def hold() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writers.append(writer)
            writer.write(head.encode())
            statuses[int((await reader.readuntil(b"\r\n")).split()[1])] += 1

        await asyncio.gather(*(hold() for _ in range(count)))
        await asyncio.sleep(self.seconds)
        for writer in writers:
            writer.close()
        return statuses


if __name__ == "__main__":
    main()
