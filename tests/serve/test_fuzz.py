"""The server against requests that schemathesis makes of its own OpenAPI document."""

import re
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from loragen.serve.app import Settings, make_app  # noqa: E402
from loragen.serve.service import AdapterService  # noqa: E402

# Not every request of the document is one that can be met: there may be no text in the prompts.
ARGUMENTS = (
    *("--exclude-checks", "positive_data_acceptance", "--max-examples", "15"),
    *("--seed", "1", "--suppress-health-check", "all", "--no-color"),
    *("--header", "Authorization: Bearer a token for this test"),
)


@pytest.fixture
def url(generator, file, tmp_path):
    """A server on a port of its own."""
    app = make_app(
        lambda observed: AdapterService(generator, file, observed=observed),
        Settings("a token for this test", max_bytes=10_000),
    )
    config = uvicorn.Config(app, port=0, log_config=None, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_every_answer_is_one_of_the_document(url, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *ARGUMENTS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) generated", result.stdout)[1]) > 100
