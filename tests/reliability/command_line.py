"""`fluoro` in processes of its own without its seconds of imports: each is forked from one that has imported all.

From the arguments on, what runs is the real command line, in a session of its own as in a terminal of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT


class Server:
    """The process that has imported all and forks; end it with `close`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.reliability import command_line; command_line.serve()"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fluoro(self, folder: Path, *arguments: str, before: str = "") -> Running:
        """Start `fluoro` with some arguments; `before` is Python that runs first, such as a slower device."""
        number = len(list(folder.glob("said-*")))
        said = folder / f"said-{number}"
        said.touch()  # may be asked for before the process has begun to speak
        pid = self.ask(arguments=list(arguments), said=str(said), before=before)
        return Running(self, pid, said)

    def ask(self, **request: Any) -> Any:
        """Send a request to the process and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Running:
    """One `fluoro`: its process, and the file with all that it says."""

    def __init__(self, server: Server, pid: int, said: Path) -> None:
        self._server, self.pid, self._said = server, pid, said
        self._status: int | None = None

    @property
    def said(self) -> str:
        """What it has said so far, to both standard output and standard error."""
        return self._said.read_text()

    def status(self) -> int | None:
        """Return the exit status (minus the signal that killed it), None while it runs."""
        if self._status is None:
            self._status = self._server.ask(poll=self.pid)
        return self._status

    def wait(self, seconds: float = 120.0) -> int:
        """Return the exit status when it has ended."""
        return until(self.status, seconds, lambda: f"fluoro has not ended:\n{self.said}")

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Wait until something is so while it runs."""

        def met() -> Any:
            assert psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE, f"fluoro has ended:\n{self.said}"
            return condition() or None

        return until(met, seconds, lambda: f"it has not come to be:\n{self.said}")

    def processes(self) -> list[psutil.Process]:
        """Return it and all processes that it has started."""
        own = psutil.Process(self.pid)
        return [own, *own.children(recursive=True)]

    def interrupt(self, *, group: bool) -> None:
        """Send what Ctrl-C sends: to the process alone, or to all of its group, as a terminal does."""
        (os.killpg if group else os.kill)(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """Kill it without a chance to clean up."""
        os.kill(self.pid, signal.SIGKILL)


def until(condition: Callable[[], Any], seconds: float, otherwise: Callable[[], str]) -> Any:
    """Return the first answer of a condition that is not None."""
    end = time.monotonic() + seconds
    while (answer := condition()) is None:
        if time.monotonic() > end:
            raise TimeoutError(otherwise())
        time.sleep(0.005)
    return answer


def serve() -> None:
    """Fork a `fluoro` for each request that comes in; or tell what has become of one."""
    # Loading a model draws in what is imported late.
    from engine.encoder import load_encoder
    from jobs import embed, index, search  # noqa: F401
    from tests import models

    with tempfile.TemporaryDirectory() as folder:
        load_encoder(f"local-dir:{models.open_clip_vit(Path(folder))}", device="cpu")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            # What is pressed before the command line has begun waits until it has.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            answer = os.fork()
            if not answer:
                _run(**request)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        print(json.dumps(answer), flush=True)


def _run(arguments: list[str], said: str, before: str) -> None:
    from jobs import cli

    os.setsid()
    target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(old, new)
    sys.argv = ["fluoro", *arguments]
    exec(before, {})
    run = cli.run

    def begun(arguments: list[str]) -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return run(arguments)

    cli.run = begun
    try:
        cli.main(arguments)
    except SystemExit as end:
        # As the interpreter ends, but for taking apart all modules, which a forked process would first have to copy.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
