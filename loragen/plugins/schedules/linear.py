"""Linear warm-up, then a straight line down to a floor."""

from loragen.plugins.schedules._decay import Decay


class Linear(Decay):
    """From 0 to `learning_rate` over the warm-up, then straight down to `floor` of it."""

    def remains(self, progress: float) -> float:
        return 1 - progress
