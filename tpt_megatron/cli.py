"""The command line: reads arguments, prints for people, exits. Heavy imports happen inside the commands only."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from tpt_megatron import __version__
from tpt_megatron.errors import Stopped, TptError

app = typer.Typer(
    name="tpt",
    help="Thinking-augmented pretraining on megatron-core: documents, thoughts, datasets, training, Hugging Face export, report.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 stopped by a signal after saving: run the same command again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Convert Hugging Face model folders to checkpoints, and back.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")

ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a recipe that ships with the package.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config keys to override, dotted: optimizer.learning_rate=1e-3")]


def main() -> None:
    """Run the command line; print a user's mistake as one line and exit with its code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)  # training replaces it: it saves first
    try:
        app()
    except Exception as error:
        from tpt_megatron.storage import explain

        line = explain(error)
        if line is None:
            raise
        print(f"tpt: {line}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, TptError) else 1)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _set_up(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    # Logging stays out of --help, which must answer at once.
    if not {"-h", "--help"} & set(sys.argv[1:]):
        from tpt_megatron.log import set_up_logging

        set_up_logging()


def _keys(kind: str) -> str:
    return f"The config's keys and their meaning: `tpt keys {kind}`."


@app.command(epilog=_keys("augment"))
def augment(
    config: ConfigName,
    overrides: Overrides = None,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Think about N documents only and show them with their thoughts: sample.html.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what the whole run will take, from the last --sample and the config's cost.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html on what is finished so far, and stop.")] = False,
) -> None:
    """Add thoughts to documents: record files in, augmented documents out. Run it again to continue; run it on more machines to go faster."""
    from tpt_megatron.config.augment import AugmentConfig
    from tpt_megatron.config.load import load_config
    from tpt_megatron.errors import UsageError

    loaded = load_config(AugmentConfig, config, overrides or ())
    if (sample is not None) + estimate + report > 1:
        raise UsageError("give one of --sample, --estimate and --report")
    if sample is not None:
        from tpt_megatron.augment.sample import run_sample

        print(f"sample: {run_sample(loaded, sample)}")
    elif estimate:
        from tpt_megatron.augment.sample import run_estimate

        _print_table(run_estimate(loaded))
    elif report:
        from tpt_megatron.augment.reporting import run_report

        place, summary = run_report(loaded)
        _print_table(summary)
        print(f"report: {place}")
    elif loaded.slurm is not None:
        from tpt_megatron.augment.slurm import submit

        print(submit(loaded))
    else:
        from tpt_megatron.augment.runner import run_augment

        manifest = run_augment(loaded)
        if manifest is not None:
            _print_counts(str(loaded.output), manifest.counts)


@app.command(epilog=_keys("preprocess"))
def preprocess(config: ConfigName, overrides: Overrides = None) -> None:
    """Turn augmented documents into Megatron token datasets, one an arm. Run it again to continue.

    Over many machines: shard=3/64 does the third of 64 parts, and `tpt preprocess merge OUTPUT [FOLDER]...` joins what they made in OUTPUT, and
    in the outputs FOLDER of machines that share no disk.
    """
    # No linear algebra here: numpy's library for it would start threads that spin for a tenth of a second in each process.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if config == "merge":
        from tpt_megatron.errors import UsageError
        from tpt_megatron.preprocess.runner import merge

        if not overrides:
            raise UsageError("tpt preprocess merge needs the output folder of the shards: tpt preprocess merge OUTPUT [FOLDER]...")
        manifests = merge(Path(overrides[0]), [Path(folder) for folder in overrides[1:]])
    else:
        from tpt_megatron.config.load import load_config
        from tpt_megatron.config.preprocess import PreprocessConfig
        from tpt_megatron.preprocess.runner import run_preprocess

        manifests = run_preprocess(load_config(PreprocessConfig, config, overrides or ()))
    for prefix, manifest in manifests.items():
        _print_counts(prefix, manifest.counts)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A dataset without its ending (data/append/train), an output of tpt preprocess, records, a run, a checkpoint, a model folder."
        ),
    ],
    documents: Annotated[int, typer.Option(min=0, metavar="N", help="How many of the first documents to show.")] = 3,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw lengths and sources: a .png, .svg or .pdf file.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum, bound and count instead; exit code 1 if anything is wrong.")] = False,
    step: Annotated[int | None, typer.Option(metavar="N", help="Of a run folder: show every document that step N saw.")] = None,
) -> None:
    """Show what a token dataset holds: counts by part and source, lengths, and its first documents. Or record files, a model, or what a step saw."""
    from rich.console import Console

    from tpt_megatron.errors import UsageError

    if not path:
        raise UsageError("PATH is empty; give a dataset, records, a run, a checkpoint or a model folder (. is this one)")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if step is not None:
        from tpt_megatron.inspection.step import print_step

        if plot is not None or verify:
            raise UsageError("--plot and --verify are for token datasets, and --step is for runs")
        print_step(Path(path), step, console)
        return
    from tpt_megatron.inspection.show import inspect_path

    if plot is not None:
        _require("matplotlib", extra="report")
    inspect_path(path, console, documents=documents, plot=plot, check=verify)


@app.command(epilog=_keys("train"))
def train(config: ConfigName, overrides: Overrides = None) -> None:
    """Pretrain a GPT on a token dataset: one process, or one rank under torchrun."""
    from tpt_megatron.config.load import load_config
    from tpt_megatron.config.train import TrainConfig

    loaded = load_config(TrainConfig, config, overrides or ())
    _require("torch", "megatron.core", "psutil", extra="train")
    from tpt_megatron.train.loop import run_train

    run_train(loaded)


Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored.")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare every tensor, and logits of transformers and megatron-core, before the output has its name.")]


@convert_app.command("import")
def import_(
    model: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face model folder: config.json and safetensors.")],
    output: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="The folder of checkpoints to make; iter_0000000 goes into it.")],
    dtype: Dtype = None,
    verify: Verify = False,
) -> None:
    """Import a Hugging Face model as a checkpoint, from which training can start."""
    _require("torch", extra="train")
    _require_for_verification(verify)
    from tpt_megatron.convert.importing import import_model

    verified: list[str] = []

    def check(made: Path) -> None:
        if verify:
            verified.append(_verify(made, model, "checkpoint", output / "iter_0000000"))

    folder = import_model(model, output, dtype, check)
    print("\n".join([f"{folder}: start from it with checkpoint.load_from={output} checkpoint.load=weights", *verified]))


@convert_app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="An iter_ folder, a checkpoints folder (its latest), or a run folder.")],
    output: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The Hugging Face model folder to make.")],
    dtype: Dtype = None,
    verify: Verify = False,
) -> None:
    """Export a checkpoint as a Hugging Face model folder."""
    _require("torch", extra="train")
    _require_for_verification(verify)
    from tpt_megatron.convert.export import export_checkpoint

    verified: list[str] = []

    def check(folder: Path, made: Path) -> None:
        if verify:
            verified.append(_verify(folder, made, "hugging_face", output))

    export_checkpoint(checkpoint, output, dtype, check)
    print("\n".join([f"{output}: a Hugging Face model folder", *verified]))


def _require_for_verification(verify: bool) -> None:
    if verify:
        _require("megatron", extra="train")
        _require("transformers", extra="evaluate")


def _verify(checkpoint: Path, model: Path, target: Literal["checkpoint", "hugging_face"], final: Path) -> str:
    """Return what was found, in a line. final: the name that the target will have."""
    from tpt_megatron.convert.verify import verify

    try:
        found = verify(checkpoint, model, target, final)
    except TptError as error:
        made = checkpoint if target == "checkpoint" else model
        raise type(error)(f"{str(error).replace(str(made), str(final))}; nothing was kept") from None
    of = "" if found.all_layers else f" of layers {', '.join(str(layer) for layer in found.layers)}"
    return f"verified: {found.tensors} tensors are equal, logits{of} differ by at most {found.difference:.1e} (largest logit {found.largest:.3g})"


@app.command(epilog=_keys("evaluate"))
def evaluate(config: ConfigName, overrides: Overrides = None) -> None:
    """Score an exported model, or every checkpoint of a run: on held-out problems, and on benchmarks. Run it again to continue."""
    from tpt_megatron.config.evaluate import EvaluateConfig
    from tpt_megatron.config.load import load_config

    loaded = load_config(EvaluateConfig, config, overrides or ())
    _require("torch", "transformers", extra="evaluate")
    if loaded.benchmarks:
        from tpt_megatron.evaluate.benchmarks.offline import go_offline

        go_offline()  # the libraries read it when they are imported
    from tpt_megatron.evaluate.runner import run_evaluate, scores_line

    for result in run_evaluate(loaded):
        step = "" if result["step"] is None else f"step {result['step']} ({result['tokens_seen']:,} tokens)  "
        print(f"{step}{scores_line(result)}")


@app.command(epilog=_keys("losses"))
def losses(config: ConfigName, overrides: Overrides = None) -> None:
    """Say which tokens of documents are hard for a model, and which of them others have learned: by part, source and difficulty, and as a page."""
    from tpt_megatron.config.load import load_config
    from tpt_megatron.config.losses import LossesConfig

    loaded = load_config(LossesConfig, config, overrides or ())
    _require("torch", "transformers", extra="evaluate")
    _require("matplotlib", "jinja2", extra="report")
    from tpt_megatron.evaluate.losses_runner import losses_table, run_losses

    _print_table(losses_table(run_losses(loaded)))
    print(f"{loaded.output}: losses.html, losses.json, tokens.parquet")


@app.command(epilog=_keys("value"))
def value(config: ConfigName, overrides: Overrides = None) -> None:
    """Score each thought of augmented documents by how much likelier it makes what follows, an answer or the document. Run it again to continue."""
    from tpt_megatron.config.load import load_config
    from tpt_megatron.config.value import ValueConfig

    loaded = load_config(ValueConfig, config, overrides or ())
    _require("torch", "transformers", extra="evaluate")
    from tpt_megatron.evaluate.value_report import value_tables
    from tpt_megatron.evaluate.value_runner import run_value

    summary = run_value(loaded)
    if summary is not None:
        for part in value_tables(summary):
            _print_table(part)
        print(f"{loaded.output}: {summary['counts']['documents']:,} documents with scores at their thoughts, summary.json")


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run folders of the arms to compare; several runs of one arm are its seeds.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")],
    notes: Annotated[str | None, typer.Option(help="A sentence on what the comparison does and does not show.")] = None,
    costs: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="plan.json of tpt experiment: count FLOPs, too, those of the generator among them.")
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Hold thinking length against it: an output of tpt losses; or record files, with --difficulty-field.")
    ] = None,
    difficulty_field: Annotated[str | None, typer.Option(metavar="NAME", help="The field of the records in --difficulty.")] = None,
) -> None:
    """Compare runs: curves, scores against tokens, how many fewer tokens thinking needed, and how long thinking is."""
    _require("matplotlib", "jinja2", extra="report")
    from tpt_megatron.compare.report import terminal_table
    from tpt_megatron.compare.runner import run_compare
    from tpt_megatron.compare.thinking_report import thinking_table

    comparison = run_compare(run_dirs, output, notes, costs, difficulty, difficulty_field)
    _print_table(terminal_table(comparison))
    if comparison["thinking"] is not None and comparison["thinking"]["arms"]:
        _print_table(thinking_table(comparison["thinking"], comparison["interval"]))
    print(f"report: {output / 'report.html'}")


@app.command(epilog=_keys("experiment"))
def experiment(
    config: ConfigName,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say which runs there are and what they take, write their configs and commands.sh, and stop.")] = False,
) -> None:
    """Train arms so that they can be compared, a few seeds each: equal training tokens, documents or compute. Run it again to continue."""
    from tpt_megatron.config.experiment import ExperimentConfig
    from tpt_megatron.config.load import load_config

    loaded = load_config(ExperimentConfig, config, overrides or ())
    if not plan:
        _require("torch", "megatron.core", "psutil", "transformers", "matplotlib", "jinja2", extra="all")
    from tpt_megatron.experiment.run import carry_out, plan_table, prepare

    planned = prepare(loaded)
    _print_table(plan_table(loaded, planned))
    if plan:
        print(f"{loaded.output}: plan.json, configs/ and commands.sh")
    else:
        carry_out(loaded, planned)


@app.command(epilog="CONFIG: of `tpt train`; of `tpt experiment`, for all of its runs; or of `tpt augment`, for its estimate on so many GPUs.")
def plan(
    config: ConfigName,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option("--world-size", min=1, max=100_000, metavar="N", help="GPUs, all nodes together.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h100-nvl, h200, a100 or a100-40gb.")] = "h100",
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="The model FLOP/s utilisation that time is reckoned with.")] = 0.4,
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts that fit, and print the overrides of the first one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a run takes before a GPU is touched: whether its layout is possible and fits, memory of each stage, steps, time, checkpoints.

    Exit code 2 when it is impossible, or does not fit. Nothing is trained, and no GPU needed.
    """
    from tpt_megatron.config.load import read_values
    from tpt_megatron.config.stages import kind_to_plan
    from tpt_megatron.config.train import TrainConfig
    from tpt_megatron.errors import UsageError

    if search and as_json:
        raise UsageError("--search and --json: give one of them; layouts are ranked in a table alone")
    kind = kind_to_plan(read_values(config, overrides or ())[0])
    if kind not in ("train", "experiment", "augment"):
        raise UsageError(f"{config}: a config of tpt {kind} has nothing to plan; give one of tpt train, experiment or augment")
    if kind != "train" and (search or as_json):
        raise UsageError(f"--search and --json are for configs of tpt train, and {config} is one of tpt {kind}")
    if kind == "augment":  # which has no use for torch
        _plan_augment(config, [*(overrides or ()), f"cost.gpus={world_size}"])
        return
    from tpt_megatron.config.experiment import ExperimentConfig
    from tpt_megatron.config.load import load_config
    from tpt_megatron.launch.gpus import find_gpu
    from tpt_megatron.launch.planned import planned_config

    # All that can be said without torch comes first.
    chip = find_gpu(gpu)
    wanted = load_config(ExperimentConfig, config, overrides or ()) if kind == "experiment" else planned_config(config, overrides or ())
    if isinstance(wanted, TrainConfig) and not search:
        wanted.check_world(world_size)
    _require("torch", "megatron.core", "psutil", extra="train")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are simulated without one
    from tpt_megatron.launch import planning

    if isinstance(wanted, ExperimentConfig):
        training, planned, tables = planning.plan_arms(wanted, world_size, chip, mfu)
    else:
        training = planning.with_data(wanted)
        if search:
            table, found = planning.plan_search(training, world_size, chip, mfu)
            _print_table(table)
            print(" ".join(found))
            return
        planned, tables = planning.plan_run(training, world_size, chip, mfu)
        if as_json:
            print(planning.as_json(planned, chip))
            tables = []
    for table in tables:
        _print_table(table)
    planning.refuse_what_does_not_fit(training, planned, chip)


def _plan_augment(config: str, overrides: list[str]) -> None:
    from tpt_megatron.augment.sample import run_estimate
    from tpt_megatron.config.augment import AugmentConfig
    from tpt_megatron.config.load import load_config

    _print_table(run_estimate(load_config(AugmentConfig, config, overrides)))


@app.command()
def doctor(
    path: Annotated[Path, typer.Option("--path", metavar="DIR", help="The folder whose disk is examined: where runs and data are to be.")] = Path(),
    quick: Annotated[bool, typer.Option("--quick", help="Measure no speeds: of the disk, and of ranks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what this machine has, what is missing, and the command that mends it; under torchrun, of every node, and how ranks get on together.

    Exit code 1 when something is a problem. DIR is left as it was; at most 256 MB are written there for some seconds.
    """
    from tpt_megatron.doctor.printing import print_json, print_report
    from tpt_megatron.doctor.run import run_doctor

    is_healthy = run_doctor(path, quick, print_json if as_json else print_report)
    raise typer.Exit(0 if is_healthy else 1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demonstration makes.")] = Path("demo-output"),
    steps: Annotated[int, typer.Option(min=20, help="Training steps an arm; fewer make a quicker look that shows less.")] = 1500,
    seeds: Annotated[int, typer.Option(min=1, help="Runs an arm, each with a seed of its own.")] = 1,
) -> None:
    """Go the whole road, small, on this machine: documents, thoughts, two arms, training, export, evaluation, report."""
    _require("torch", "megatron.core", "psutil", "transformers", "matplotlib", "jinja2", extra="all")
    from tpt_megatron.demo.run import run_demo

    run_demo(output, steps, seeds)


@app.command(epilog="Its options, each also `launch.KEY=VALUE`: `tpt keys launch`. docs/launch.md says the rest.")
def launch(
    where: Annotated[Literal["local", "slurm", "kubernetes"], typer.Argument(help="local: torchrun on this machine; slurm: sbatch; kubernetes: kubectl.")],
    config: ConfigName,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Machines; for augment and preprocess: tasks.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ranks of a machine; 8.")] = None,
    options: Annotated[str | None, typer.Option(metavar="FILE", help="YAML file of options; flags and launch.KEY=VALUE count over it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run or submitted, and nothing else.")] = False,
) -> None:
    """Run train, augment or preprocess on this machine, a Slurm cluster or Kubernetes, and start it again when it must be."""
    from tpt_megatron.launch.job import make_job
    from tpt_megatron.launch.submit import launch as carry_out

    job = make_job(config, overrides or (), options, {"nodes": nodes, "gpus_per_node": gpus_per_node})
    said = carry_out(where, job, dry_run)
    if said:
        print(said)


@app.command()
def keys(stage: Annotated[str, typer.Argument(help="augment, preprocess, train, evaluate, losses, value, experiment or launch")]) -> None:
    """List a stage's config keys with their types, defaults and meaning."""
    from tpt_megatron.config.load import describe_keys

    print(describe_keys(stage))


def _print_table(table: object) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_counts(title: str, counts: dict[str, int]) -> None:
    listed = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items())
    print(f"{title}: {listed}")


def _require(*modules: str, extra: str) -> None:
    """Raise MachineError when a package that the command needs is not installed, or when torch, which takes more than that, does not import."""
    from importlib.util import find_spec

    from tpt_megatron.errors import MachineError

    def missing(module: str) -> bool:
        try:
            return find_spec(module) is None
        except ModuleNotFoundError:
            return True

    absent = [module for module in modules if missing(module)]
    if absent:
        raise MachineError(f"this command needs {', '.join(absent)}, which is not installed; run: pip install 'tpt-megatron[{extra}]'")
    if "torch" in modules:
        try:
            import torch  # noqa: F401
        except (ImportError, OSError) as error:  # OSError: a library of its does not load
            raise MachineError(f"torch is installed but does not import: {error}; `tpt doctor` says what is missing") from None


if __name__ == "__main__":
    main()
