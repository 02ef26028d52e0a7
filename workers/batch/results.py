"""Results of lines, as they are kept: lines of JSON in parts, each written whole before its lines count as done."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import msgspec

from pipeline.batches.lines import Line
from pipeline.batches.record import LineError
from pipeline.batches.records import BatchRecords, Hold, Part
from pipeline.files.scratch import Scratch
from workers.batch.sending import Result
from workers.batch.tidy import Leftovers

PART_BYTES = 8 * 2**20  # a part of long answers is kept before it has all its lines

_encode = msgspec.json.Encoder().encode


class _Status(msgspec.Struct):
    status_code: int = 0


class _Kept(msgspec.Struct):
    response: _Status | None = None


_kept = msgspec.json.Decoder(_Kept).decode


def result_line(batch_id: str, result: Result) -> bytes:
    """A line of the output, or of the errors."""
    response = {
        "status_code": result.status,
        "request_id": result.sent[0].id if result.sent else "",
        "body": msgspec.Raw(result.body),
    }
    return _line(batch_id, result.line, response, None)


def missing_line(batch_id: str, line: Line, error: LineError) -> bytes:
    """A line of the errors, for a line of the input that did not run."""
    return _line(batch_id, line, None, {"code": error.code, "message": error.message})


def is_success(line: bytes) -> bool:
    """Whether a kept line belongs to the output."""
    response = _kept(line).response
    return response is not None and 200 <= response.status_code < 300


def _line(batch_id: str, line: Line, response: object, error: object) -> bytes:
    made = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{line.number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return _encode(made) + b"\n"


class Parts:
    """Collects results until there is a part of them, keeps it, and only then drops what Redis has of them."""

    def __init__(
        self, scratch: Scratch, records: BatchRecords, hold: Hold, leftovers: Leftovers, *, most_lines: int, longest_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._scratch = scratch
        self._records = records
        self._hold = hold
        self._leftovers = leftovers
        self._most_lines = most_lines
        self._longest_s = longest_s
        self._clock = clock
        self._results: list[Result] = []
        self._lines: list[bytes] = []
        self._bytes = 0
        self._since_s = 0.0
        self._written: Part | None = None  # of the first results: its bytes are there, and Redis may know it already

    def add(self, result: Result) -> None:
        """One more."""
        if not self._lines:
            self._since_s = self._clock()
        line = result_line(self._hold.batch_id, result)
        self._results.append(result)
        self._lines.append(line)
        self._bytes += len(line)

    @property
    def is_due(self) -> bool:
        """Whether there are enough for a part, or what there is has waited for long."""
        if not self._lines:
            return False
        is_full = len(self._lines) >= self._most_lines or self._bytes >= PART_BYTES
        return is_full or self._clock() - self._since_s > self._longest_s

    async def keep(self) -> None:
        """Keep what there is. Raises Fenced, StorageUnavailable, RedisUnavailable; called again, it goes on where it was."""
        while self._lines:
            part = self._written = self._written or await self._write()
            await self._records.put_part(self._hold, part)
            self._written = None
            del self._results[: len(part.lines)], self._lines[: len(part.lines)]
            self._bytes -= part.nbytes
            await self._leftovers.erase_spent(self._hold.batch_id)

    async def _write(self) -> Part:
        results, data = self._results[: self._most_lines], b"".join(self._lines[: self._most_lines])
        place = await self._scratch.keep(f"{self._hold.batch_id}.{secrets.token_hex(8)}", data)
        return _part(place, len(data), results)


def _part(place: str, nbytes: int, results: list[Result]) -> Part:
    completed = sum(result.is_success for result in results)
    return Part(
        place,
        nbytes,
        [result.line.number for result in results],
        completed,
        len(results) - completed,
        sum(result.prompt_tokens for result in results),
        sum(result.cached_tokens for result in results),
        sum(result.completion_tokens for result in results),
        [sent.id for result in results for sent in result.sent],
    )
