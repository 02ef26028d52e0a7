"""An S3 server of a test's own: moto's, over HTTP, with an empty bucket."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx

from tests.system import free_port

START_S = 60.0
BUCKET = "baton-files"


class ObjectStore:
    """`url` and `options` are what `[files]` is told."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.url = f"s3://{BUCKET}/some/prefix"
        self._options = {"key": "k", "secret": "s", "endpoint_url": self.endpoint}

    @property
    def options(self) -> str:
        return json.dumps(self._options)

    def fs(self) -> Any:
        return fsspec.filesystem("s3", **self._options, use_listings_cache=False)

    def objects(self) -> list[str]:
        return list(self.fs().find(BUCKET))

    def uploads(self) -> list[Any]:
        """Those in parts that nobody has ended."""
        return list(self.fs().list_multipart_uploads(BUCKET))


@contextlib.contextmanager
def object_store(log_dir: Path) -> Iterator[ObjectStore]:
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (log_dir / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        store, give_up_s = ObjectStore(port), time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{store.endpoint}/moto-api/data.json").raise_for_status()
                break
            assert process.poll() is None and time.monotonic() < give_up_s, (log_dir / "moto.log").read_text()
            time.sleep(0.1)
        store.fs().mkdir(BUCKET)
        yield store
    finally:
        process.kill()
        process.wait()
