"""The private Redis server: what `baton up` starts when no other is named. Real servers, real signals."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.processes import bound_command
from pipeline.redis_server import RedisServer, RedisServerError, ServerProgram, all_servers, ask_redis, find_server

WANTED_VERSIONS = ("6.2", "7.0", "8.2")
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("version", WANTED_VERSIONS)
def test_version_is_covered_by_the_suite(version):
    found = [program.version_text for program in all_servers()]
    if not any(text.startswith(f"{version}.") for text in found):
        pytest.skip(f"no Redis {version} here; found {', '.join(found) or 'none'}")


def test_an_activated_environment_finds_the_same_server(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    found = find_server()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
    assert find_server() == found


def test_data_that_an_older_server_would_not_see_is_not_left_behind(short_dir):
    (short_dir / "redis" / "appendonlydir").mkdir(parents=True)
    older = ServerProgram(Path("redis-server"), "redis", (6, 2, 14), "PATH")
    with pytest.raises(RedisServerError, match=r"was written by Redis 7 or newer, and redis 6\.2\.14 .* without it"):
        RedisServer.start(short_dir, program=older)


def test_the_server_keeps_a_log_of_all_writes_and_evicts_nothing(redis_server):
    assert setting(redis_server, "appendonly") == "yes"
    assert setting(redis_server, "appendfsync") == "everysec"
    assert setting(redis_server, "maxmemory-policy") == "noeviction"
    assert setting(redis_server, "save") == ""
    assert setting(redis_server, "port") == "0"


def test_only_the_owner_can_reach_it(redis_server):
    assert mode(redis_server.socket_path.parent) == 0o700
    assert mode(redis_server.socket_path) == 0o700


def test_a_folder_that_is_open_to_others_is_closed(short_dir):
    short_dir.chmod(0o755)
    with RedisServer.start(short_dir):
        assert mode(short_dir) == 0o700


def test_appendfsync_is_what_the_settings_say(short_dir):
    with RedisServer.start(short_dir, appendfsync="always") as server:
        server.wait_ready()
        assert setting(server, "appendfsync") == "always"


def test_data_is_there_again_after_a_stop_and_after_a_kill(short_dir):
    with RedisServer.start(short_dir, appendfsync="always") as server:
        server.wait_ready()
        server.command("SET", "a", "1")
    with RedisServer.start(short_dir, appendfsync="always") as server:
        server.wait_ready()
        assert server.command("EXISTS", "a") == b":1"
        server.command("SET", "b", "2")
        server.process.kill()
        server.process.wait()
    with RedisServer.start(short_dir) as server:
        server.wait_ready()
        assert server.command("EXISTS", "a", "b") == b":2"


def test_stop_leaves_no_process_and_no_socket_and_may_be_called_twice(short_dir):
    server = RedisServer.start(short_dir)
    server.wait_ready()
    server.stop()
    server.stop()
    assert server.process.poll() == 0
    assert sorted(path.name for path in short_dir.iterdir()) == ["lock", "redis", "redis.log"]


def test_a_frozen_server_is_killed_at_the_limit(short_dir):
    server = RedisServer.start(short_dir)
    server.wait_ready()
    server.process.send_signal(signal.SIGSTOP)
    server.stop(limit_s=0.1)
    assert server.process.poll() == -signal.SIGKILL
    assert not server.socket_path.exists()


def test_a_second_one_in_the_folder_is_one_clear_line(short_dir):
    with RedisServer.start(short_dir), pytest.raises(RedisServerError) as error:
        RedisServer.start(short_dir)
    assert str(error.value).startswith(f"{short_dir} is in use by process {os.getpid()} ")
    assert "--set redis.run_dir=" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(short_dir):
    folder = short_dir / ("x" * 100)
    with pytest.raises(RedisServerError, match=r"may have 107: choose a shorter folder with --set redis\.run_dir="):
        RedisServer.start(folder)
    assert not folder.exists()


def test_a_server_that_cannot_start_says_why(short_dir):
    with (
        RedisServer.start(short_dir, options=["--maxclients", "none"]) as server,
        pytest.raises(RedisServerError, match="Redis ended with code 1 at start"),
    ):
        server.wait_ready()


def test_it_ends_with_its_supervisor_even_by_kill_and_the_next_one_starts(short_dir):
    # Given a process that started a server and is killed
    code = (
        "import sys, pathlib; from pipeline.redis_server import RedisServer\n"
        "server = RedisServer.start(pathlib.Path(sys.argv[1])); server.wait_ready()\n"
        "print(server.process.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(short_dir)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as supervisor:
        redis_fd = os.pidfd_open(int(supervisor.stdout.readline()))
        assert ask_redis(short_dir / "redis.sock", "PING") == b"+PONG"
        supervisor.kill()

    # Then the server ends too
    wait_for_end(redis_fd)

    # And the folder is free
    with RedisServer.start(short_dir) as server:
        server.wait_ready()


def test_a_bound_command_ends_at_once_when_its_parent_is_gone_already():
    # Given a launch line made for a parent that is not the one that starts it
    launch = bound_command(["sleep", "60"])
    launch[launch.index(str(os.getpid()))] = str(os.getppid())

    # Then the command never runs
    assert subprocess.run(launch, timeout=30).returncode == -signal.SIGKILL


def test_a_bound_command_that_does_not_exist_is_named():
    result = subprocess.run(bound_command(["/no/such/program"]), capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert result.stderr == "/no/such/program: No such file or directory\n"


def test_no_server_anywhere_is_an_error_with_the_lines_to_install_one():
    # Given an interpreter without installed packages and an empty PATH
    code = "from pipeline.redis_server import find_server; find_server()"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=REPOSITORY, env={"PATH": ""}, capture_output=True, text=True, timeout=30
    )
    assert "RedisServerError: no Redis server was found; use one of" in result.stderr
    assert "apt-get install redis-server" in result.stderr


def setting(server: RedisServer, name: str) -> str:
    """CONFIG GET answers an array of two: the name and the value."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.socket_path))
        connection.sendall(f"CONFIG GET {name}\r\n".encode())
        with connection.makefile("rb") as answers:
            lines = [answers.readline() for _ in range(5)]
    assert lines[0] == b"*2\r\n"
    return lines[4].strip().decode()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def wait_for_end(pidfd: int) -> None:
    readable, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    assert readable, "the process is still there"
