"""The `mmflow` command. It parses, says what happened in one line each, and leaves the work to the packages below."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmflow import __version__
from mmflow.cli.models import QUICKSTART, models
from mmflow.core.errors import MisuseError, MmflowError
from mmflow.stages.loop import STAGES, Loop

if TYPE_CHECKING:
    from mmflow.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Image–text corpora in, better multimodal models out, every night. `mmflow quickstart` shows the whole loop.",
)
cluster = typer.Typer(no_args_is_help=True, help="The Ray cluster's launcher file.")
selfcheck = typer.Typer(no_args_is_help=True, help="Proofs on your own cluster, in a minute: gradients.")
app.add_typer(models, name="models")
app.add_typer(selfcheck, name="selfcheck")
app.add_typer(cluster, name="cluster")

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings in place of the recipe's.")
]
Submit = Annotated[
    str | None, typer.Option("--submit", metavar="ADDRESS", help="Run as a Ray job there, e.g. http://head:8265.")
]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error.")] = False,
) -> None:
    """Options of every command."""
    os.environ["MMFLOW_DEBUG"] = "1" if debug else os.environ.get("MMFLOW_DEBUG", "")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit code 0 is done, 1 failed, 2 misused; an error is one line on standard error."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except typer.Exit as error:
        code = error.exit_code
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from what is committed")
        code = 130
    except MmflowError as error:
        code = _fail(error, error.exit_code)
    except Exception as error:
        misuse = getattr(error, "exit_code", None) if hasattr(error, "format_message") else None
        code = _fail(error.format_message(), 2) if misuse else _fail(error, 1)  # type: ignore[attr-defined]
    finally:
        _stop_ray()
    sys.exit(code or 0)


def _fail(error: Exception | str, code: int) -> int:
    if os.environ.get("MMFLOW_DEBUG"):
        traceback.print_exc()
    if isinstance(error, OSError):  # a full disk, a file that is not ours: the machine's trouble
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}{error.strerror or error}; mend it and run the same command again"
    elif isinstance(error, Exception) and not isinstance(error, MmflowError):
        line = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:500]} (a bug? run with --debug for the traceback)"
        )
    else:
        line = " ".join(str(error).split())
    _say(f"error: {line}")
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop_ray() -> None:
    if "ray" in sys.modules:
        from mmflow.cluster.local import stop_ray

        stop_ray()


def _recipe(path: str, overrides: list[str] | None) -> Recipe:
    from mmflow.recipe import load_recipe

    return load_recipe(path, overrides or [])


# --- the loop -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: mmflow quickstart")
def quickstart(overrides: Overrides = None) -> None:
    """The whole loop on a small real corpus, on this machine: minutes the first time, seconds after that."""
    run(str(QUICKSTART), overrides)


@app.command(epilog="Example: mmflow run pipelines/quickstart.yaml pretrain.training.epochs=30")
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run a pipeline here, in process, going on from what is committed, and write its report."""
    from pipelines.run import run_pipeline

    run_pipeline(_recipe(recipe, overrides))


def _stage_command(name: str, purpose: str) -> Callable[..., None]:
    def command(recipe: RecipePath, overrides: Overrides = None, submit: Submit = None) -> None:
        loop = Loop(_recipe(recipe, overrides))
        loop.check((name,))
        if submit:
            _submit(loop, name, submit)
        artifact = loop.run(name)
        print(f"{name}: {'built' if artifact.built else 'already committed'}: {artifact.uri}")
        print(f"  {STAGES[name].summary(artifact.manifest)}")
        if artifact.manifest.get("decision") == "refused":
            for reason in artifact.manifest["reasons"]:
                print(f"  - {reason}")

    command.__doc__ = purpose
    return command


def _submit(loop: Loop, name: str, address: str) -> None:
    from mmflow.cluster.jobs import submit_stage
    from mmflow.core.artifacts import MANIFEST
    from mmflow.core.storage import exists, join
    from mmflow.recipe import dump_recipe

    stage = loop.plan(name)
    manifest = join(stage.directory(loop.recipe.workspace), MANIFEST)
    submit_stage(
        address,
        stage=name,
        identity=stage.identity,
        recipe_text=dump_recipe(loop.recipe),
        code=Path(__file__).parents[2],
        committed=lambda: exists(manifest),
        on_line=_say,
    )


for _name, _stage in STAGES.items():
    app.command(_name, epilog=f"Example: mmflow {_name} pipelines/quickstart.yaml")(
        _stage_command(_name, _stage.purpose)
    )


# --- looking --------------------------------------------------------------------------------------------------------


DatasetUris = Annotated[list[str], typer.Argument(metavar="DATASET…", help="Directories or URIs of datasets.")]


@app.command(epilog="Example: mmflow verify workspace/quickstart/shard/* --decode all")
def verify(
    datasets: DatasetUris,
    decode: Annotated[
        str, typer.Option("--decode", metavar="all|N", help="How many samples to decode, spread over the dataset.")
    ] = "256",
) -> None:
    """Check datasets: manifest, counts, checksums, keys, images. Exit code 1 and the list of what is wrong."""
    from mmflow.dataset.verify import verify_dataset

    if decode != "all" and not decode.isdecimal():
        raise MisuseError(f"--decode {decode}: `all` or a number of samples is needed; 0 decodes none")
    damaged = []
    for dataset in datasets:
        problems = verify_dataset(dataset, decoded_samples=None if decode == "all" else int(decode))
        for line in problems or [f"{dataset}: whole"]:
            print(line)
        damaged += [f"{dataset}: {len(problems)} problems"] if problems else []
    if damaged:
        raise MmflowError(f"{'; '.join(damaged)}; restore the shards named above, or rebuild them")


@app.command(epilog="Example: mmflow adopt workspace/theirs 'downloads/{00000..00041}.tar' --license CC-BY-4.0")
def adopt(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The new dataset's directory or URI.")],
    tars: Annotated[list[str], typer.Argument(metavar="TARS…", help="Paths or URIs, globs and brace ranges.")],
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="The split that the samples are in.")] = "train",
    license: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="Licence of the records that name none.")
    ] = None,
    captions_required: Annotated[
        bool,
        typer.Option(
            "--captions-required/--captions-optional", help="Whether a picture without a caption is no sample."
        ),
    ] = True,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave damaged tars out, and say so in quarantine.")
    ] = False,
) -> None:
    """Index tars that others wrote, as a dataset. The tars are linked, or copied, and not changed."""
    from mmflow.core.progress import progress
    from mmflow.dataset.adopt import adopt as adopt_tars

    with progress("adopt") as report:
        artifact = adopt_tars(
            dataset,
            tars,
            split=split,
            license=license,
            captions_required=captions_required,
            skip_damaged=skip_damaged,
            progress=lambda done, total: report(done, total, "tars"),
        )
    print(f"adopt: {'built' if artifact.built else 'already committed'}: {artifact.uri}")
    totals = artifact.manifest["totals"]
    print(f"  {totals['samples']:,} samples in {len(artifact.manifest['shards'])} shards")
    for reason, count in totals["reasons"].items():
        print(f"  {count:,} records quarantined: {reason}")


@app.command("describe", epilog="Example: mmflow describe workspace/quickstart/shard/*")
def describe_datasets(datasets: DatasetUris) -> None:
    """Write a page about each dataset beside its manifest, and print its path: counts, sizes, captions, rejects."""
    from mmflow.report.dataset_page import write_description

    for dataset in datasets:
        print(write_description(dataset))


@selfcheck.command("gradients", epilog="Example: mmflow selfcheck gradients pipelines/quickstart.yaml")
def selfcheck_gradients(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check that the recipe's workers descend the gradient of one process: each objective, on a small model. Exit code
    1 where they do not."""
    from mmflow.cluster.local import ensure_ray
    from mmflow.core.storage import join
    from mmflow.stages.pretrain import resolve
    from mmflow.stages.training import sections
    from mmflow.training.check import check_training
    from mmflow.training.config import tasks_of
    from mmflow.training.selfcheck import small_check
    from mmflow.training.workers import compare_gradients_on_ray

    loaded = resolve(_recipe(recipe, overrides))
    trained = sections(loaded)
    for name, section in trained.items():
        check_training(name, section)
    ensure_ray(max(each.training.most_workers * each.training.cpus_per_worker for each in trained.values()))
    different = 0
    for name, section in trained.items():
        training = section.training
        for task in tasks_of(name, section):
            found = compare_gradients_on_ray(
                small_check(
                    section.model,
                    task.objectives,
                    zero_stage=training.zero_stage,
                    in_micro_batches=training.micro_batch_size is not None,
                    offload_optimizer=training.offload_optimizer,
                ),
                num_workers=training.most_workers,
                cpus_per_worker=training.cpus_per_worker,
                directory=join(loaded.workspace, "selfcheck"),
            )
            for each in found:
                verdict = "equal" if each.equal else "DIFFERENT"
                print(f"{task.key} {each.objective}: max error {each.error:.1e} of {each.largest:.1e}: {verdict}")
            different += sum(not each.equal for each in found)
    if different:
        raise MmflowError(
            f"{recipe}: {different} gradients are not those of one process; train on one worker, and report this"
        )


@cluster.command("check", epilog="Example: mmflow cluster check cluster.yaml")
def cluster_check(path: Annotated[str, typer.Argument(metavar="FILE")] = "cluster.yaml") -> None:
    """Check a launcher file without a cloud: Ray's own schema, and what makes a cluster dear or unsafe."""
    from mmflow.cluster.lint import check_cluster

    found = check_cluster(path)
    for line in found:
        print(line)
    wrong = [line for line in found if not line.startswith("warning:")]
    if wrong:
        raise MmflowError(f"{path}: {len(wrong)} things to change, named above")
    print(f"{path}: sound")


@app.command(epilog="Example: mmflow schedule pipelines/nightly.yaml")
def schedule(recipe: RecipePath) -> None:
    """Run the recipe's pipeline by its cron line, until stopped: Dagster's daemon, and its pages where installed."""
    from pipelines.schedule import run_scheduler

    run_scheduler(_recipe(recipe, None), str(Path(recipe).absolute()))


@app.command(hidden=True)
def version() -> None:
    """The version of mmflow."""
    print(__version__)


if __name__ == "__main__":
    main()
