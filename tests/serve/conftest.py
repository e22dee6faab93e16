"""A server of the tiny generator in this process; all of it skips without the extra `serve`."""

import threading
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from fastapi.testclient import TestClient

from loragen.core.generator.model import Generator
from loragen.core.run.directory import generator_file
from loragen.serve.app import Settings, make_app
from loragen.serve.service import AdapterService, Limits

PROMPTS = ["Question 3 about red?", "Question 4 about blue?", "And what about green?"]


@pytest.fixture(scope="session")
def generator(experiment):
    """The tiny generator. Nobody changes it but `held`, which changes it back."""
    found = Generator.load(experiment)
    _ = found.text_encoder
    return found


@pytest.fixture
def file(experiment):
    return generator_file(experiment)


@pytest.fixture
def served(generator, file):
    """`with served(token="...", queue=2) as client:`; `client.service` is behind it."""

    @contextmanager
    def start(directory=None, batch=8, queue=64, keep=1000, **settings):
        made = []

        def make(observed):
            limits = Limits(batch, queue, keep)
            made.append(AdapterService(generator, file, directory, limits, observed))
            return made[0]

        app = make_app(make, Settings(shared=directory is not None, **settings))
        address = "http://127.0.0.1"
        with TestClient(app, address, raise_server_exceptions=False) as client:
            client.service = made[0]
            yield client

    return start


@pytest.fixture
def held(generator, monkeypatch):
    """Holds every generation until `held.go` is set; `held.begun` counts them."""

    class Held:
        go, begun = threading.Event(), threading.Semaphore(0)
        calls = 0

    generate = generator.generate

    def waits(*arguments):
        Held.calls += 1
        Held.begun.release()
        assert Held.go.wait(60)
        return generate(*arguments)

    monkeypatch.setattr(generator, "generate", waits)
    yield Held
    Held.go.set()
