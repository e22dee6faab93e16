"""What a server does with a request: it waits in a bounded queue, is generated, written and kept.

**Every adapter is the one that `gen infer` writes, bit for bit**, whatever else is asked for at the
time. Therefore requests are not joined into one batch of tensors: a matrix product of another shape
adds its terms in another order (docs/service.md has by how much, and that it would save no time on
a CPU). A batch here are the requests that are in work together: one thread generates them one after
the other, and while it computes, others write the files of those that are finished. Equal requests
are computed once.
"""

import asyncio
import math
import shutil
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, TypeVar
from zipfile import ZipFile, ZipInfo

from loragen import __version__
from loragen.core.adapter import CARD, WEIGHTS_FILE, adapter_record
from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import sha256, sha256_text, written_atomically
from loragen.core.generator.requests import check_draws, nonempty_prompts

if TYPE_CHECKING:
    from loragen.core.generator.generated import GeneratedAdapter
    from loragen.core.generator.model import Generator

Result = TypeVar("Result")
ID_LENGTH = 32
"""Hexadecimal digits of an adapter's id."""
LONGEST_WAIT = 600
"""The most seconds that a client is told to wait before it tries again."""


class QueueFullError(LoragenError):
    """As many requests wait as may."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Wanted:
    """An adapter that is asked for, as `Generator.generate` takes it."""

    prompts: tuple[str, ...]
    draws: int = 1
    prompts_per_draw: int | None = None
    seed: int = 0

    @classmethod
    def checked(
        cls, prompts: list[str], draws: int, prompts_per_draw: int | None, seed: int
    ) -> "Wanted":
        """Raises UsageError if no prompt has text, or there are too few for the draws."""
        given = tuple(nonempty_prompts(prompts))
        check_draws(len(given), draws, prompts_per_draw)
        return cls(given, draws, prompts_per_draw, seed)

    def identity(self, generator: str) -> str:
        """Returns the id of the adapter: equal requests to one generator have one."""
        how = f"{self.draws} {self.prompts_per_draw} {self.seed}"
        return sha256_text(generator, how, *self.prompts)[:ID_LENGTH]


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    batch: int = 8
    """Requests in work together: the adapters that are in memory at a time."""
    queue: int = 64
    """Requests that wait."""
    keep: int = 1000
    """Adapters that are kept, and files made of them."""


class Store:
    """The adapters that were made: PEFT directories, and the single files made of them.

    In a temporary directory the last `keep` that were asked for are kept. In a directory of the
    user's all are: what reads them there is not known here. Files are always temporary.
    """

    def __init__(self, directory: Path | None, keep: int) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="loragen-serve-")
        home = Path(self._temporary.name)
        self._files, self._own = home / "files", directory is None
        self.directory = directory.absolute() if directory else home / "adapters"
        for folder in (self._files, self.directory):
            folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._lock = keep, Lock()
        self._known: OrderedDict[str, None] = OrderedDict()
        """Ids, the one last asked for at the end."""
        self._used: Counter[str] = Counter()

    @contextmanager
    def using(self, identity: str) -> Iterator[None]:
        """Keeps this adapter in the block."""
        with self._lock:
            self._used[identity] += 1
        try:
            yield
        finally:
            with self._lock:
                self._used[identity] -= 1
                self._used += Counter()  # drops those that are used no more

    @property
    def is_used(self) -> bool:
        with self._lock:
            return bool(self._used)

    def find(self, identity: str) -> Path | None:
        """Returns the PEFT directory of an adapter, or None. One that another process has left is
        checked. Raises LoragenError if it is not as it was written."""
        directory = self.directory / identity
        if not (directory / WEIGHTS_FILE).is_file():
            return None
        with self._lock:
            known = identity in self._known
        if not known:
            record = adapter_record(directory) or {CARD: "changed"}
            written = ((directory / name, digest) for name, digest in record.items() if digest)
            if any(sha256(file) != digest for file, digest in written):
                raise LoragenError(f"{directory} is not as loragen has written it; move it away")
        self._remember(identity)
        return directory

    def add(self, identity: str, adapter: "GeneratedAdapter") -> Path:
        """Writes the PEFT directory of an adapter, unless another server has written it by now."""
        directory = self.directory / identity
        try:
            adapter.save(directory)
        except UsageError:
            if self.find(identity) is None:
                raise LoragenError(f"{directory} is not from loragen; move it away") from None
        self._remember(identity)
        return directory

    def open_file(self, identity: str, suffix: str) -> IO[bytes]:
        """Opens the adapter as one file, `.zip` or `.safetensors`, which is made at first."""
        file = self._files / f"{identity}{suffix}"
        if not file.exists():
            write = _write_zip if suffix == ".zip" else _write_safetensors
            with written_atomically(file) as temporary:
                write(self.directory / identity, temporary)
        return file.open("rb")

    def close(self) -> None:
        self._temporary.cleanup()

    def _remember(self, identity: str) -> None:
        with self._lock:
            self._known[identity] = None
            self._known.move_to_end(identity)
            unused = (one for one in self._known if not self._used[one])
            excess = max(0, len(self._known) - self._keep)
            for one in list(islice(unused, excess)):
                del self._known[one]
                for file in self._files.glob(f"{one}.*"):
                    file.unlink(missing_ok=True)
                if self._own:
                    shutil.rmtree(self.directory / one, ignore_errors=True)


def _write_zip(directory: Path, file: Path) -> None:
    """Writes the files of a PEFT directory, uncompressed, since weights do not compress. Equal
    adapters make equal bytes."""
    names = sorted(adapter_record(directory) or ())
    with ZipFile(file, "w") as archive:
        for name in names:
            entry = ZipInfo(name)  # of 1980: a time would make it another file
            entry.external_attr, entry.file_size = 0o644 << 16, (directory / name).stat().st_size
            with (directory / name).open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 2**20)


def _write_safetensors(directory: Path, file: Path) -> None:
    """Writes the file that `gen infer --output NAME.safetensors` would."""
    from loragen.core.adapter.files import read_adapter
    from loragen.core.generator.generated import GeneratedAdapter, Origin

    found = read_adapter(directory)
    origin = Origin(**{key: value for key, value in found.lineage.items() if key != "command"})
    kept = found.chat_template_kwargs
    GeneratedAdapter(found.config, found.tensors, origin, chat_template_kwargs=kept).save(file)


@dataclass(eq=False)
class _Job:
    """An adapter that is being made, for all that have asked for it."""

    wanted: Wanted
    task: "asyncio.Task[Path]" = field(init=False)
    accepted: float = field(default_factory=time.perf_counter)
    clients: int = 0
    started: bool = False


class AdapterService:
    """Makes adapters, one after the other, in the order in which they are asked for.

    All methods are called in one event loop. `observed` is called with what is measured: `waited`,
    `generated` and `written` in seconds, `batch` in requests.
    """

    def __init__(
        self,
        generator: "Generator",
        file: Path,
        directory: Path | None = None,
        limits: Limits | None = None,
        observed: Callable[[str, float], object] = lambda *_: None,
    ) -> None:
        """`file` is the one that the generator was loaded from; adapters are written into
        `directory`, or into a temporary one."""
        self.generator, self.limits, self.observed = generator, limits or Limits(), observed
        self.fingerprint = f"{sha256(file)} {generator.name} loragen {__version__}"
        self.store = Store(directory, self.limits.keep)
        self._jobs: dict[str, _Job] = {}
        self._slots = asyncio.Semaphore(self.limits.batch)
        self._generating = ThreadPoolExecutor(1, "generate")
        self._writing = ThreadPoolExecutor(min(self.limits.batch, 4), "write")
        self._seconds = 1.0
        """The time of a request, averaged."""

    @property
    def waiting(self) -> int:
        return sum(not job.started for job in self._jobs.values())

    @property
    def working(self) -> int:
        return sum(job.started for job in self._jobs.values())

    def is_in_work(self, identity: str) -> bool:
        return identity in self._jobs

    async def on_disk(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Returns `call(*arguments)`, computed in one of the threads that write."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writing, partial(call, *arguments))

    async def find(self, identity: str) -> Path | None:
        """Returns the PEFT directory of an adapter that was made, or None."""
        return None if self.is_in_work(identity) else await self.on_disk(self.store.find, identity)

    async def make(self, identity: str, wanted: Wanted) -> Path:
        """Returns the PEFT directory of an adapter once it is written.

        Raises QueueFullError at once if too many wait, LoragenError if it cannot be generated or
        written. If all who wait for it give up (are cancelled) before it is begun, it is dropped;
        after that it is finished and kept.
        """
        job = self._jobs.get(identity)
        if job is None:
            waiting = self.waiting
            if waiting >= self.limits.queue:
                wait = math.ceil(self._seconds * waiting)
                raise QueueFullError(waiting, min(max(wait, 1), LONGEST_WAIT))
            job = self._jobs[identity] = _Job(wanted)
            job.task = asyncio.create_task(self._run(identity, job))
            job.task.add_done_callback(partial(self._forget, identity))
        job.clients += 1
        try:
            return await asyncio.shield(job.task)
        except asyncio.CancelledError:
            if job.clients == 1 and not job.started:
                job.task.cancel()
                self._forget(identity, job.task)
            raise
        finally:
            job.clients -= 1

    async def close(self) -> None:
        """Finishes what was accepted, and removes what is temporary."""
        await asyncio.gather(*(job.task for job in self._jobs.values()), return_exceptions=True)
        while self.store.is_used:  # answers that are being put together; they have deadlines
            await asyncio.sleep(0.01)
        self._generating.shutdown()
        self._writing.shutdown()
        self.store.close()

    async def _run(self, identity: str, job: _Job) -> Path:
        loop = asyncio.get_running_loop()
        async with self._slots:  # who came first is let in first
            job.started, begun = True, time.perf_counter()
            self.observed("waited", begun - job.accepted)
            self.observed("batch", self.working)
            adapter = await loop.run_in_executor(self._generating, self._generate, job.wanted)
            with self.store.using(identity):
                started = time.perf_counter()
                directory = await self.on_disk(self.store.add, identity, adapter)
                self.observed("written", time.perf_counter() - started)
            seconds = (time.perf_counter() - begun) / max(1, self.working)
            self._seconds = 0.9 * self._seconds + 0.1 * seconds
            return directory

    def _generate(self, wanted: Wanted) -> "GeneratedAdapter":
        started = time.perf_counter()
        adapter = self.generator.generate(
            list(wanted.prompts), wanted.draws, wanted.prompts_per_draw, wanted.seed
        )
        self.observed("generated", time.perf_counter() - started)
        return adapter

    def _forget(self, identity: str, task: "asyncio.Task[Path]") -> None:
        if identity in self._jobs and self._jobs[identity].task is task:
            del self._jobs[identity]
        if not task.cancelled() and task.done():
            task.exception()  # everybody who waited may have gone
