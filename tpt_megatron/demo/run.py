"""`tpt demo`: the whole road, small. Every stage is the command that a user would type, shown and then run.

    documents -> augment -> preprocess (two arms) -> train (two arms, two ranks) -> export -> evaluate -> compare

Nothing here knows how a stage works: the demonstration writes the corpus, calls the commands, and points to the report.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.markup import escape

from tpt_megatron.demo import corpus
from tpt_megatron.errors import DataError, Stopped, TptError
from tpt_megatron.files import write_text
from tpt_megatron.log import console

DOCUMENTS = 120_000  # so many that neither arm sees a document twice
PROBLEMS = 100
STEPS = 1500
CHECKPOINTS = 20
RANKS = 2
SEED = 1

NOTES = (
    "A demonstration on made-up sums, with a model of 0.2 million parameters and one seed an arm. It shows the whole road, and how two arms are compared "
    "at equal training tokens. The thoughts are computed and always right, every document gets one, and only one raw document in twenty shows its work: "
    "so it shows nothing of how well a model would write thoughts, nor what happens on real text or at any larger scale. The moment at which learning sets "
    "in varies by seed. Each arm is cued in its own format to work before it answers."
)


def run_demo(output: Path, steps: int = STEPS) -> None:
    """Run every stage into `output`; a demonstration that was interrupted there continues where it stopped.

    `steps` of training an arm: fewer make a quicker look, at which nothing need have been learnt. Raises DataError when
    `output` holds something else, and TptError when a stage fails (its own message is above).
    """
    _claim(output, f"{DOCUMENTS} documents, {PROBLEMS} problems, seed {SEED}, {steps} steps\n")
    interval = max(1, steps // CHECKPOINTS)
    every = (f"checkpoint.every_steps={interval}", f"validate_every_steps={interval}", f"watch.log_every_steps={interval}")
    schedule = (f"steps={steps}", *every, f"optimizer.warmup_steps={min(50, steps // 10)}")
    began = time.monotonic()
    console.print("[bold]Thinking-augmented pretraining, small:[/] two arms, the same documents, equal training tokens. Some minutes on two cores.")
    documents, problems, tokenizer = output / "documents.jsonl", output / "problems.jsonl", output / "tokenizer.json"
    _title("Documents: short sums; 5 % show their work, 30 % have no answer")
    if not documents.exists():
        corpus.write_problems(problems, PROBLEMS, SEED)
        corpus.write_tokenizer(tokenizer)
        corpus.write_corpus(documents, DOCUMENTS, SEED, corpus.read_statements(problems))
    console.print(f"{DOCUMENTS:,} documents in {documents}, {PROBLEMS} held-out problems in {problems}")
    _title("Augment: a worked thought about every document")
    _tpt("augment", "demo-augment", f"input={documents}", f"output={output / 'augmented'}")
    _title("Preprocess: the same documents as two arms, vanilla (document) and append (document, then thought)")
    _tpt("preprocess", "demo-preprocess", f"input={output / 'augmented'}", f"output={output / 'datasets'}", f"tokenizer={tokenizer}")
    runs = {arm: output / "runs" / arm for arm in ("vanilla", "append")}
    for arm, run_dir in runs.items():
        _title(f"Train: the {arm} arm on megatron-core, {RANKS} ranks")
        data = output / "datasets" / arm
        _torchrun("train", "demo-train", f"run_dir={run_dir}", f"data.train={data / 'train'}", f"data.validation={data / 'validation'}", *schedule)
    for arm, run_dir in runs.items():
        _title(f"Export and evaluate: the {arm} arm, every checkpoint, on held-out problems")
        model = output / "models" / arm
        if not model.exists():
            _tpt("convert", "export", str(run_dir), str(model))
        _tpt("evaluate", f"demo-evaluate-{arm}", f"run_dir={run_dir}", f"problems={problems}")
    _title("Compare")
    _tpt("compare", *map(str, runs.values()), "--output", str(output / "report"), "--notes", NOTES)
    console.print(f"\n[bold]What this shows.[/] {NOTES}")
    console.print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open {output / 'report' / 'report.html'}; the models are in {output / 'models'}.")


def _claim(output: Path, about: str) -> None:
    """Mark `output` as the folder of this demonstration; DataError when it holds another one, or something else."""
    marker = output / ".tpt-demo"
    if output.exists() and not marker.exists() and any(output.iterdir()):
        raise DataError(f"{output}: the folder is not empty and not a demonstration's; give --output another folder")
    if marker.exists() and marker.read_text() != about:
        raise DataError(f"{output}: holds a demonstration of {marker.read_text().strip()}, not of {about.strip()}; remove it or give --output another folder")
    write_text(marker, about)


def _title(text: str) -> None:
    console.print(f"\n[bold cyan]{escape(text)}[/]")


def _tpt(*arguments: str) -> None:
    _run(["tpt", *arguments], [sys.executable, "-m", "tpt_megatron.cli", *arguments])


def _torchrun(*arguments: str) -> None:
    launcher = ["--standalone", f"--nproc-per-node={RANKS}", "--module", "tpt_megatron.cli", *arguments]
    _run(["torchrun", *launcher], [sys.executable, "-m", "torch.distributed.run", *launcher])


def _run(shown: list[str], command: list[str]) -> None:
    """Print a command as a user would type it, then run it; TptError when it fails."""
    line = shlex.join([argument if argument != NOTES else "..." for argument in shown])
    console.print(f"$ {line}", style="dim", markup=False, highlight=False)
    # One thread a process: two ranks on two cores are slower when each starts more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except Stopped:
        process.terminate()
        process.wait()  # it saves first
        raise
    if code != 0:
        raise TptError(f"the demonstration stopped: `{line}` ended with exit code {code}; its message is above")
