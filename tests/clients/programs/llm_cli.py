"""The command `llm`, with this server as one of its models: prompts, conversations, schemas, its log."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    json.dumps(
        [
            {
                "model_id": "tiny",
                "model_name": "baton-tiny",
                "api_base": os.environ["OPENAI_BASE_URL"],
                "supports_schema": True,
                "supports_tools": True,
            }
        ]
    )
)


def llm(*arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    return done.stdout.strip()


options = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "200"]
streamed = llm("Tell me a story about a fox.", *options)
assert streamed
assert llm("Tell me a story about a fox.", *options, "--no-stream") == streamed
assert llm("And then?", "-c", *options)
schema = {
    "type": "object",
    "properties": {"red": {"type": "boolean"}},
    "required": ["red"],
    "additionalProperties": False,
}
assert json.loads(llm("A fox", "--schema", json.dumps(schema), *options)) in ({"red": True}, {"red": False})
logged = json.loads(llm("logs", "--json", "-n", "0"))
assert [one["prompt"] for one in logged][-1] == "A fox" and logged[0]["response"].strip() == streamed
