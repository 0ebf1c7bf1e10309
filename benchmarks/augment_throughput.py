"""How fast one worker of `tpt augment` drives a server, and with how much memory: `python benchmarks/augment_throughput.py`.

The server answers every request after 5 ms with a thought of some 60 words, in a process of its own, pinned to the second
core; the worker, pinned to the first, does everything that a run does: it cuts documents with a tokenizer, fills the
prompt, asks, checks the thoughts, journals, and writes Parquet. Figures are of the whole command, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.support.scripted_server import running_server  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 40_000], help="sizes of the corpora, one run each")
    parser.add_argument("--words", type=int, default=200, help="of a document; one of more than 2,048 bytes has to be tokenised to be cut")
    parser.add_argument("--reply-ms", type=float, default=5)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="augment-throughput-"))
    try:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[-1]})  # the server inherits it
        with running_server(reply_ms=given.reply_ms) as server:
            for documents in given.documents:
                corpus = folder / f"{documents}.jsonl"
                characters = write_corpus(corpus, documents, given.words)
                make_tokenizer(corpus, folder / "tokenizer.json")
                for _ in range(given.rounds):
                    measure(folder, corpus, documents, characters, server.url, given.concurrency, cores[0])
    finally:
        shutil.rmtree(folder)


def write_corpus(path: Path, documents: int, length: int) -> float:
    """Write documents of `length` words, no two alike; return their mean length in characters."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    total = 0
    with open(path, "w") as file:
        for _ in range(documents):
            sentences = [" ".join(draw.choices(words, k=10)).capitalize() + "." for _ in range(length // 10)]
            text = " ".join(sentences)
            total += len(text)
            file.write(json.dumps({"text": text, "source": "made-up"}) + "\n")
    return total / documents


def make_tokenizer(corpus: Path, path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    with open(corpus) as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(200), strict=False)]
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    tokenizer.save(str(path))


def measure(folder: Path, corpus: Path, documents: int, characters: float, url: str, concurrency: int, core: int) -> None:
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    config = {
        "input": str(corpus),
        "output": str(output),
        "generator": {
            "kind": "openai",
            "model": "scripted",
            "base_urls": url,
            "tokenizer": str(folder / "tokenizer.json"),
            "concurrency": {"initial": min(64, concurrency), "maximum": concurrency},
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-m", "tpt_megatron.cli", "augment", str(folder / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    said, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    if counts["thoughts"] + counts["rejected_thoughts"] != documents:
        sys.exit(f"{documents} documents went in, the run says: {said}")
    elapsed = json.loads((output / "manifest.json").read_text())["details"]["elapsed_s"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rate, steady = documents / seconds, documents / elapsed
    print(f"{documents} documents of {characters:.0f} characters: {rate:.0f} documents/s with start-up ({seconds:.1f} s), {steady:.0f} at work;", end=" ")
    print(f"{1000 * cpu / documents:.2f} ms of CPU a document; largest resident size so far {after.ru_maxrss / 1024:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
