from loragen.core.learning.plan import Phase, Phases

BOTH = Phases((Phase("reconstruction", 3), Phase("behaviour", 2)))


def test_steps_walk_through_the_phases():
    found = [(phase.objective[0], within) for phase, within in map(BOTH.at, range(1, 8))]
    assert found == [("r", 1), ("r", 2), ("r", 3), ("b", 1), ("b", 2), ("b", 2), ("b", 2)]
    assert BOTH.total == 5


def test_the_base_is_needed_for_behaviour_alone():
    assert BOTH.behaviour
    assert not Phases((Phase("reconstruction", 3),)).behaviour


def test_they_are_told_in_words():
    assert str(BOTH) == "3 steps of reconstruction, then 2 steps of behaviour"
