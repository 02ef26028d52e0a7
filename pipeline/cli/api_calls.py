"""Calls of a running API, and what it says when it refuses: in the words and with the exit codes of the command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from pipeline.cli.options import api_headers
from pipeline.errors import BatonError, RequestFailed
from pipeline.exits import NoAnswer
from pipeline.settings_file import ENV_API_KEY

BLOCK_BYTES = 1 << 20


class Api:
    """A running API. Methods raise RequestFailed where it refuses, and NoAnswer where it does not answer as it should."""

    def __init__(self, url: str) -> None:
        limits = httpx.Timeout(120.0, connect=5.0)
        self._http = httpx.Client(base_url=url, headers=api_headers(), timeout=limits, trust_env=False)

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int) -> bytes:
        """What stands there."""
        return self._answer("GET", path, params=params)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """What comes of a body."""
        return self._answer("POST", path, json=body)

    def delete(self, path: str) -> bytes:
        """Remove what stands there."""
        return self._answer("DELETE", path)

    def upload(self, file: Path, purpose: str) -> bytes:
        """A file is sent, a block at a time."""
        with file.open("rb") as data:
            return self._answer("POST", "/v1/files", data={"purpose": purpose}, files={"file": (file.name, data)})

    def download(self, file_id: str, out: BinaryIO) -> None:
        """The bytes of a file, a block at a time."""
        with self._reaching(), self._http.stream("GET", f"/v1/files/{file_id}/content") as response:
            if response.status_code != httpx.codes.OK:
                raise refusal(self._http.headers, response.status_code, response.read())
            for block in response.iter_bytes(BLOCK_BYTES):
                out.write(block)

    def _answer(self, method: str, path: str, **sent: Any) -> bytes:
        with self._reaching():
            response = self._http.request(method, path, **sent)
        if response.status_code != httpx.codes.OK:
            raise refusal(self._http.headers, response.status_code, response.content)
        return response.content

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


def refusal(shown: Mapping[str, str], status: int, body: bytes) -> BatonError:
    """What an answer means that is none of what was asked for; `shown`: the headers of the request."""
    said = _message(body)
    if status == httpx.codes.UNAUTHORIZED:
        return RequestFailed(key_problem(shown, said))
    if httpx.codes.is_client_error(status):
        return RequestFailed(f"the API refuses this: {said}")
    return NoAnswer(f"the API answered {status}: {said}")


def unreachable(url: object, error: httpx.TransportError) -> NoAnswer:
    """Nobody answered, or not to the end."""
    return NoAnswer(f"no answer from {url}: {error or type(error).__name__}; is `baton up` running?")


def key_problem(shown: Mapping[str, str], said: str) -> str:
    """Why the API lets nobody in who shows these headers, and what to do."""
    then = f"set the variable {ENV_API_KEY} to a key of that API (`baton keys create NAME` makes one)"
    held = "is not valid there" if "authorization" in shown else "holds none"
    return f"the API needs a key, and {ENV_API_KEY} {held}: {then}; the API says: {said}"


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
