"""Soaks `loragen serve`: many clients on loopback, every answer compared with `gen infer`.

    python benchmarks/serve.py --model experiments/RUN --clients 32 --requests 2000

Two servers of one generator run side by side, one with `--max-batch 1`, and take turns, so that
both meet the same load of the machine. Prints whether an answer was lost or mixed up, the memory of
the server, the times of requests and the gain of the batch, as Markdown. Needs the extra `serve`.
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import psutil

WORDS = (
    "what which name tell me the colour home food size number of a creature river city animal "
    "answer in one word two words a sentence please short long question about and or"
)
Answers = list[tuple[int, float, dict[str, str]]]
"""(index of the request, seconds, {file of the adapter: its hash})"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=2, help="of a request")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--alone", type=int, default=500, help="requests with --max-batch 1")
    arguments = parser.parse_args()
    chance, words = random.Random(0), WORDS.split()
    requests = [
        [f"{' '.join(chance.choices(words, k=6))} {i}?" for _ in range(arguments.prompts)]
        for i in range(arguments.requests)
    ]
    for again in range(50, len(requests), 50):  # some are asked twice, at the same time or later
        requests[again] = requests[again - chance.choice((1, 40))]
    with tempfile.TemporaryDirectory() as folder:
        expected = inferred(arguments.model, requests, Path(folder))
        print(f"gen infer has written {len(expected)} adapters", flush=True)
        with (
            server(arguments.model, arguments.max_batch) as (port, process),
            server(arguments.model, 1) as (port_alone, _),
        ):
            load = os.getloadavg()[0]
            answers, memory, ratios, times = [], [], [], []
            size, size_alone = (
                total // arguments.rounds for total in (len(requests), arguments.alone)
            )
            asked(port, requests[:1], 1, 0), asked(port_alone, requests[:1], 1, 0)
            for number in range(arguments.rounds):
                some = requests[number * size : (number + 1) * size]
                started = time.perf_counter()
                answers += asked(port, some, arguments.clients, number * size)
                rate = len(some) / (time.perf_counter() - started)
                memory.append(process.memory_info().rss / 2**20)
                started = time.perf_counter()
                times += asked(port_alone, some[:size_alone], arguments.clients, number * size)
                rate_alone = len(some[:size_alone]) / (time.perf_counter() - started)
                ratios.append(rate / rate_alone)
                print(f"round {number + 1}: {rate:.1f} and {rate_alone:.1f} a second", flush=True)
            metrics = text_of(port, "/metrics")
    wrong = [index for index, _, found in answers + times if found != expected[index]]
    print(f"\n{len(answers)} of {len(answers)} answered, {len(wrong)} not as gen infer writes it")
    print(f"generated: {value_of(metrics, 'generate_seconds_count'):.0f}; the others were there")
    print(f"load of the machine {load:.1f}, {os.cpu_count()} cores")
    print("\n| | p50 s | p99 s |\n|---|---|---|")
    for name, found in ((f"--max-batch {arguments.max_batch}", answers), ("--max-batch 1", times)):
        cut = quantiles([seconds for _, seconds, _ in found], n=100)
        print(f"| `{name}` | {cut[49]:.2f} | {cut[98]:.2f} |")
    print(
        f"\ngain of the batch: {median(ratios):.2f} (median of {len(ratios)} rounds, "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )
    print("memory of the server after each round, MiB:", *(f"{one:.0f}" for one in memory))
    if wrong:
        raise SystemExit(f"wrong answers: {wrong[:20]}")


def inferred(model: str, requests: list[list[str]], folder: Path) -> list[dict[str, str]]:
    """Returns the hashes of what `gen infer` writes for every request."""
    rows = folder / "rows.jsonl"
    lines = (
        json.dumps({"prompt": prompt, "response": "-", "request": f"request-{i:05d}"})
        for i, prompts in enumerate(requests)
        for prompt in prompts
    )
    rows.write_text("\n".join(lines), encoding="utf-8")
    command = ["gen", "infer", "--model", model, "--prompt-file", str(rows), "--per", "request"]
    subprocess.run(
        [sys.executable, "-m", "loragen", *command, "--output", str(folder / "adapters")],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return [
        {file.name: digest(file.read_bytes()) for file in directory.iterdir()}
        for directory in sorted((folder / "adapters").iterdir())
    ]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def server(model: str, max_batch: int) -> Iterator[tuple[int, psutil.Process]]:
    """Yields the port of a server and its process."""
    command = ["serve", "--model", model, "--port", "0", "--max-batch", str(max_batch)]
    process = subprocess.Popen(
        [sys.executable, "-m", "loragen", *command, "--timeout", "300", "--keep", "200"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        url = process.stdout.readline()
        yield int(url.rpartition(":")[2].partition("/")[0]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def text_of(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def value_of(metrics: str, name: str) -> float:
    lines = (line for line in metrics.splitlines() if line.startswith(f"loragen_serve_{name} "))
    return float(next(lines).split()[1])


def asked(port: int, requests: list[list[str]], clients: int, first: int) -> Answers:
    """Asks for every request once, by so many clients at a time. Raises if one is not answered."""
    local = threading.local()

    def ask(index: int) -> tuple[int, float, dict[str, str]]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({"prompts": requests[index]})
        started = time.perf_counter()
        local.connection.request("POST", "/v1/adapters", body, {"Content-Type": "application/json"})
        answer = local.connection.getresponse()
        content = answer.read()
        seconds = time.perf_counter() - started
        if answer.status not in (200, 201):
            raise RuntimeError(f"request {first + index}: {answer.status} {content[:200]!r}")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = {name: digest(archive.read(name)) for name in archive.namelist()}
        return first + index, seconds, found

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, range(len(requests))))


if __name__ == "__main__":
    main()
