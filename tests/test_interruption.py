"""Ctrl-C: one line and exit code 130 from the first import on, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.py"

# Interrupts itself when a module is looked for, as a person would while it is imported.
PROGRAM = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["balora-jax", "evaluate", {config!r}]
from balora_jax.cli import main
sys.exit(main())
"""


def python(program):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", ["balora_jax.commands", "numpy", "jax", "datasets"])
def test_one_line_wherever_it_is_interrupted(module):
    assert python(PROGRAM.format(module=module, config=str(CONFIG))) == (130, "", "balora-jax: interrupted\n")


# An exception in a callback of the garbage collector is lost.
CALLBACK = """
import gc, os, signal
from balora_jax.interruption import guarded, leave_at_once

def interrupt(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)

leave_at_once("stopped")
gc.callbacks.append(interrupt)
"""


def test_an_interruption_is_not_lost_in_a_callback():
    assert python(CALLBACK + "gc.collect()") == (130, "", "stopped\n")
    block = """
try:
    with guarded():
        gc.collect()
except KeyboardInterrupt:
    print("put away")
"""
    code, out, err = python(CALLBACK + block)
    assert (code, out) == (0, "put away\n")
    assert "Exception ignored" in err, "the callback did not lose it: the test shows nothing"
