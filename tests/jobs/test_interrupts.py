"""jobs/interrupts.py: an interrupt that falls into a callback is raised again, and a finished job hears none."""

import signal
import subprocess
import sys

from tests.conftest import ROOT

PRESSED_IN_A_CALLBACK = """
import signal, sys, time
from jobs import interrupts

class Falls:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            pass

def job():
    falls = Falls()
    del falls
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.001)
    print("nobody heard it")

try:
    with interrupts.heard():
        job()
except KeyboardInterrupt:
    print("stopped")
"""

# A capsule of compiled code that asks for an attribute and clears whatever comes of it.
PRESSED_WHERE_IT_IS_CLEARED = PRESSED_IN_A_CALLBACK.replace(
    "    falls = Falls()\n    del falls\n",
    """
    import ctypes
    class Asked:
        def __getattr__(self, name):
            signal.raise_signal(signal.SIGINT)
            for _ in range(1000):
                pass
    has = ctypes.pythonapi.PyObject_HasAttrString
    has.argtypes, has.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
    has(Asked(), b"anything")
""",
)

HEARD_ONCE = """
import signal, time
from jobs import interrupts

with interrupts.heard():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        interrupts.arrived()
        print("heard")
    time.sleep(0.3)
    print("quiet")
"""

ANOTHER_ERROR = """
from jobs import interrupts

class Breaks:
    def __del__(self):
        raise ValueError("broken")

with interrupts.heard():
    breaks = Breaks()
    del breaks
"""

PRESSED_AT_THE_END = """
import atexit, signal, sys
from jobs import cli

class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

late = Late()  # taken down with the module, when the interpreter has given up its own handlers
atexit.register(signal.raise_signal, signal.SIGINT)
cli.run = lambda arguments: cli.DONE_WITH_FAILURES
cli.main([])
"""

DEAFENED_BY_A_THREAD = """
import signal, threading
from jobs import interrupts

thread = threading.Thread(target=interrupts.deafen)
thread.start()
thread.join()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_an_interrupt_that_python_only_reports_arrives_all_the_same():
    ended = python(PRESSED_IN_A_CALLBACK)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "stopped\n", "")


def test_an_interrupt_that_compiled_code_clears_arrives_all_the_same():
    ended = python(PRESSED_WHERE_IT_IS_CLEARED)
    assert (ended.returncode, ended.stdout) == (0, "stopped\n")


def test_without_it_compiled_code_forgets_the_interrupt():
    ended = python(PRESSED_WHERE_IT_IS_CLEARED.replace("interrupts.heard()", "__import__('contextlib').nullcontext()"))
    assert ended.stdout == "nobody heard it\n"


def test_an_interrupt_that_was_heard_is_not_pressed_again():
    ended = python(HEARD_ONCE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "heard\nquiet\n", "")


def test_without_it_python_forgets_the_interrupt():
    """So that the test above shows something."""
    ended = python(PRESSED_IN_A_CALLBACK.replace("interrupts.heard()", "__import__('contextlib').nullcontext()"))
    assert ended.stdout == "nobody heard it\n" and "Exception ignored" in ended.stderr


def test_other_errors_in_callbacks_are_reported_as_ever():
    ended = python(ANOTHER_ERROR)
    assert ended.returncode == 0 and "ValueError: broken" in ended.stderr


def test_a_finished_job_keeps_its_status_whatever_is_pressed_while_the_interpreter_ends():
    ended = python(PRESSED_AT_THE_END)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_without_it_the_status_is_lost():
    ended = python(PRESSED_AT_THE_END.replace("cli.run =", "cli.interrupts.deafen = lambda: None\ncli.run ="))
    assert ended.returncode == -signal.SIGINT or "KeyboardInterrupt" in ended.stderr


def test_a_thread_cannot_deafen_the_program():
    assert python(DEAFENED_BY_A_THREAD).stdout == "True\n"
