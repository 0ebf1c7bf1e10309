"""`tpt demo`: the whole road, small. Every stage is the command that a user would type, shown and then run.

    documents -> augment -> preprocess (two arms) -> experiment (train two arms on two ranks, evaluate, compare) -> export

Nothing here knows how a stage works: the demonstration writes the corpus, calls the commands, and points to the report.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.markup import escape

from tpt_megatron import commands
from tpt_megatron.demo import corpus
from tpt_megatron.errors import DataError
from tpt_megatron.files import write_text
from tpt_megatron.log import console

DOCUMENTS = 120_000  # so many that neither arm sees a document twice
PROBLEMS = 100
STEPS = 1500
CHECKPOINTS = 20
RANKS = 2
SEED = 1
TOKENS_A_STEP = 8 * 256
"""The recipe's global_batch_sequences and sequence_length."""
ARMS = ("vanilla", "append")

NOTES = (
    "A demonstration on made-up sums, with a model of 0.2 million parameters and {seeds} an arm. It shows the whole road, and how two arms are compared "
    "at equal training tokens. The thoughts are computed and always right, every document gets one, and only one raw document in twenty shows its work: "
    "so it shows nothing of how well a model would write thoughts, nor what happens on real text or at any larger scale. The moment at which learning sets "
    "in varies by seed. Each arm is cued in its own format to work before it answers."
)


def run_demo(output: Path, steps: int = STEPS, seeds: int = 1) -> None:
    """Run every stage into `output`; a demonstration that was interrupted there continues where it stopped.

    `steps` of training an arm: fewer make a quicker look, at which nothing need have been learnt. `seeds`: runs an arm; more may be asked for later.
    Raises DataError when `output` holds something else, and TptError when a stage fails (its own message is above).
    """
    _claim(output, f"{DOCUMENTS} documents, {PROBLEMS} problems, seed {SEED}, {steps} steps\n")
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
    commands.run(commands.tpt("augment", "demo-augment", f"input={documents}", f"output={output / 'augmented'}"))
    _title("Preprocess: the same documents as two arms, vanilla (document) and append (document, then thought)")
    datasets = output / "datasets"
    commands.run(commands.tpt("preprocess", "demo-preprocess", f"input={output / 'augmented'}", f"output={datasets}", f"tokenizer={tokenizer}"))
    _title(f"Experiment: train the two arms on megatron-core, {RANKS} ranks; score every checkpoint on held-out problems; compare")
    paths = [f"arms.{arm}.{split}={datasets / arm / split}" for arm in ARMS for split in ("train", "validation")]
    length = (f"tokens={steps * TOKENS_A_STEP}", f"checkpoints={min(CHECKPOINTS, steps)}", f"override={{optimizer.warmup_steps: {min(50, steps // 10)}}}")
    runs = (f"seeds={list(range(1, seeds + 1))}", f"ranks={RANKS}", commands.override("notes", _notes(seeds)))
    commands.run(
        commands.tpt("experiment", "demo-experiment", f"output={output}", *paths, *length, f"evaluate_with={{problems: {problems}}}", *runs), leave_out=runs[-1]
    )
    for arm in ARMS:
        model = output / "models" / arm
        if not model.exists():
            _title(f"Export: the {arm} arm")
            commands.run(commands.tpt("convert", "export", str(output / "runs" / f"{arm}-{steps * TOKENS_A_STEP}-seed1"), str(model)))
    console.print(f"\n[bold]What this shows.[/] {_notes(seeds)}")
    console.print(
        f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open {output / 'report-tokens' / 'report.html'}; the models are in {output / 'models'}."
    )


def _notes(seeds: int) -> str:
    return NOTES.format(seeds="one seed" if seeds == 1 else f"{seeds} seeds")


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
