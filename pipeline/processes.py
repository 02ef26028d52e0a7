"""Child processes that never outlive their parent, not even its `kill -9`.

Linux sends a process a signal of its choice when the thread that made it ends (PR_SET_PDEATHSIG). The call must be made in the
child. `preexec_fn` would do that between fork and exec, where any lock that another thread held is held for ever; so a child
is started through this file instead: a bare interpreter (about 15 ms) makes the call, checks that its parent is still there,
and becomes the command. The setting survives the exec.

Only the standard library is used here: the launcher runs without site-packages.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def bound_command(command: Sequence[str], death_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """`command` so that it gets `death_signal` when the calling process ends, however it ends.

    Start it from the main thread: the kernel watches the thread that forks, not the process.
    """
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    return [*launcher, str(os.getpid()), str(int(death_signal)), *command]


def die_with_parent(parent_pid: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """From now on this process gets `death_signal` when its parent ends; at once if `parent_pid` is no longer the parent.

    Without Linux there is no such call: nothing is set and the parent's orderly stop is all there is.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it ended before the call above
        os.kill(os.getpid(), death_signal)


def ending(code: int) -> str:
    """An exit code in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; where nothing tells (no /proc), it is taken to have one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return sys.platform != "linux"
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _launch(arguments: Sequence[str]) -> None:
    parent_pid, death_signal, *command = arguments
    die_with_parent(int(parent_pid), signal.Signals(int(death_signal)))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    _launch(sys.argv[1:])
