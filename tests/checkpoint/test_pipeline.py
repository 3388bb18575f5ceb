"""Tensors through memory: in order, within the budget, and no thread left behind."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import xxhash

from unmergeable.checkpoint import pipeline
from unmergeable.checkpoint.disk import ALIGNMENT
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.pipeline import InputHashes, Job, Piece, stream
from unmergeable.checkpoint.source import Extent
from unmergeable.errors import CheckpointError

ELEMENTS = 1000
SPEC = TensorSpec("U8", (ELEMENTS,))


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    generator = torch.Generator().manual_seed(0)
    path.write_bytes(torch.randint(0, 256, (10 * ELEMENTS + 17,), dtype=torch.uint8, generator=generator).numpy().data)
    return path


def nothing_to_hash() -> InputHashes:
    return InputHashes({}, {})


def make(number: int, seconds: float = 0.0) -> Callable[[], torch.Tensor]:
    def work() -> torch.Tensor:
        time.sleep(seconds)
        return torch.full((ELEMENTS,), number, dtype=torch.uint8)

    return work


def stored(path: Path, begin: int, edit: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Job:
    return Job(f"t{begin}", SPEC, SPEC, extent=Extent(path, begin, begin + ELEMENTS), edit=edit)


def collect(jobs: list[Job], hashes: InputHashes, threads: int = 2, memory_budget: int = 1 << 20) -> list[bytes]:
    results = [b""]
    with closing(stream(jobs, hashes, threads=threads, memory_budget=memory_budget)) as pieces:
        for piece in pieces:
            results[-1] += bytes(piece.data)
            piece.release()
            if piece.last:
                results.append(b"")
    assert results.pop() == b""
    return results


@pytest.mark.parametrize("piece_bytes", [64, ELEMENTS, 1 << 20])
@pytest.mark.parametrize("memory_budget", [1, 3 * ELEMENTS, 1 << 20])
def test_results_come_in_order_however_long_each_takes(
    piece_bytes: int, memory_budget: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PIECE_BYTES", piece_bytes)
    data = file.read_bytes()
    empty = TensorSpec("F32", (0,))
    jobs = [
        stored(file, 0),
        Job("slow", SPEC, SPEC, read=make(1, 0.05)),
        stored(file, ELEMENTS, lambda tensor: tensor.bitwise_not_()),
        Job("empty copy", empty, empty, extent=Extent(file, 5, 5)),
        Job("empty", empty, empty, read=lambda: torch.zeros(0)),
        Job("fast", SPEC, SPEC, read=make(2)),
        Job("filled", SPEC, SPEC, fill=lambda tensor: tensor.fill_(3)),
        Job("empty filled", empty, empty, fill=lambda tensor: tensor),
        stored(file, 3 * ELEMENTS),
    ]
    assert collect(jobs, nothing_to_hash(), memory_budget=memory_budget) == [
        data[:ELEMENTS],
        b"\x01" * ELEMENTS,
        bytes(255 - byte for byte in data[ELEMENTS : 2 * ELEMENTS]),
        b"",
        b"",
        b"\x02" * ELEMENTS,
        b"\x03" * ELEMENTS,
        b"",
        data[3 * ELEMENTS : 4 * ELEMENTS],
    ]


def most_in_flight(memory_budget: int, file: Path) -> int:
    """The largest number of tensors that were changed and not yet consumed, when the consumer is slow."""
    changed, consumed, most = 0, 0, 0
    lock = threading.Lock()

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal changed, most
        with lock:
            changed += 1
            most = max(most, changed - consumed)
        return tensor

    jobs = [stored(file, ELEMENTS * (number % 10), edit) for number in range(20)]
    with closing(stream(jobs, nothing_to_hash(), threads=2, memory_budget=memory_budget)) as pieces:
        for piece in pieces:
            time.sleep(0.002)
            with lock:
                consumed += 1
            piece.release()
    return most


def test_changed_tensors_stay_within_the_budget(file: Path) -> None:
    assert most_in_flight(3 * ELEMENTS, file) <= 3
    assert most_in_flight(ELEMENTS // 2, file) == 1, "a tensor larger than the budget travels alone"
    assert most_in_flight(100 * ELEMENTS, file) > 3, "the control: without a budget more are in flight"


class Counted(mmap.mmap):
    """Memory that keeps count of how much of it there is."""

    live = most = 0

    def __new__(cls, fileno: int, length: int, **options: int) -> Counted:
        Counted.live += length
        Counted.most = max(Counted.most, Counted.live)
        return super().__new__(cls, fileno, length, **options)

    def __del__(self) -> None:
        Counted.live -= len(self)


@pytest.mark.parametrize("held", [0, 1, 3])
@pytest.mark.parametrize("memory_budget", [1, 20_000, 1 << 20])
def test_what_is_filled_lies_ready_for_a_direct_write_until_it_is_released(
    held: int, memory_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are released late, as by a disk; until then nothing else is written into their memory."""
    monkeypatch.setattr(mmap, "mmap", Counted)
    Counted.most = 0
    sizes = [3000, 17_000, 1, 0, 4096, 9999, 5000] * 6
    specs = [TensorSpec("U8", (size,)) for size in sizes]
    begins = [8 + sum(sizes[:number]) for number in range(len(sizes))]
    jobs = [
        Job(f"{number}", spec, spec, fill=lambda tensor, number=number: tensor.fill_(number), begin=begin)  # type: ignore[misc]
        for number, (spec, begin) in enumerate(zip(specs, begins, strict=True))
    ]
    waiting: deque[tuple[int, Piece]] = deque()
    addresses = []

    def release() -> None:
        number, piece = waiting.popleft()
        assert bytes(piece.data) == bytes([number]) * sizes[number]
        piece.release()

    with closing(stream(jobs, nothing_to_hash(), threads=2, memory_budget=memory_budget)) as pieces:
        for number, begin in enumerate(begins):
            # What is held may fill the budget: then nothing more comes before it is released.
            while len(waiting) > held or sum(sizes[it] for it, _ in waiting) + sizes[number] > memory_budget // 2:
                if not waiting:
                    break
                release()
            piece = next(pieces)
            waiting.append((number, piece))
            if sizes[number]:
                addresses.append(torch.frombuffer(piece.data, dtype=torch.uint8).data_ptr())
                assert (addresses[-1] - begin) % ALIGNMENT == 0
        while waiting:
            release()
        assert next(pieces, None) is None
    # For the first two budgets much less than all tensors together; each takes up to a page more than its size.
    assert Counted.most <= max(memory_budget, max(sizes)) + ALIGNMENT * len(sizes)
    del piece, pieces
    assert Counted.live == 0


def test_what_is_filled_is_aligned_to_its_elements_even_where_its_file_is_not() -> None:
    addresses = []
    spec = TensorSpec("F64", (10,))

    def fill(tensor: torch.Tensor) -> None:
        addresses.append(tensor.data_ptr())
        tensor.fill_(1.0)

    jobs = [Job("t", spec, spec, fill=fill, begin=8005 + 80 * number) for number in range(3)]
    assert collect(jobs, nothing_to_hash()) == [torch.ones(10, dtype=torch.float64).numpy().tobytes()] * 3
    assert [address % 8 for address in addresses] == [0, 0, 0]


def test_an_error_in_a_worker_reaches_the_consumer_in_its_turn(file: Path) -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise CheckpointError("singular gauge")

    jobs = [stored(file, 0), stored(file, ELEMENTS, fail), stored(file, 2 * ELEMENTS)]
    seen = []
    with closing(stream(jobs, nothing_to_hash(), threads=1, memory_budget=1 << 20)) as pieces:
        seen.append(bytes(next(pieces).data))
        with pytest.raises(CheckpointError, match="singular gauge"):
            next(pieces)
    assert seen == [file.read_bytes()[:ELEMENTS]]


def test_an_error_of_the_reader_reaches_the_consumer(file: Path) -> None:
    with pytest.raises(CheckpointError, match="became shorter"):
        collect([stored(file, 10 * ELEMENTS)], nothing_to_hash())


@pytest.mark.parametrize(
    "result", [torch.zeros(ELEMENTS), torch.zeros(1, ELEMENTS, dtype=torch.uint8)], ids=["dtype", "shape"]
)
def test_a_result_of_another_kind_is_refused(result: torch.Tensor, file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 't0' became .* it must stay U8\[1000\]"):
        collect([stored(file, 0, lambda tensor: result)], nothing_to_hash())


def test_strides_and_gradients_do_not_matter() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    spec = TensorSpec("F32", (3, 2))
    job = Job("t", spec, spec, read=lambda: parameter.T)
    assert collect([job], nothing_to_hash()) == [torch.tensor([0.0, 3, 1, 4, 2, 5]).numpy().tobytes()]


def test_a_consumer_may_leave_early(file: Path) -> None:
    """The fixture sees that no thread outlives it, whatever each was waiting for."""
    for memory_budget in (1, 1 << 20):
        jobs = [stored(file, 0, lambda tensor: tensor) for _ in range(50)] + [stored(file, 0) for _ in range(50)]
        for steps in (0, 1, 60):
            with closing(stream(jobs, nothing_to_hash(), threads=2, memory_budget=memory_budget)) as pieces:
                for _ in range(steps):
                    next(pieces).release()


def test_input_hashes_are_those_of_whole_files(tmp_path: Path, file: Path) -> None:
    """Read in order, skipped, read twice, out of order, never: each file is hashed once from first byte to last."""
    other, unread, known = tmp_path / "other", tmp_path / "unread", tmp_path / "known"
    for path in (other, unread, known):
        path.write_bytes(file.read_bytes()[:5000] + path.name.encode())
    files = {path: path.name for path in (file, other, unread, known)}
    hashes = InputHashes(files, {known: FileRecord("known", 1, xxh3_128="trusted")})
    jobs = [
        stored(file, 100),
        stored(other, 3000, lambda tensor: tensor.zero_()),
        stored(file, 5000, lambda tensor: tensor.zero_()),
        stored(other, 0),
        stored(file, 5500),
        stored(known, 0),
    ]
    collect(jobs, hashes)

    assert hashes.records.pop(known).xxh3_128 == "trusted"
    assert hashes.records == {
        path: FileRecord(path.name, len(data := path.read_bytes()), xxh3_128=xxhash.xxh3_128_hexdigest(data))
        for path in (file, other, unread)
    }
