"""Where the programs of `programs/` run: with each version of OpenAI's package that people have, beside other clients, and in Node.js."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
CLIENTS = Path(__file__).parents[2] / ".venv-clients"


@dataclasses.dataclass(frozen=True)
class Environment:
    """An interpreter, what it must have before it can run anything, and a folder in which it looks for packages first."""

    interpreter: Path
    needs: Path
    first: Path | None = None

    @property
    def is_here(self) -> bool:
        return self.interpreter.exists() and self.needs.exists()

    def variables(self, url: str) -> dict[str, str]:
        """What its programs are started with: the server's address as the packages look for it."""
        own = {
            "PATH": f"{self.interpreter.parent}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "none",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask the internet for prices when it is imported
        }
        return own | ({"PYTHONPATH": str(self.first)} if self.first else {})


PYTHON = CLIENTS / "bin/python"
ENVIRONMENTS = {
    "tools": Environment(
        Path(sys.executable), Path(sys.executable)
    ),  # what runs the tests has OpenAI's and Anthropic's newest packages
    "clients": Environment(PYTHON, PYTHON),
    "openai-1": Environment(PYTHON, CLIENTS / "openai-1", CLIENTS / "openai-1"),
    "openai-2": Environment(PYTHON, CLIENTS / "openai-2", CLIENTS / "openai-2"),
    "node": Environment(CLIENTS / "bin/node", PROGRAMS / "js/node_modules"),
}
OPENAI = ("openai-1", "openai-2", "tools")

# program -> where it runs
RUNS: dict[str, tuple[str, ...]] = {
    "openai_chat.py": OPENAI,
    "openai_async.py": OPENAI,
    "openai_tools.py": OPENAI,
    "openai_parse.py": OPENAI,
    "openai_responses.py": OPENAI,
    "openai_texts.py": OPENAI,
    "openai_embeddings.py": OPENAI,
    "openai_files.py": OPENAI,
    "anthropic_messages.py": ("tools",),
    "langchain_chat.py": ("clients",),
    "litellm_calls.py": ("clients",),
    "instructor_models.py": ("clients",),
    "llm_cli.py": ("clients",),
    "js/openai_files.mjs": ("node",),
    "js/openai_chat.mjs": ("node",),
    "js/ai_sdk.mjs": ("node",),
    "js/ai_sdk_responses.mjs": ("node",),
}
