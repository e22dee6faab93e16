"""The tiny generator, its base and its two training datasets, as an evaluation sees them."""

import pytest


@pytest.fixture
def targets(collection):
    """Both training datasets, tested on their own first rows."""
    from loragen.core.evaluation.targets import find_targets

    return find_targets([str(collection.file(name)) for name in collection.names], collection.data)


@pytest.fixture
def bench(experiment, base):
    """`bench(draws=2)`: with the training runs, and nothing trained for the comparison."""
    from loragen.core.evaluation.contestants import Bench, EvaluationOptions, training_sources
    from loragen.core.generator.model import Generator

    def make(**options):
        generator = Generator.load(experiment)
        sources = training_sources(generator)
        settings = EvaluationOptions(**{"draws": 2, "choices": False, **options})
        return Bench(base, generator, sources, options=settings)

    return make
