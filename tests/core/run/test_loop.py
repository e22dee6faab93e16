import signal
import threading
from types import SimpleNamespace

import pytest

from loragen.core.errors import EXIT_INTERRUPTED, Interrupted
from loragen.core.run.loop import SIGNALS, Interruption

ALONE = SimpleNamespace(world_size=1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_remembered_and_a_second_is_not_waited_for(number):
    interruption = Interruption()
    with interruption.awaited():
        assert not interruption.requested_on_any(ALONE)
        signal.raise_signal(number)
        assert interruption.requested_on_any(ALONE)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_the_handlers_are_as_they_were_however_the_block_ends():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().awaited():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(OSError), Interruption().awaited():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Lightning does on its way out
        raise OSError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_it_listens_again_where_another_handler_came_between():
    interruption = Interruption()
    with interruption.awaited():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interruption.listen()
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested


def test_in_another_thread_nothing_changes():
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def work():
        interruption = Interruption()
        with interruption.awaited():
            interruption.listen()
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


def test_it_says_how_to_go_on(tmp_path):
    error = Interruption().error_after(7, 125, f"lora train --resume {tmp_path}")
    assert isinstance(error, Interrupted)
    assert error.exit_code == EXIT_INTERRUPTED == 130
    assert str(error) == (
        "interrupted after step 7 of 125, which is saved; to resume: "
        f"loragen lora train --resume {tmp_path}"
    )
