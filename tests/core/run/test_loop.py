import signal
import threading
from types import SimpleNamespace

import pytest

from loragen.core.run.loop import HANGUP, SIGNALS, Interruption

ALONE = SimpleNamespace(world_size=1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_remembered_and_a_second_is_not_waited_for(number):
    interruption = Interruption()
    with interruption.handle_signals():
        assert not interruption.requested_on_any(ALONE)
        signal.raise_signal(number)
        assert interruption.requested_on_any(ALONE)
        if number == HANGUP:  # the shell and the terminal may both send it
            signal.raise_signal(number)
            number = signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_the_handlers_are_as_they_were_however_the_block_ends():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().handle_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(OSError), Interruption().handle_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Lightning does on its way out
        raise OSError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_handlers_can_be_installed_again_where_another_handler_came_between():
    interruption = Interruption()
    with interruption.handle_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interruption.install_handlers()
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested


def test_in_another_thread_nothing_changes():
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def work():
        interruption = Interruption()
        with interruption.handle_signals():
            interruption.install_handlers()
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("anyone", [False, True])
def test_several_devices_decide_together(mine, anyone):
    asked = []

    def decide(decision, all):  # Lightning's name
        asked.append((decision, all))
        return anyone

    trainer = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide)
    )
    interruption = Interruption()
    interruption.requested = mine
    assert interruption.requested_on_any(trainer) is anyone
    assert asked == [(mine, False)]
