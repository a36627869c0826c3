"""What a person sees while a run goes on."""

import io
import re
import time

import pytest

from balora_jax.console import PlainConsole
from balora_jax.training.progress import TrainingProgress, phase


@pytest.mark.parametrize("terminal", [False, True])
def test_a_phase_is_shown_with_its_time_and_its_result(terminal):
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=terminal, color_system=None)
    with phase(console, "brief", brief_seconds=100):
        pass
    assert not file.getvalue()
    with phase(console, "with a result", brief_seconds=100) as say:
        say("of its own")
    assert re.fullmatch(r"with a result \.\.\. 0\.0 s; of its own\n", file.getvalue())
    with phase(console, "long", brief_seconds=0.01):
        time.sleep(0.3)
        assert file.getvalue().endswith("\n" if terminal else "long ...")
    assert re.search(r"^long \.\.\. 0\.\d s\n$", file.getvalue(), re.MULTILINE)


def test_a_phase_that_fails_ends_its_line():
    file = io.StringIO()

    def fail():
        with phase(PlainConsole(file=file), "long", brief_seconds=0.01):
            time.sleep(0.3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert file.getvalue() == "long ...\n"


def test_losses_are_shown_with_their_mean_and_without_the_time_of_other_phases():
    file = io.StringIO()
    with TrainingProgress(PlainConsole(file=file, width=200), "lora", 4, 0, line_seconds=0) as progress:
        for step, loss in enumerate((4.0, 2.0, 3.0, 1.0), start=1):
            if step == 3:
                with progress.phase("evaluating"):
                    time.sleep(0.5)
            progress.update(step, loss, 10)
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["lora: step 2/4", "loss 2.0000, mean of 2 steps 3.0000"],
        ["lora: step 3/4", "loss 3.0000, mean of 3 steps 3.0000"],
        ["lora: step 4/4", "loss 1.0000, mean of 4 steps 2.5000"],
    ]
    assert float(re.search(r"([\d,]+) tokens/s", lines[-1])[1].replace(",", "")) > 200
