"""Programs that need a process of their own: for the devices that they ask for, or because they could hang."""

import os
import subprocess
import sys
import textwrap


def run_alone(program, flags="", optimized=False, timeout=240):
    """Runs a program in a process of its own; a deadlock ends in `TimeoutExpired`.

    It is compiled as quickly as all tests are, or as users' programs are if it asks for that.
    """
    if not optimized:
        flags = f"{os.environ['XLA_FLAGS']} {flags}"
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
