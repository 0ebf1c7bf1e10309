"""`tpt preprocess` beside its peers, documents to Megatron's .bin and .idx: `python benchmarks/preprocess.py --help`.

Peers: Megatron-LM's tools/preprocess_data.py (one worker) and tools/preprocess_data_fast.py, and datatrove's MegatronDocumentTokenizer (one task).
All read the same JSONL with the same tokenizer, a byte-level BPE with Llama 3's pattern that is trained here. The corpus is the text that Python
environments and /usr/share/doc hold, in an order that a fixed seed shuffles; a second, smaller one is its beginning. Texts that spell the
end-of-document token are left out, for there the tools differ: to tpt it is text, to the peers a token. What is measured, of the whole command,
start-up included, in rounds that go through all tools in turn:

    CPU s      user and system time of every process of the tree, orphans included (they are adopted and waited for)
    wall s     from start to the end of the command; on a busy machine the weaker figure
    tree MB    peak of the sum over the tree of proportional set sizes (PSS), sampled every quarter second
    process MB the largest resident set that any single process of the tree had, as the kernel counts it

MB are 10^6 bytes. Everything is kept in the work folder, and used again: the corpus, the tokenizer, an environment with the peers. The Megatron-LM scripts
are in no package, so they need --megatron-lm, a checkout; a folder with just tools/ does too, for megatron-core's wheel carries megatron.training from
0.17 on (it needs Python 3.12: --peer-python). A checkout's own megatron/ goes before the wheel's. For torch's smaller CPU build, set PIP_FIND_LINKS or
PIP_EXTRA_INDEX_URL to where it lies, and --torch to its version.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

MB = 1_000_000
SEED = 20_251_123
SUFFIXES = (".py", ".md", ".rst", ".txt", ".json")
SMALLEST_FILE, LARGEST_FILE = 200, 1_000_000
VOCABULARY = 32_768
TRAINING_BYTES = 20 * MB
END = "<|endoftext|>"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of Llama 3's tokenizer.json
MEGATRON_CORE = "megatron-core==0.19.2"
MEGATRON_CORE_PYTHON = (3, 12)
INDEX_HEADER = struct.Struct("<9sQBQQ")
SHORT_DOCUMENTS = 5_000_000
LONG_DOCUMENT_BYTES = 100 * MB
PR_SET_CHILD_SUBREAPER = 36
DATATROVE_SCRIPT = """\
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer

folder, name, output, tokenizer, end = sys.argv[1:]
if __name__ == "__main__":
    steps = [JsonlReader(folder, glob_pattern=name), MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=end)]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=output + "/logs").run()
"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A command that turns a corpus (first argument) into PREFIX.bin and PREFIX.idx below an output folder (second)."""

    name: str
    command: Callable[[Path, Path], list[str]]
    prefix: str
    python_path: Path | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one run cost; see the docstring of this file."""

    cpu_s: float
    wall_s: float
    tree_mb: float
    process_mb: float


def main() -> None:
    given = parse_arguments()
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    settings = describe_machine(given)
    print(f"# tpt preprocess and its peers\n\n{settings['date']}, {settings['cpu']}, {settings['cores']} cores\n\n    {settings['command']}\n", flush=True)
    full, small, corpus = prepare_corpus(given)
    print(f"Corpus: {corpus['documents']:,} documents, {corpus['bytes'] / MB:.1f} MB of JSONL, SHA-256 {corpus['sha256'][:16]}; by kind, in MB: "
          + ", ".join(f"{kind} {size / MB:.1f}" for kind, size in corpus["by_kind"].items()))  # fmt: skip
    tokenizer = prepare_tokenizer(work / f"tokenizer-{corpus['sha256'][:8]}", full)
    peers = {} if given.no_peers else prepare_peers(given)
    settings["versions"] = versions_of(python_of(given.tpt), ("tpt-megatron", "tokenizers", "fastokens")) | {f"peers: {k}": v for k, v in peers.items()}
    print("Versions: " + ", ".join(f"{name} {version}" for name, version in settings["versions"].items()) + "\n", flush=True)
    bench = Bench(work, tokenizer, given)
    tools, absent = bench.tools(with_peers=not given.no_peers)
    for line in absent:
        print(f"Not measured: {line}.\n")
    figures: dict[str, Any] = {"settings": settings, "corpus": corpus, "not_measured": absent, "runs": {}, "equality": {}}
    for path in [small] if given.quick else [small, full]:
        runs, equal = bench.compare(tools, path, given.rounds)
        figures["runs"][path.stem] = {name: [asdict(usage) for usage in usages] for name, usages in runs.items()}
        figures["equality"][path.stem] = equal
    if given.scaling:
        figures["scaling"] = bench.scaling(full, given.scaling, given.rounds)
    if given.memory:
        figures["memory"] = bench.memory(full)
    (work / "figures.json").write_text(json.dumps(figures, indent=1))
    print(f"All figures: {work / 'figures.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tpt-preprocess-benchmark", help="folder for everything, kept")
    parser.add_argument("--megabytes", type=int, default=167, help="of JSONL, the large corpus")
    parser.add_argument("--small-megabytes", type=int, default=26, help="of JSONL, its beginning")
    parser.add_argument("--sources", type=Path, nargs="+", action="extend", default=[], help="further folders to take text from")
    parser.add_argument("--gsm8k", type=Path, nargs="+", default=[], help="JSONL files with `question` and `answer`, one document a line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the small corpus only")
    parser.add_argument("--scaling", type=int, default=0, metavar="MEGABYTES", help="compare one and two workers on a corpus of this size (default: do not)")
    parser.add_argument("--memory", action="store_true", help="also measure tpt's memory with very many, and with very long, documents")
    parser.add_argument("--tpt", type=Path, default=Path(sys.executable).parent / "tpt", help="the executable (default: the one beside this Python)")
    parser.add_argument("--workers", type=int, default=1, help="tpt's `workers` in the comparison, where it knows that setting")
    parser.add_argument("--no-peers", action="store_true", help="measure tpt alone")
    parser.add_argument("--megatron-lm", type=Path, help="checkout of Megatron-LM, for tools/preprocess_data.py and tools/preprocess_data_fast.py")
    parser.add_argument("--megatron-lm-fast", type=Path, help="another one for tools/preprocess_data_fast.py (default: the same)")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="the interpreter for the peers' environment (default: this one)")
    parser.add_argument("--torch", default="torch", help="what pip is to install as torch for the peers")
    given = parser.parse_args()
    if not given.tpt.is_file():
        parser.error(f"{given.tpt} does not exist: give --tpt, or use the Python of the environment that tpt is installed in")
    given.work = given.work.resolve()
    given.megatron_lm_fast = given.megatron_lm_fast or given.megatron_lm
    return given


# --- corpus and tokenizer ---


def prepare_corpus(given: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """Write the two corpora, unless they are there with the same settings; return their paths and what is in the large one."""
    full, small, about = given.work / f"{given.megabytes}mb.jsonl", given.work / f"{given.small_megabytes}mb.jsonl", given.work / "corpus.json"
    folders = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"]), Path("/usr/share/doc"), *given.sources]
    settings = {
        "seed": SEED,
        "without": END,
        "megabytes": [given.small_megabytes, given.megabytes],
        "sources": [str(path) for path in [*folders, *given.gsm8k]],
    }
    if about.exists() and full.exists() and small.exists() and (known := json.loads(about.read_text()))["settings"] == settings:
        return full, small, known
    about.unlink(missing_ok=True)
    written = documents = 0
    by_kind: dict[str, int] = {}
    digest, small_ends = hashlib.sha256(), 0
    with open(full, "wb") as file:
        for kind, text in read_texts(list_candidates(folders, given.gsm8k)):
            line = json.dumps({"id": f"d{documents:07}", "text": text, "source": kind}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            documents, written = documents + 1, written + len(line)
            by_kind[kind] = by_kind.get(kind, 0) + len(line)
            if not small_ends and written >= given.small_megabytes * MB:
                small_ends = written
            if written >= given.megabytes * MB:
                break
    if written < given.megabytes * MB:
        sys.exit(
            f"the sources hold {written / MB:.1f} MB of distinct text, not {given.megabytes}: name more folders with --sources, or ask for fewer --megabytes"
        )
    copy_beginning(full, small, small_ends)
    known = {"settings": settings, "documents": documents, "bytes": written, "by_kind": dict(sorted(by_kind.items())), "sha256": digest.hexdigest()}
    about.write_text(json.dumps(known, indent=1))
    return full, small, known


def list_candidates(folders: list[Path], gsm8k: list[Path]) -> list[tuple[str, int]]:
    """Return (path, line) of every possible document in a shuffled order; the line is -1 where the file is one document."""
    found: set[tuple[str, int]] = set()
    for folder in folders:
        for parent, _, names in os.walk(folder):
            found.update((os.path.join(parent, name), -1) for name in names if name.endswith(SUFFIXES))
    for path in gsm8k:
        with open(path, "rb") as file:
            found.update((str(path), number) for number, _ in enumerate(file))
    candidates = sorted(found)
    random.Random(SEED).shuffle(candidates)
    return candidates


def read_texts(candidates: list[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of those that are fit to use, no text twice, and none that spells the end-of-document token."""
    questions = {path: Path(path).read_text().splitlines() for path, line in candidates if line == 0}
    seen: set[bytes] = set()
    for path, line in candidates:
        if line >= 0:
            record = json.loads(questions[path][line])
            kind, data = "gsm8k", f"{record['question']}\n{record['answer']}".encode()
        elif os.path.islink(path) or not SMALLEST_FILE <= os.stat(path).st_size <= LARGEST_FILE:
            continue
        else:
            kind, data = Path(path).suffix[1:], Path(path).read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest in seen or b"\0" in data or END.encode() in data:
            continue
        seen.add(digest)
        try:
            yield kind, data.decode()
        except UnicodeDecodeError:
            continue


def copy_beginning(source: Path, target: Path, size: int) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        while size > 0 and (block := read.read(min(size, MB))):
            write.write(block)
            size -= len(block)


def prepare_tokenizer(folder: Path, corpus: Path) -> Path:
    """Fill and return a folder with tokenizer.json and the config that lets transformers load it, trained on the corpus's beginning unless it is there."""
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(exist_ok=True)
        # In a process of its own: its memory would else count as the runs' own, for the kernel lets a child inherit its parent's peak.
        process = multiprocessing.get_context("fork").Process(target=train_tokenizer, args=(corpus, folder / "tokenizer.json"))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit("training the tokenizer failed")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 10**30}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    print(f"Tokenizer: byte-level BPE, {VOCABULARY:,} tokens, SHA-256 {sha256_of(folder / 'tokenizer.json')[:16]}", flush=True)
    return folder


def train_tokenizer(corpus: Path, path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts_of(corpus, TRAINING_BYTES), trainer)
    tokenizer.save(str(path))


def texts_of(corpus: Path, size: int) -> Iterator[str]:
    """Yield texts from a corpus's beginning, until their lines make `size` bytes."""
    with open(corpus, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]
            size -= len(line)
            if size <= 0:
                return


# --- the peers' environment ---


def prepare_peers(given: argparse.Namespace) -> dict[str, str]:
    """Install the peers into an environment of their own, unless they are; return their versions."""
    wanted = ["datatrove", "orjson", "tokenizers"]
    if given.megatron_lm or given.megatron_lm_fast:
        check_peer_python(given.peer_python)
        wanted += [given.torch, MEGATRON_CORE, "transformers", "numpy", "omegaconf"]
    if given.megatron_lm_fast:
        wanted += ["gigatoken", "awkward"]
    environment = given.work / "peers-venv"
    python, done = environment / "bin" / "python", environment / "installed.json"
    if not done.exists() or json.loads(done.read_text()) != wanted:
        if not python.exists():
            run_quietly([str(given.peer_python), "-m", "venv", str(environment)])
        run_quietly([str(python), "-m", "pip", "install", "--quiet", *wanted])
        done.write_text(json.dumps(wanted))
    return versions_of(python, ("datatrove", "tokenizers", "megatron-core", "transformers", "torch", "gigatoken"))


def check_peer_python(python: Path) -> None:
    said = run_quietly([str(python), "-c", "import sys; print(*sys.version_info[:2])"])
    if tuple(map(int, said.split())) < MEGATRON_CORE_PYTHON:
        sys.exit(f"{MEGATRON_CORE} needs Python {'.'.join(map(str, MEGATRON_CORE_PYTHON))} or newer, {python} is older: give --peer-python")


def versions_of(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    code = "import importlib.metadata as m, json, sys; have = {d.name.lower(): d.version for d in m.distributions()}; "
    code += "print(json.dumps({'python': sys.version.split()[0]} | {n: have[n] for n in sys.argv[1:] if n in have}))"
    found: dict[str, str] = json.loads(run_quietly([str(python), "-c", code, *names]))
    return found


def python_of(executable: Path) -> Path:
    """Return the interpreter of the environment that an executable is in; this one where there is none beside it."""
    beside = executable.parent / "python"
    return beside if beside.exists() else Path(sys.executable)


def run_quietly(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def describe_machine(given: argparse.Namespace) -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "rounds": given.rounds,
    }


# --- measuring ---


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own, so that its time is counted and its end waited for."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")


def measure(command: list[str], log: Path, python_path: Path | None) -> Usage | None:
    """Run a command and all that it starts to the end; None if it failed, with what it said in `log`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {})
    cpu_s = wall_s = tree_bytes = process_bytes = next_sample = 0.0
    with open(log, "wb") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=log.parent)
        while True:
            try:
                ended, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            now = time.perf_counter() - start
            if ended == 0:
                if now >= next_sample:
                    tree_bytes = max(tree_bytes, tree_pss())
                    took = time.perf_counter() - start - now
                    next_sample = now + max(0.25, 100 * took)  # what measures must not take a core from what is measured
                time.sleep(0.01)
                continue
            cpu_s += usage.ru_utime + usage.ru_stime
            process_bytes = max(process_bytes, usage.ru_maxrss * 1024)
            if ended == process.pid:
                process.returncode, wall_s = os.waitstatus_to_exitcode(status), now
    return None if process.returncode else Usage(cpu_s, wall_s, tree_bytes / MB, process_bytes / MB)


def tree_pss() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, ProcessLookupError):
            continue
    return total


class Bench:
    """The tools, and the comparisons made with them."""

    def __init__(self, work: Path, tokenizer: Path, given: argparse.Namespace) -> None:
        self.work, self.tokenizer, self.given = work, tokenizer, given
        self.knows_workers = self._tpt_knows_workers()
        if not self.knows_workers:
            print("This tpt has no setting `workers`: it is run without.\n")

    def tools(self, with_peers: bool) -> tuple[list[Tool], list[str]]:
        """Return the tools that can be measured, tpt first, and a line for each peer that cannot."""
        tools, absent = [self.tpt(self.given.workers)], []
        if not with_peers:
            return tools, ["the peers, because of --no-peers"]
        python, json_file = self.work / "peers-venv" / "bin" / "python", self.tokenizer / "tokenizer.json"
        for name, checkout, options in (
            ("preprocess_data.py", self.given.megatron_lm, ["--workers", "1"]),
            ("preprocess_data_fast.py", self.given.megatron_lm_fast, ["--use-gigatoken"]),
        ):
            script = checkout.resolve() / "tools" / name if checkout else None
            if script is None or not script.is_file():
                absent.append(f"Megatron-LM's tools/{name}, {f'not in {checkout}' if checkout else 'for want of --megatron-lm'}")
                continue
            tools.append(self._megatron(python, script, options))
        script = self.work / "run_datatrove.py"
        script.write_text(DATATROVE_SCRIPT)
        arguments = [str(json_file), END]
        tools.append(
            Tool("datatrove, 1 task", lambda corpus, out: [str(python), str(script), str(corpus.parent), corpus.name, str(out), *arguments], "00000_tokens")
        )
        return tools, absent

    def _megatron(self, python: Path, script: Path, options: list[str]) -> Tool:
        checkout = script.parent.parent
        options = [*options, "--append-eod", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer)]
        return Tool(
            f"Megatron-LM {script.name}",
            lambda corpus, out: [str(python), str(script), "--input", str(corpus), "--output-prefix", str(out / "m"), *options],
            "m_text_document",
            checkout if (checkout / "megatron" / "core").is_dir() else None,
        )

    def tpt(self, workers: int) -> Tool:
        """Return tpt, with that many workers where it knows the setting."""

        def command(corpus: Path, out: Path) -> list[str]:
            config = {
                "input": str(corpus),
                "output": str(out),
                "tokenizer": str(self.tokenizer / "tokenizer.json"),
                "arms": ["vanilla"],
                "end_of_document": END,
            }
            path = self.work / f"config-{workers}.yaml"
            path.write_text(json.dumps(config | ({"workers": workers} if self.knows_workers else {})))
            return [str(self.given.tpt), "preprocess", str(path)]

        return Tool(f"tpt, workers={workers}" if self.knows_workers else "tpt", command, "vanilla/train")

    def _tpt_knows_workers(self) -> bool:
        corpus = self.work / "one.jsonl"
        corpus.write_text(json.dumps({"id": "0", "text": "One document.", "source": "made-up"}) + "\n")
        for known in (True, False):
            self.knows_workers = known
            if self.run(self.tpt(1), corpus, "probe", may_fail=True):
                return known
        sys.exit(f"tpt cannot preprocess one document:\n{(self.work / 'probe.log').read_text()[-3000:]}")

    def run(self, tool: Tool, corpus: Path, name: str, may_fail: bool = False) -> Usage | None:
        """Run a tool once into the folder `name`, which is emptied first."""
        output, log = self.work / name, self.work / f"{name}.log"
        shutil.rmtree(output, ignore_errors=True)
        if not tool.name.startswith("tpt"):
            output.mkdir()
        os.sync()
        usage = measure(tool.command(corpus, output), log, tool.python_path)
        if usage is None and not may_fail:
            sys.exit(f"{tool.name} failed on {corpus.name}:\n{log.read_text(errors='replace')[-3000:]}")
        return usage

    def compare(self, tools: list[Tool], corpus: Path, rounds: int) -> tuple[dict[str, list[Usage]], dict[str, Any]]:
        """Run all tools in turn, `rounds` times; print a table and whether their tokens are the same."""
        runs = self.rounds(tools, corpus, rounds)
        print(f"## {corpus.name}, {corpus.stat().st_size / MB:.1f} MB, medians of {rounds} rounds\n")
        print_table(runs)
        equal = {tool.name: describe_output(self.work / output_name(number) / tool.prefix) for number, tool in enumerate(tools)}
        ours = equal[tools[0].name]
        print(f"tpt wrote {ours['documents']:,} documents, {ours['tokens']:,} tokens.", end=" ")
        for tool in tools[1:]:
            theirs = equal[tool.name]
            same = {part: "yes" if theirs[part] == ours[part] else "NO" for part in ("bin", "idx")}
            counts = "" if set(same.values()) == {"yes"} else f" ({theirs['documents']:,} documents, {theirs['tokens']:,} tokens)"
            print(f"Same bytes as {tool.name}: .bin {same['bin']}, .idx {same['idx']}{counts}.", end=" ")
        print("\n", flush=True)
        return runs, equal

    def rounds(self, tools: list[Tool], corpus: Path, rounds: int) -> dict[str, list[Usage]]:
        """Run each tool once a round; the number of a tool names its output folder."""
        runs: dict[str, list[Usage]] = {tool.name: [] for tool in tools}
        for _ in range(rounds):
            for number, tool in enumerate(tools):
                usage = self.run(tool, corpus, output_name(number))
                assert usage is not None
                runs[tool.name].append(usage)
        return runs

    def scaling(self, base: Path, megabytes: int, rounds: int) -> dict[str, Any]:
        """Compare one worker and two on a corpus that repeats the base."""
        print(f"## One worker and two, {megabytes} MB: the corpus over and over, each text with its document's number appended\n")
        if not self.knows_workers:
            print("Not measured: this tpt has no setting `workers`.\n")
            return {}
        corpus = self.work / "scaling.jsonl"
        write_repeated(base, corpus, megabytes * MB)
        tools = [self.tpt(1), self.tpt(2)]
        runs = self.rounds(tools, corpus, rounds)
        print_table(runs)
        one, two = (describe_output(self.work / output_name(number) / "vanilla" / "train") for number in range(2))
        ratio = median(runs[tools[0].name], "wall_s") / median(runs[tools[1].name], "wall_s")
        print(f"Two workers take 1/{ratio:.2f} of one's wall time; same bytes: {'yes' if one == two else 'NO'}.\n", flush=True)
        return {name: [asdict(usage) for usage in usages] for name, usages in runs.items()} | {"wall_ratio": ratio, "same_bytes": one == two}

    def memory(self, base: Path) -> dict[str, Any]:
        """Measure tpt's memory, with one worker, on inputs that are hard on it."""
        print("## Memory of tpt, one worker\n\n| input | documents | tokens | CPU s | wall s | tree MB | process MB |\n|---|---|---|---|---|---|---|")
        found: dict[str, Any] = {}
        for name, write in (("many short documents", write_short), ("one ASCII document", write_ascii), ("one document with other scripts", write_mixed)):
            corpus = self.work / "memory.jsonl"
            write(base, corpus)
            usage = self.run(self.tpt(1), corpus, "memory", may_fail=True)
            if usage is None:
                print(f"| {name}, {corpus.stat().st_size / MB:.0f} MB | failed: {(self.work / 'memory.log').read_text()[-300:].strip()!r} |||||")
                found[name] = None
                continue
            output = describe_output(self.work / "memory" / "vanilla" / "train")
            figures = f"{usage.cpu_s:.1f} | {usage.wall_s:.1f} | {usage.tree_mb:,.0f} | **{usage.process_mb:,.0f}** |"
            print(f"| {name}, {corpus.stat().st_size / MB:.0f} MB | {output['documents']:,} | {output['tokens']:,} | {figures}", flush=True)
            found[name] = asdict(usage) | {"documents": output["documents"], "tokens": output["tokens"]}
        corpus.unlink()
        print()
        return found


# --- inputs for scaling and memory ---


def write_repeated(base: Path, path: Path, size: int) -> None:
    number = 0
    with open(path, "wb") as file:
        while True:
            for text in texts_of(base, base.stat().st_size):
                file.write(json.dumps({"id": f"d{number}", "text": f"{text}\n{number}", "source": "repeated"}, ensure_ascii=False).encode() + b"\n")
                number += 1
                if file.tell() >= size:
                    return


def write_short(_: Path, path: Path) -> None:
    with open(path, "w") as file:
        for number in range(SHORT_DOCUMENTS):
            file.write(f'{{"id": "{number}", "text": "The {number}th is worth {number * 7919 % 1_000_003}, all told."}}\n')


def write_ascii(base: Path, path: Path) -> None:
    write_long(base, path, "")


def write_mixed(base: Path, path: Path) -> None:
    write_long(base, path, "\nGröße, naïve, Привет, 数学の本, 🙂 and 👩‍🚀.\n")


def write_long(base: Path, path: Path, inserted: str) -> None:
    """Write one document of LONG_DOCUMENT_BYTES, of the corpus's ASCII texts from the beginning, with something inserted after every 1,000 characters."""
    size = 0
    with open(path, "wb") as file:
        file.write(b'{"id": "0", "source": "made-up", "text": "')
        while size < LONG_DOCUMENT_BYTES:
            for text in filter(str.isascii, texts_of(base, base.stat().st_size)):
                piece = "".join(text[at : at + 1000] + inserted for at in range(0, len(text), 1000))
                file.write(json.dumps(piece, ensure_ascii=False)[1:-1].encode())
                size += len(piece.encode())
                if size >= LONG_DOCUMENT_BYTES:
                    break
        file.write(b'"}\n')


# --- results ---


def output_name(number: int) -> str:
    return f"out-{number}"


def describe_output(prefix: Path) -> dict[str, Any]:
    """Return the counts in a dataset's index, and the checksums of its files."""
    index, tokens = prefix.with_name(f"{prefix.name}.idx"), prefix.with_name(f"{prefix.name}.bin")
    with open(index, "rb") as file:
        _, _, code, sequences, _ = INDEX_HEADER.unpack(file.read(INDEX_HEADER.size))
    size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    return {"documents": sequences, "tokens": tokens.stat().st_size // size, "bin": sha256_of(tokens), "idx": sha256_of(index)}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def median(usages: list[Usage], field: str) -> float:
    return float(statistics.median(getattr(usage, field) for usage in usages))


def print_table(runs: dict[str, list[Usage]]) -> None:
    """Print medians, CPU seconds with their range, and how many times as much as the first tool each takes."""
    first = next(iter(runs.values()))
    print("| tool | CPU s | range | times | wall s | times | tree MB | times | process MB |\n|---|---|---|---|---|---|---|---|---|")
    for name, usages in runs.items():
        cpu, wall, tree, process = (median(usages, field) for field in ("cpu_s", "wall_s", "tree_mb", "process_mb"))
        times = [value / median(first, field) for value, field in ((cpu, "cpu_s"), (wall, "wall_s"), (tree, "tree_mb"))]
        spread = f"{min(usage.cpu_s for usage in usages):.1f} to {max(usage.cpu_s for usage in usages):.1f}"
        print(f"| {name} | {cpu:.1f} | {spread} | {times[0]:.2f} | {wall:.1f} | {times[1]:.2f} | {tree:,.0f} | {times[2]:.2f} | {process:,.0f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
