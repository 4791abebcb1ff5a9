"""What a command does on SIGTERM, SIGINT and SIGUSR1, from its first moment to its last.

Nothing heavy is imported here: a command installs its handlers before the seconds in which it imports the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}
"""Exit code of a command that a signal has ended."""

_SAME_SIGNAL = 0.5  # seconds: timeout(1) and others signal a process and then its group, so it comes twice


class Launcher(Protocol):
    """What has started the other processes of a run."""

    def kill(self, signum: Any) -> None:
        """Send a signal to them."""


class Stop:
    """Handlers of the three signals, and what they have received.

    A signal ends the command at once while nothing would be lost by it. Once `saving` is set, it is only noted in
    `received`: the code that set it finishes the step, saves, and stops. A second signal then exits at once.

    Used as a context, it installs the handlers and restores the previous ones at the end. Where the process is the
    command, the context ends it instead, with the exit code of the signal or that of the SystemExit, because a signal
    in the interpreter's own shutdown could not be answered any more.

    Args:
        is_process: whether the process is nothing but the command. If not, a signal raises SystemExit.
    """

    def __init__(self, is_process: bool = False) -> None:
        self.is_process = is_process
        self.received = 0
        self.saving = False
        self.launcher: Launcher | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._owner = 0

    def install(self) -> None:
        """Install the handlers, in the main thread, for this process but not for those that it forks."""
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, self.handle) for number in EXIT_CODES}
            self._previous = self._previous or previous

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            # A handler that was not installed from Python cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.forget()

    def forget(self) -> None:
        """Take note that the previous handlers have been restored."""
        self._previous, self.saving = {}, False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if os.getpid() != self._owner:
            # A process that reads data: the one that started it decides.
            if number == signal.SIGTERM:
                os._exit(EXIT_CODES[number])
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            if self.saving:
                _say(f"{name}: stopping after this step, once a checkpoint is saved; a second signal exits at once")
            else:
                _say(f"stopped by {name}; nothing was lost, since no step of training had been made")
                self._end(EXIT_CODES[number])
        elif now - self._received_at > _SAME_SIGNAL:
            _say(f"{name} again: exiting at once")
            self.is_process = True
            self._end(128 + number)

    def _end(self, code: int) -> NoReturn:
        if self.launcher is not None:
            self.launcher.kill(signal.SIGKILL)
        if self.is_process:
            os._exit(code)
        raise SystemExit(code)

    def __enter__(self) -> Stop:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = 0 if error is None else error.code if isinstance(error, SystemExit) else 1
        if not self.is_process or not isinstance(code, int | None) or (error and not isinstance(error, SystemExit)):
            self.restore()
            if error is None and self.received:
                raise SystemExit(EXIT_CODES[self.received])
            return
        self.saving = True
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code or EXIT_CODES.get(self.received, 0))


def _say(sentence: str) -> None:
    """Write to stderr without Python's buffers, which may be locked in a signal handler."""
    with contextlib.suppress(OSError):
        os.write(2, f"attnzoo-pretrain: {sentence}\n".encode())
