"""Which signals are noted, and when they break something off."""

import os
import signal
import threading

import pytest

from balora_jax.training.interruption import Interruptions


@pytest.fixture
def received():
    """Signals that get through to what was there before."""
    found = []
    before = {number: signal.signal(number, lambda number, _: found.append(number)) for number in (2, 15)}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_gets_through(number, received, capfd):
    with Interruptions() as interruptions:
        assert interruptions.received is None
        os.kill(os.getpid(), number)
        assert (interruptions.received, received) == (number, [])
        assert "once more stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), number)
        assert received == [number]
    os.kill(os.getpid(), number)
    assert received == [number] * 2


def test_a_block_is_broken_off_at_once(received):
    done = []
    with Interruptions() as interruptions:
        with interruptions.at_once():
            done.append("whole")
        with interruptions.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("never")
        assert (done, interruptions.received, received) == (["whole"], signal.SIGTERM, [])


def test_signals_that_are_ignored_stay_so(received):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruptions() as interruptions:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruptions.received is None


def test_other_threads_get_no_signals(received):
    def enter():
        with Interruptions() as interruptions, interruptions.at_once():
            found.append(interruptions.received)

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None]
