"""`baton batch`: a file of requests goes to a running API, and its answers come back. What is to be read by programs is on stdout, all
else on stderr."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from rich.console import Console

from pipeline.batches.creating import INPUT, batch_body, window_s
from pipeline.batches.record import COMPLETED, ENDED
from pipeline.cli.api_calls import Api
from pipeline.cli.batch_progress import Counts, progress
from pipeline.errors import ConfigError, InvalidRequest, RequestFailed
from pipeline.exits import Exit, NoAnswer
from pipeline.protocol import UNREADABLE
from pipeline.wording import counted

LOOKS_S = (0.2, 0.5, 1.0, 2.0)  # between two looks at a batch; the last one from then on
PATIENCE_S = 120.0  # with an API that does not answer while a batch is waited for
FIRST_BYTES = 1 << 20  # of a file, in which its first line must end


class Wrong(msgspec.Struct):
    """What is wrong with the input, or a line of it."""

    code: str
    message: str
    line: int | None = None


class Wrongs(msgspec.Struct):
    """The first of them."""

    data: list[Wrong] = []


class Batch(msgspec.Struct):
    """What is read of a batch."""

    id: str
    status: str
    endpoint: str
    completion_window: str
    created_at: int
    request_counts: Counts = Counts()
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: Wrongs = msgspec.field(default_factory=Wrongs)


class _Page(msgspec.Struct):
    data: list[Batch]


class _WithId(msgspec.Struct):
    id: str


class _WithUrl(msgspec.Struct):
    url: str


def pairs(words: Sequence[str]) -> dict[str, str]:
    """`key=value` words. Raises ConfigError."""
    for word in words:
        if not word.partition("=")[1]:
            raise ConfigError(f"--metadata {word}: expected KEY=VALUE")
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def endpoint_of(file: Path) -> str:
    """The url of the first line of a file. Raises ConfigError where there is none."""
    with file.open("rb") as lines:
        first = next((line for line in iter(lambda: lines.readline(FIRST_BYTES), b"") if line.strip()), b"")
    if not first.strip():
        raise ConfigError(f"{file}: there is no line in it: a batch needs at least one request")
    try:
        return msgspec.json.decode(first.removeprefix(b"\xef\xbb\xbf"), type=_WithUrl).url
    except UNREADABLE as error:
        raise ConfigError(
            f"{file}: its first line says no url ({error}): a line is "
            '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}; --endpoint says which one is meant'
        ) from error


def check_body(body: Mapping[str, Any]) -> None:
    """What the API would refuse is told before a file is sent. Raises ConfigError."""
    try:
        window_s(body["completion_window"])
        batch_body(msgspec.json.encode({**body, "input_file_id": ""}))
    except InvalidRequest as error:
        raise ConfigError(str(error)) from error


class Batches:
    """The batches of a running API. Methods raise RequestFailed, NoAnswer."""

    def __init__(self, url: str, *, as_json: bool) -> None:
        self._api = Api(url)
        self._url = url
        self._as_json = as_json
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc: object) -> None:
        self._api.__exit__()

    def submit(self, file: Path, *, endpoint: str | None, window: str, metadata: dict[str, str]) -> Batch:
        """Send a file and make a batch of it. Raises ConfigError."""
        endpoint = endpoint or endpoint_of(file)
        body = {"endpoint": endpoint, "completion_window": window, "metadata": metadata or None}
        check_body(body)
        file_id = msgspec.json.decode(self._api.upload(file, INPUT), type=_WithId).id
        made = _batch(self._created(body | {"input_file_id": file_id}, file_id))
        self._say(
            f"{made.id}: made of {file} ({file.stat().st_size:,} bytes, {file_id}), for {endpoint}, within {window}"
        )
        return made

    def say_made(self, made: Batch) -> None:
        """Its id for scripts, and how to go on."""
        if self._as_json:
            self._print(self._api.get(f"/v1/batches/{made.id}"))
            return
        print(made.id)
        self._say(f"how far it is: {self._command('status', made.id, '--wait')}")

    def show_all(self, limit: int, after: str | None) -> None:
        """One line a batch."""
        answer = self._api.get("/v1/batches", limit=limit, **({"after": after} if after else {}))
        if self._as_json:
            print(json.dumps(json.loads(answer)["data"]))
            return
        batches = msgspec.json.decode(answer, type=_Page).data
        print("\n".join(map(_line, batches)) or "- empty -")

    def show(self, batch_id: str) -> None:
        """A batch as it stands."""
        self._show(self._api.get(f"/v1/batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """End it."""
        self._show(self._api.post(f"/v1/batches/{batch_id}/cancel"))

    def wait(self, batch_id: str, output: Path | None) -> Exit:
        """Show how far it is until it has ended; then say what became of it. Ctrl-C leaves it running."""
        try:
            batch, answer = self._watched(batch_id)
        except (KeyboardInterrupt, NoAnswer) as error:
            again, end = self._command("status", batch_id, "--wait"), self._command("cancel", batch_id)
            self._say(f"{batch_id} is left running; wait for it again: {again}; end it: {end}")
            if isinstance(error, NoAnswer):
                raise
            return Exit.INTERRUPTED
        if self._as_json:
            self._print(answer)
        else:
            self._say_ended(batch)
        if output is not None and batch.output_file_id:
            self._write(batch.output_file_id, output)
        elif batch.output_file_id:
            self._say(f"answers: {self._command('results', batch_id, '-o', 'FILE')}")
        if batch.error_file_id:
            self._say(f"what failed: {self._command('results', batch_id, '--errors')}")
        return exit_of(batch)

    def results(self, batch_id: str, output: Path | None, *, wants_errors: bool) -> Exit:
        """Write one of the files of a batch that has ended."""
        batch = _batch(self._api.get(f"/v1/batches/{batch_id}"))
        if batch.status not in ENDED:
            raise RequestFailed(
                f"{batch_id} is {batch.status}: wait for it with {self._command('status', batch_id, '--wait')}"
            )
        file_id = batch.error_file_id if wants_errors else batch.output_file_id
        failed = batch.request_counts.total - batch.request_counts.completed
        if failed and batch.error_file_id and not wants_errors:
            self._say(
                f"{counted(failed, 'request')} without an answer: {self._command('results', batch_id, '--errors')}"
            )
        if not file_id:
            self._say(f"{batch_id} has {batch.status}: no request {'failed' if wants_errors else 'succeeded'}")
            self._say_errors(batch)
            return Exit.FAILED
        if output is not None:
            self._write(file_id, output)
        else:
            self._api.download(file_id, sys.stdout.buffer)
            sys.stdout.flush()
        return Exit.OK

    # -- pieces -----------------------------------------------------------------------------------------------------------

    def _created(self, body: Mapping[str, Any], file_id: str) -> bytes:
        """A batch of a file; one that is refused leaves no file. Where nobody answers there may be one, and it needs the file."""
        try:
            return self._api.post("/v1/batches", body)
        except RequestFailed:
            try:
                self._api.delete(f"/v1/files/{file_id}")
            except (RequestFailed, NoAnswer) as error:
                self._say(f"{file_id}: it was sent, and is kept until it expires: {error}")
            raise

    def _watched(self, batch_id: str) -> tuple[Batch, bytes]:
        """A batch at its end, and what the API says of it."""
        with progress(self._console, batch_id) as tell:
            for answer in self._looks(batch_id):
                batch = _batch(answer)
                tell(batch.status, batch.request_counts)
        return batch, answer

    def _looks(self, batch_id: str) -> Iterator[bytes]:
        """A batch as it stands, again and again until it has ended. An API that is away for a while is waited for."""
        number, heard_s = 0, time.monotonic()
        while True:
            try:
                answer = self._api.get(f"/v1/batches/{batch_id}")
            except NoAnswer as error:
                if number == 0 or time.monotonic() > heard_s + PATIENCE_S:
                    raise
                self._say(f"{error}; asking again")
                time.sleep(LOOKS_S[-1])
                continue
            heard_s = time.monotonic()
            yield answer
            if _batch(answer).status in ENDED:
                return
            time.sleep(LOOKS_S[min(number, len(LOOKS_S) - 1)])
            number += 1

    def _write(self, file_id: str, output: Path) -> None:
        with whole_file(output) as out:
            self._api.download(file_id, out)
        self._say(f"written: {output} ({output.stat().st_size:,} bytes)")

    def _show(self, answer: bytes) -> None:
        if self._as_json:
            self._print(answer)
            return
        batch = _batch(answer)
        print(_line(batch))
        self._say_errors(batch)

    def _say_ended(self, batch: Batch) -> None:
        print(ended_line(batch))
        self._say_errors(batch)

    def _say_errors(self, batch: Batch) -> None:
        for line in wrong_lines(batch):
            self._say(line)

    def _command(self, *words: str) -> str:
        """A command that reaches the same API."""
        return shlex.join(["baton", "batch", *words, "--url", self._url])

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _print(self, answer: bytes) -> None:
        print(answer.decode())


def ended_line(batch: Batch) -> str:
    """What became of it."""
    counts = batch.request_counts
    return f"{batch.id} {batch.status}: {counts.completed} of {counted(counts.total, 'request')} succeeded, {counts.failed} failed"


def wrong_lines(batch: Batch) -> list[str]:
    """What is wrong with its input."""
    wheres = [f"line {wrong.line}" if wrong.line else "the file" for wrong in batch.errors.data]
    return [f"{where}: {wrong.message} ({wrong.code})" for where, wrong in zip(wheres, batch.errors.data, strict=True)]


def exit_of(batch: Batch) -> Exit:
    """1 where not all requests succeeded."""
    return Exit.OK if batch.status == COMPLETED and not batch.request_counts.failed else Exit.FAILED


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is there when all of it was written, and else not. Raises RequestFailed."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(3)}.part")
    try:
        with part.open("wb") as out:
            yield out
        part.replace(path)
    except OSError as error:
        raise RequestFailed(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _batch(answer: bytes) -> Batch:
    try:
        return msgspec.json.decode(answer, type=Batch)
    except UNREADABLE as error:
        raise NoAnswer(f"the API answered something else than a batch: {error}") from error


def _line(batch: Batch) -> str:
    counts = batch.request_counts
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.created_at))
    done = f"{counts.completed + counts.failed}/{counts.total}"
    return f"{batch.id} {batch.status:<11} {done:>11} {counts.failed:>5} failed  {batch.completion_window:>4} {made} {batch.endpoint}"
