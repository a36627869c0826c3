"""Programs that need a process of their own: for the devices that they ask for, or because they could hang."""

import subprocess
import sys
import textwrap


def run_alone(program, flags="", timeout=240):
    """Runs a program in a process of its own; a deadlock ends in `TimeoutExpired`."""
    text = f"import os\nos.environ['XLA_FLAGS'] = {flags!r}\n" + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
