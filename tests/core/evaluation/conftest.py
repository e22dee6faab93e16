"""The tiny generator, its base and its two training datasets, set up for an evaluation."""

import pytest


@pytest.fixture
def targets(collection):
    """Both training datasets, tested on their own first rows."""
    from loragen.core.evaluation.targets import find_targets

    return find_targets([str(collection.file(name)) for name in collection.names], collection.data)


@pytest.fixture
def setup(experiment, base):
    """`setup(draws=2)`: with the training runs, and nothing trained for the comparison."""
    from loragen.core.evaluation.contest import training_sources
    from loragen.core.evaluation.contestants import EvaluationOptions, EvaluationSetup
    from loragen.core.generator.model import Generator

    def make(**options):
        generator = Generator.load(experiment)
        chosen = EvaluationOptions(**{"draws": 2, "choices": False, **options})
        return EvaluationSetup(base, generator, training_sources(generator), options=chosen)

    return make
