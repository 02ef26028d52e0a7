"""Files: sent from a path, from bytes and from what is open, listed page by page, read whole and as a stream, deleted."""

import tempfile
from pathlib import Path

import openai

client = openai.OpenAI(max_retries=0)
data = b'{"custom_id": "1"}\n' * 200_000

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "batch.jsonl"
    path.write_bytes(data)
    with path.open("rb") as file:
        made = [
            client.files.create(file=path, purpose="batch"),
            client.files.create(file=file, purpose="batch"),
            client.files.create(file=("named.jsonl", data), purpose="batch"),
        ]
assert [one.filename for one in made] == ["batch.jsonl", "batch.jsonl", "named.jsonl"]
for one in made:
    assert (one.bytes, one.status, one.object, one.purpose) == (len(data), "processed", "file", "batch")
    assert client.files.retrieve(one.id).id == client.files.wait_for_processing(one.id).id == one.id
    assert client.files.content(one.id).read() == data
    with client.files.with_streaming_response.content(one.id) as content:
        assert b"".join(content.iter_bytes()) == data
ids = [one.id for one in made]
assert [one.id for one in client.files.list(purpose="batch", limit=1, order="asc", after=ids[0])] == ids[1:]
for one_id in ids:
    assert client.files.delete(one_id).deleted
try:
    client.files.retrieve(ids[0])
    raise AssertionError("it is deleted")
except openai.NotFoundError as error:
    assert error.code == "file_not_found"
