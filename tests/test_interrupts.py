"""Ctrl-C between two states of a model: it waits until the second one is whole."""

import signal
import threading

import pytest

from regraft.interrupts import HeldInterrupts


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block():
    steps = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        interrupt()
        steps.append("finished")
    assert steps == ["finished"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_through_where_it_is_released_and_the_clean_up_is_held_again():
    steps = []

    def work():
        with HeldInterrupts() as held:
            try:
                with held.released():
                    interrupt()
                    steps.append("never")
            finally:
                interrupt()
                steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_waits_comes_through_at_the_release():
    with pytest.raises(KeyboardInterrupt), HeldInterrupts() as held:
        interrupt()
        with held.released():
            pytest.fail("the interrupt was lost")


def test_blocks_within_blocks_hand_it_outwards():
    steps = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        with HeldInterrupts():
            interrupt()
            steps.append("inner")
        steps.append("outer")
    assert steps == ["inner", "outer"]


def test_blocks_that_overlap_leave_nothing_behind():
    first, second, third = HeldInterrupts(), HeldInterrupts(), HeldInterrupts()
    for block in (first, second, third):
        block.__enter__()
    first.__exit__()
    second.__exit__()
    with pytest.raises(KeyboardInterrupt), third.released():
        interrupt()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        third.__exit__()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_called_and_stays():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("own"))
    try:
        with HeldInterrupts() as held:
            interrupt()
            assert calls == []
            with held.released():
                interrupt()
                assert calls == ["own", "own"]
                interrupt()
        assert calls == ["own"] * 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_and_ignored_signals_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with HeldInterrupts():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    entered = []

    def work():
        with HeldInterrupts() as held, held.released():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]


def test_an_interrupt_on_the_way_out_leaves_the_handler_that_was_there(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    held = HeldInterrupts()
    put_back, calls = signal.signal, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:  # the first was on the way in
            raise KeyboardInterrupt
        return put_back(*args)

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), held:
        pass
    assert signal.getsignal(signal.SIGINT) is before
