"""Linear warm-up, then half a cosine down to a floor."""

from math import cos, pi

from loragen.plugins.schedules._decay import Decay


class Cosine(Decay):
    """From 0 to `learning_rate` over the warm-up, then along a cosine to `floor` of it
    (SGDR without restarts, arXiv 1608.03983, eq. 5)."""

    def remains(self, progress: float) -> float:
        return 0.5 * (1 + cos(pi * progress))
