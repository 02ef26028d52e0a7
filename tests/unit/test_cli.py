"""The command line: options reach the settings, errors are one line, exit codes are the promised ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import pipeline
from pipeline.cli.app import make_app
from pipeline.cli.chat import Answer, spans, summary
from pipeline.cli.children import Restarts
from pipeline.cli.doctor import check_shared_memory
from pipeline.cli.options import api_url, base_url
from pipeline.cli.up import Counts, free_port, worker_places
from pipeline.config import ApiSettings, PoolSettings, TransferSettings
from pipeline.errors import ConfigError, RedisUnavailable, RequestFailed
from pipeline.exits import Exit, NoAnswer, PortTaken, exit_for
from pipeline.findings import Grade
from pipeline.processes import ending
from pipeline.protocol import Timeline
from pipeline.redis_server import RedisServerError
from pipeline.settings_file import known_keys

REPOSITORY = Path(__file__).parents[2]


def run(*words: str) -> Result:
    return CliRunner().invoke(make_app(), words)


def baton(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    command = [sys.executable, "-m", "pipeline.cli", *words]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return subprocess.run(command, cwd=REPOSITORY, env=clean | env, capture_output=True, text=True, timeout=60)


def test_config_get_prints_the_bare_value():
    assert run("config", "get", "api.port", "--set", "api.port=8123").stdout == "8123\n"
    assert run("config", "get", "transfer.verify").stdout == "false\n"
    assert run("config", "get", "api.host", "--json").stdout == '"127.0.0.1"\n'


def test_config_show_as_json_has_every_key_with_its_source(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[api]\nport = 8124")
    values = json.loads(run("config", "show", "--json", "--config", str(file)).stdout)
    assert list(values) == [key.path for key in known_keys(["baton-tiny"])]
    assert values["api.port"] == {"value": 8124, "source": str(file)}
    assert values["api.host"] == {"value": "127.0.0.1", "source": "default"}


def test_config_show_can_be_read_back_as_toml(tmp_path):
    shown = tmp_path / "shown.toml"
    shown.write_text(run("config", "show", "--set", 'pools.a.b-1.model=x"y', "--set", "api.port=1").stdout)
    again = json.loads(run("config", "show", "--json", "--config", str(shown)).stdout)
    assert again["pools.a.b-1.model"]["value"] == 'x"y'
    assert again["api.port"]["value"] == 1


def test_config_hides_passwords():
    for command in ("show", "env"):
        output = run("config", command, "--set", "redis.url=redis://me:secret@host:6379/0").stdout
        assert "redis://me:***@host:6379/0" in output
        url = "redis+sentinel://me:secret@one,two/mymaster?sentinel_password=hidden"
        output = run("config", command, "--set", f"redis.url={url}").stdout
        assert "redis+sentinel://me:***@one,two/mymaster?sentinel_password=***" in output
        assert "me:secret" not in output
        output = run("config", command, "--set", 'files.storage_options={"secret": "hidden"}').stdout
        assert "hidden" not in output
        assert "hidden" not in run("config", command, "--set", "batches.webhook_secret=whsec_hidden").stdout


def test_config_env_can_be_sourced_by_a_shell():
    script = run("config", "env", "--set", "pools.baton-tiny.model=it's here").stdout
    result = subprocess.run(
        ["/bin/sh", "-c", f'{script}\nprintf %s "$BATON_POOLS_BATON_TINY_MODEL"'], capture_output=True, text=True
    )
    assert result.stdout == "it's here"


def test_errors_are_one_line_with_their_exit_code():
    for words, env, code, message in [
        (["config", "get", "api.prot"], {}, 2, "baton: unknown key api.prot; did you mean api.port?\n"),
        (
            ["config", "show"],
            {"BATON_API_PROT": "1"},
            2,
            "baton: environment: unknown variable BATON_API_PROT; did you",
        ),
        (["chat", "hi", "--url", "http://127.0.0.1:9"], {}, 4, "baton: no answer from http://127.0.0.1:9"),
        (["config", "set-router", "--redis-url"], {}, 2, "Usage: baton"),
        (
            ["worker", "decode", "--pool", "baton-tin"],
            {},
            2,
            "baton: --pool: unknown pool baton-tin; did you mean baton-t",
        ),
        (
            ["worker", "decod"],
            {},
            2,
            "baton: decod is none of prefill, decode, embed, batch; did you mean decode? a queue of your own needs --app MODULE\n",
        ),
        (
            ["worker", "decode", "--app", "tests.example_stage", "--set", "redis.url=redis://127.0.0.1:9"],
            {},
            2,
            "baton worker: --app tests.example_stage: a decode worker runs Baton's own task; leave it out\n",
        ),
        (
            ["worker", "spell", "--app", "tests.example_stage", "--set", "redis.url=redis://127.0.0.1:9"],
            {},
            2,
            "baton worker: no task for queue 'spell'; the app has queues words\n",
        ),
        (
            ["worker", "words", "--app", "tests.unit.no_such_app", "--set", "redis.url=redis://127.0.0.1:9"],
            {},
            2,
            "baton worker: --app tests.unit.no_such_app: cannot import it: No module named 'tests.unit.no_such_app'\n",
        ),
        (["worker", "decode", "--set", "redis.run_dir=none"], {}, 4, "baton: no Redis: redis.url is empty and "),
        (["worker", "decode", "--set", "pools.b.engine=mock"], {}, 2, "baton: --pool: which one of baton-tiny, b?\n"),
        (
            ["worker", "decode", "--engine", "vlm"],
            {},
            2,
            "baton: --set: pools.baton-tiny.engine: expected one of torch, ",
        ),
        (["api", "--set", "api.prot=1"], {}, 2, "baton: --set: unknown key api.prot; did you mean api.port?\n"),
        (["config", "set-router"], {"BATON_REDIS_URL": "localhost:6379"}, 2, "baton: redis.url: expected redis://host"),
    ]:
        result = baton(*words, **env)
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith(message)


def test_up_refuses_a_taken_port_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = baton("up", "--port", str(port), "--set", f"redis.run_dir={tmp_path / 'run'}")
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr == (
        f"baton: port {port} on 127.0.0.1 cannot be used (Address already in use): stop the program that has it, "
        "or choose another with --set api.port=8001 or BATON_API_PORT=8001\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_host_that_is_none_is_named_as_such():
    with pytest.raises(PortTaken, match=r"port 0 on no\.host\.invalid cannot be used \((?!Unknown error).+\)"):
        free_port("no.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("a", "http://a:8000"),
    ],
)
def test_an_address_becomes_a_url(host, url):
    assert api_url(ApiSettings(host=host)) == url


def test_port_zero_is_a_free_one():
    port = free_port("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_version_is_told_as_most_programs_do():
    assert run("--version").stdout == f"baton {pipeline.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("up", "--port", "x"), "Invalid value for '--port': expected a whole number"),
        (("chat", "hi", "--temperature", "9"), "Invalid value for '--temperature': expected at most 2"),
        (("worker", "q", "-c", "0"), "Invalid value for '-c' / '--concurrency': expected at least 1"),
        (("status", "-t", "soon"), "Invalid value for '-t' / '--timeout': expected a number"),
        (("dead", "list", "--limit", "0"), "Invalid value for '--limit': expected at least 1"),
        (("inspect", "nothing"), "Invalid value for 'action': 'nothing' is not one of 'ping', 'active', 'reserved'"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(words, said):
    result = run(*words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Input should" not in result.stderr
    assert "Value error" not in result.stderr


def test_version_is_readable_by_programs():
    versions = json.loads(run("version", "--json").stdout)
    assert set(versions) == {"baton", "python", "redis", "fastapi", "transformers", "torch"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), Exit.USAGE),
        (RedisServerError("x"), Exit.UNAVAILABLE_HERE),
        (PortTaken("x"), Exit.UNAVAILABLE_HERE),
        (RedisUnavailable("x"), Exit.NO_ANSWER),
        (NoAnswer("x"), Exit.NO_ANSWER),
        (RequestFailed("x"), Exit.FAILED),
    ],
)
def test_exit_codes_stay_as_they_are(error, code):
    assert exit_for(error) is code
    assert [int(code) for code in Exit] == [0, 1, 2, 3, 4, 69, 70, 130]


def test_workers_are_numbered_and_named_by_their_pool_where_there_are_several():
    assert [place.label for place in worker_places({"a": PoolSettings()}, Counts(1, 2))] == [
        "prefill-0",
        "decode-0",
        "decode-1",
    ]
    assert [place.label for place in worker_places(dict.fromkeys("ab", PoolSettings()), Counts(0, 1))] == [
        "a.decode-0",
        "b.decode-0",
    ]
    embedding = {"a": PoolSettings(embeddings=True)}
    assert [place.label for place in worker_places(embedding, Counts(0, 1, 2))] == ["decode-0", "embed-0", "embed-1"]
    several = worker_places(dict.fromkeys("ab", PoolSettings()), Counts(0, 1, batch=2))
    assert [place.label for place in several] == ["a.decode-0", "b.decode-0", "batch-0", "batch-1"]


def test_restarts_wait_longer_each_time_and_forget_after_a_good_run():
    restarts = Restarts()
    assert [restarts.delay_s(1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restarts.delay_s(60) == 0.5
    assert restarts.delay_s(1) == 1


def test_endings_are_in_words():
    assert ending(-9) == "was ended by SIGKILL"
    assert ending(3) == "ended with code 3"


def answer(timeline: Timeline | None) -> Answer:
    return Answer("id", "text", "stop", 60, first_token_s=0.05, total_s=0.55, timeline=timeline)


def test_the_line_after_an_answer_comes_from_the_timeline():
    timeline = Timeline(
        admitted=1_000_000, claimed_prefill=1_001_500, handover=1_032_500, claimed_decode=1_033_000, fetched=1_037_000,
        first_token=1_038_000, ended=1_538_000,
    )  # fmt: skip
    assert summary(answer(timeline)) == "queue 2.0 ms · prefill 31 ms · transfer 4.0 ms · first token 38 ms · 118 tok/s"


def test_a_local_prefill_has_neither_hand_over_nor_transfer():
    timeline = Timeline(admitted=1_000_000, claimed_decode=1_004_000, first_token=1_030_000, ended=1_530_000)
    assert summary(answer(timeline)) == "queue 4.0 ms · first token 30 ms · 118 tok/s"


def test_without_a_timeline_only_what_was_seen_is_said():
    assert spans(answer(None)) == {"first_token_ms": 50.0, "tokens_per_s": pytest.approx(118)}


def test_doctor_compares_the_arena_with_the_room_for_it(tmp_path):
    roomy, tight = (TransferSettings(dir=str(tmp_path), arena_bytes=size) for size in (1, 2**60))
    assert [finding.grade for finding in check_shared_memory(roomy)] == [Grade.OK]
    assert [finding.grade for finding in check_shared_memory(tight)] == [Grade.ERROR]


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:8001", "http://127.0.0.1:8001/", "http://127.0.0.1:8001/v1", "127.0.0.1:8001/v1/"]
)
def test_an_address_is_understood_however_it_is_written(text: str) -> None:
    assert base_url(text) == "http://127.0.0.1:8001"
