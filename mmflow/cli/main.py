"""The `mmflow` command: it parses, calls the packages below, and prints one line for each result."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from mmflow import __version__
from mmflow.cli.common import Overrides, Submit, print_artifact, print_error, read_recipe, submit_recipe
from mmflow.cli.models import QUICKSTART, models
from mmflow.cli.score import score
from mmflow.cli.search import search
from mmflow.core.errors import MisuseError, MmflowError
from mmflow.stages.loop import STAGES, Loop

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Image–text corpora in, better multimodal models out, every night. `mmflow quickstart` shows the whole loop.",
)
cluster = typer.Typer(no_args_is_help=True, help="The Ray cluster's launcher file.")
selfcheck = typer.Typer(no_args_is_help=True, help="Checks on your own cluster, in a minute: gradients.")
app.add_typer(models, name="models")
app.add_typer(selfcheck, name="selfcheck")
app.add_typer(cluster, name="cluster")
app.command("search", epilog='Example: mmflow search workspace/quickstart "a red apple"')(search)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
DatasetUris = Annotated[list[str], typer.Argument(metavar="DATASET…", help="Directories or URIs of datasets.")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error.")] = False,
) -> None:
    """Options of every command."""
    os.environ["MMFLOW_DEBUG"] = "1" if debug else os.environ.get("MMFLOW_DEBUG", "")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit code: 0 done, 1 failed, 2 misused. An error is one line on standard error."""
    code = 0
    try:
        code = app(args=arguments, standalone_mode=False) or 0
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print_error("stopped; the same command continues from what is committed")
        code = 130
    except TyperException as error:
        code = _fail(error.format_message(), 2)
    except MmflowError as error:
        code = _fail(str(error), error.exit_code)
    except OSError as error:  # a full disk, a file of another user
        file = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{file}{error.strerror or error}; fix this and run the same command again", 1)
    except Exception as error:
        message = " ".join(str(error).split())[:500]
        code = _fail(f"{type(error).__name__}: {message} (a bug? run with --debug for the traceback)", 1)
    finally:
        if "ray" in sys.modules:
            from mmflow.cluster.local import stop_ray

            stop_ray()
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    if os.environ.get("MMFLOW_DEBUG"):
        traceback.print_exc()
    print_error(f"error: {' '.join(message.split())}")
    return code


# --- the loop -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: mmflow quickstart")
def quickstart(overrides: Overrides = None) -> None:
    """Run the whole loop on a small real corpus on this machine: minutes the first time, seconds after that."""
    run(str(QUICKSTART), overrides)


@app.command(epilog="Example: mmflow run pipelines/quickstart.yaml pretrain.training.epochs=30")
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run the whole loop on this machine, continuing from what is committed, and write its report."""
    from pipelines.run import run_pipeline

    run_pipeline(read_recipe(recipe, overrides))


@app.command(epilog="Example: mmflow schedule pipelines/nightly.yaml")
def schedule(recipe: RecipePath) -> None:
    """Run the recipe's loop by its cron line, until stopped: Dagster's daemon, and its pages where installed."""
    from pipelines.schedule import run_scheduler

    run_scheduler(read_recipe(recipe), str(Path(recipe).absolute()))


def _stage_command(name: str) -> Callable[..., None]:
    def command(recipe: RecipePath, overrides: Overrides = None, submit: Submit = None) -> None:
        loop = Loop(read_recipe(recipe, overrides))
        loop.check((name,))
        if submit:
            submit_recipe(submit, name, loop.plan(name), loop.recipe)
        artifact = loop.run(name)
        print_artifact(name, artifact)
        print(f"  {STAGES[name].summary(artifact.manifest)}")
        if artifact.manifest.get("decision") == "refused":
            for reason in artifact.manifest["reasons"]:
                print(f"  - {reason}")

    command.__doc__ = STAGES[name].purpose
    return command


for _name in STAGES.keys() - {"score"}:
    app.command(_name, epilog=f"Example: mmflow {_name} pipelines/quickstart.yaml")(_stage_command(_name))


@selfcheck.command("gradients", epilog="Example: mmflow selfcheck gradients pipelines/quickstart.yaml")
def selfcheck_gradients(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check that the recipe's workers compute the gradient of one process: each objective, on a small model. Exit code
    1 if they do not."""
    from mmflow.stages.pretrain import resolve
    from mmflow.stages.training import compare_gradients, sections

    loaded, different = resolve(read_recipe(recipe, overrides)), 0
    for key, result in compare_gradients(sections(loaded), loaded.workspace):
        verdict = "equal" if result.equal else "DIFFERENT"
        print(f"{key} {result.objective}: max error {result.error:.1e} of {result.largest:.1e}: {verdict}")
        different += not result.equal
    if different:
        raise MmflowError(
            f"{recipe}: {different} gradients differ from those of one process; train on one worker, and report this"
        )


app.command("score", epilog="Example: mmflow score pipelines/quickstart.yaml")(score)


# --- datasets and clusters ------------------------------------------------------------------------------------------


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
        raise MisuseError(f"--decode {decode}: give `all` or a number of samples; 0 decodes none")
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
    split: Annotated[str, typer.Option(metavar="NAME", help="The split that the samples are in.")] = "train",
    license: Annotated[str | None, typer.Option(metavar="NAME", help="Licence of records that name none.")] = None,
    captions_required: Annotated[
        bool, typer.Option("--captions-required/--captions-optional", help="Leave out pictures without a caption.")
    ] = True,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave damaged tars out, and list them in quarantine.")
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
    print_artifact("adopt", artifact)
    totals = artifact.manifest["totals"]
    print(f"  {totals['samples']:,} samples in {len(artifact.manifest['shards'])} shards")
    for reason, count in totals["reasons"].items():
        print(f"  {count:,} records quarantined: {reason}")


@app.command(epilog="Example: mmflow describe workspace/quickstart/shard/*")
def describe(datasets: DatasetUris) -> None:
    """Write a page about each dataset beside its manifest, and print its path: counts, sizes, captions, rejects."""
    from mmflow.report.dataset_page import write_description

    for dataset in datasets:
        print(write_description(dataset))


@cluster.command("check", epilog="Example: mmflow cluster check cluster.yaml")
def cluster_check(path: Annotated[str, typer.Argument(metavar="FILE")] = "cluster.yaml") -> None:
    """Check a launcher file without a cloud: Ray's own schema, and settings that cost money or open security holes."""
    from mmflow.cluster.lint import check_cluster

    problems = check_cluster(path)
    for line in problems:
        print(line)
    errors = [line for line in problems if not line.startswith("warning:")]
    if errors:
        raise MmflowError(f"{path}: {len(errors)} things to change, named above")
    print(f"{path}: sound")


@app.command(hidden=True)
def version() -> None:
    """The version of mmflow."""
    print(__version__)


if __name__ == "__main__":
    main()
