"""What it costs to know which documents a training sequence is made of: `python benchmarks/sample_index.py [--documents 100000000]`.

Lengths are drawn from a lognormal distribution (median 400 tokens, mean about 730; a few over 100,000) into a file of int32, which is
mapped as a dataset's index is. For each packing, on one core:

    ready         seconds, and seconds of CPU time, until the first sequence is known: the pass over the lengths, and one block
    next          milliseconds a sequence, on average, of those that follow, as a run reads them
    jump          seconds to a sequence far away in the same epoch, as a run that resumes reads it, without the pass
    private MB    peak of this process's own memory above what it was before, sampled every 20 ms; 1 MB is 10^6 bytes
    resident MB   peak of all that is resident, pages of the mapped file included, which ranks of one machine share

and of best_fit, how much of the sequences is padding.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from tpt_megatron.sequences.packing import BestFit, Concatenated, Packing

MB = 1_000_000
CHUNK = 1 << 20


class Peak:
    """Samples this process's memory while it is entered."""

    def __init__(self) -> None:
        self.private = self.resident = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._before = _memory()[0]

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            private, resident = _memory()
            self.private, self.resident = max(self.private, private - self._before), max(self.resident, resident)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


def _memory() -> tuple[int, int]:
    """Return private and all resident bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, resident = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return private, resident


def write_lengths(path: Path, documents: int) -> None:
    """Write the lengths of so many documents."""
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        for begin in range(0, documents, CHUNK):
            drawn = random.lognormal(np.log(400), 1.1, min(CHUNK, documents - begin))
            file.write(np.clip(drawn, 2, 1_000_000).astype("<i4").tobytes())


def measure(name: str, make: type[Concatenated] | type[BestFit], lengths: np.ndarray, sequence_length: int, following: int) -> None:
    with Peak() as peak:
        began, cpu = time.perf_counter(), time.process_time()
        packing: Packing = BestFit(lengths, sequence_length, 1, "cut") if make is BestFit else Concatenated(lengths, sequence_length, 1)
        packing.spans(0)
        ready, cpu = time.perf_counter() - began, time.process_time() - cpu
        began = time.perf_counter()
        for number in range(1, following + 1):
            packing.spans(number)
        after = (time.perf_counter() - began) / following
        began = time.perf_counter()
        packing.spans(packing.sequences_per_epoch // 2 + 12_345)
        jump = time.perf_counter() - began
    held = packing.sequences_per_epoch
    padding = 1 - float(lengths.sum(dtype=np.int64)) / (held * (sequence_length + 1)) if make is BestFit else 0.0
    print(
        f"{name:12} ready {ready:6.2f} s ({cpu:.2f} s CPU)   next {1000 * after:7.3f} ms   jump {jump:6.3f} s   private {peak.private / MB:7.1f} MB   "
        f"resident {peak.resident / MB:7.1f} MB   {held:,} sequences, {padding:.3%} padding",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--following", type=int, default=2000, help="sequences read after the first")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths"
        writer = multiprocessing.Process(target=write_lengths, args=(path, args.documents))  # whose memory is not ours
        writer.start()
        writer.join()
        lengths = np.memmap(path, "<i4", mode="r")
        print(f"{args.documents:,} documents, {int(lengths.sum(dtype=np.int64)):,} tokens, sequences of {args.sequence_length}")
        for name, make in (("concatenate", Concatenated), ("best_fit", BestFit)):
            measure(name, make, lengths, args.sequence_length, args.following)


if __name__ == "__main__":
    main()
