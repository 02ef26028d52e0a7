"""What the kernel says of a process's signals."""

from __future__ import annotations

import os
import signal

from pipeline.processes import catches


def test_a_process_catches_what_it_has_a_handler_for() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert catches(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not catches(os.getpid(), signal.SIGUSR2)
    assert not catches(2**22 + 1, signal.SIGUSR1)  # no such process
