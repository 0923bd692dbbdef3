"""A real server of the S3 protocol on the loopback interface: moto's, in a process of its own, whose objects are in memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from secateur.processes import spawn
from tests.patience import wait_for
from workers.embedded import free_port

BUCKET = "models"
ACCESS = {"access_key_id": "an-access-key", "secret_access_key": "a-secret-access-key", "region": "us-east-1"}


def start(port: int) -> subprocess.Popen[bytes]:
    """Start the server without a bucket."""
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return spawn(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_bucket(endpoint: str) -> None:
    """Make the bucket as soon as the server answers."""

    def made() -> bool:
        try:
            return httpx2.put(f"{endpoint}/{BUCKET}", trust_env=False).is_success
        except httpx2.TransportError:
            return False

    wait_for(made)


def settings(endpoint: str, prefix: str) -> dict[str, str]:
    """Return the environment variables by which the service uses the folder ``prefix`` of the bucket."""
    return {
        "SECATEUR_STORAGE_URL": f"s3://{BUCKET}/{prefix}",
        "SECATEUR_STORAGE_OPTIONS": json.dumps({"endpoint": endpoint, **ACCESS}),
    }


@contextmanager
def running() -> Iterator[str]:
    """Yield the address of a running server with the bucket :data:`BUCKET`."""
    port = free_port()
    process = start(port)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        make_bucket(endpoint)
        yield endpoint
    finally:
        process.kill()
        process.wait()
