"""The command line: `cifarlab COMMAND`, also called by the Makefile."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import click

from cifarlab import files, pipeline
from cifarlab.errors import UserError, first_line, tolerate_settings
from cifarlab.params.load import changed, load_params, read_yaml
from cifarlab.runtime.processes import spare_cores

JOBS = click.option("--jobs", type=click.IntRange(1, 64), default=1, help="Experiments at a time.")
CLUSTER = "Run on a Ray cluster: ray, or ray://HOST:PORT (docs/scale.md)."
WORKERS = click.option("--workers", metavar="CLUSTER", help=CLUSTER, default="", show_default=False)
HERE = Path(os.environ.get("CIFARLAB_HERE", ""))  # from the top to where it was typed: launcher.py


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True}
STYLE = """body { font-family: system-ui, sans-serif; margin: 2rem }
body > div { margin-bottom: 2.5rem; overflow-x: auto } img { max-width: 44vw; height: auto }"""


class Commands(click.Group):
    """Commands that report an error of the user in one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit code 1 and one line on standard error if it cannot be done."""
        tolerate_settings()
        spare_cores()
        try:
            return super().invoke(ctx)
        except UserError as error:
            sys.exit(f"error: {error}")
        except BrokenPipeError:  # `| head`: click ends quietly
            raise
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"error: {first_line(error)}")


@click.group(cls=Commands, context_settings=SETTINGS)
def main() -> None:
    """Ask what a change to a network does. See also `dvc repro` and `dvc exp run`.

    \b
    Examples:
      cifarlab variant notebook       train a variant of variants.yaml
      cifarlab study depth --jobs 2   ask studies/depth.yaml
      cifarlab report A B             write a page about two experiments
      cifarlab sync                   log to MLflow what it misses
      cifarlab verify HEAD            train a commit again, compare every byte
    """  # noqa: D301 - for click, \b keeps the lines of a paragraph


@main.command(epilog="Example: cifarlab check")
def check() -> None:
    """Validate params.yaml."""
    load_params()
    click.echo("params.yaml is valid")


@main.command(epilog="Example: cifarlab variant tiny")
@click.argument("name")
def variant(name: str) -> None:
    """Train variant NAME of variants.yaml.

    It becomes a DVC experiment of that name, and replaces an earlier one. It runs in a temporary
    copy.
    """
    from cifarlab.data.fetch import holds_files

    variants = read_yaml(files.VARIANTS, f"`git checkout {files.VARIANTS}` restores it")
    variants = {str(k): v for k, v in variants.items()} if isinstance(variants, dict) else {}
    if not isinstance(variants.get(name, ""), dict | None):
        raise UserError(f"{files.VARIANTS} has no {name}; it has {', '.join(variants) or 'none'}")
    # A wrong value is refused before DVC makes its copy, which lacks images that it does not know.
    changes = {str(key): value for key, value in (variants[name] or {}).items()}
    data = changed(changes).data
    folder = Path(data.folder).expanduser()
    # Without images there, data.sources is read, or DVC knows them.
    if data.name == "folder" and (folder.is_file() or holds_files(folder)):
        changes = {**changes, "data.folder": str(folder.resolve())}
    options = ["--temp", "--force", "--name", name, *pipeline.set_options(changes)]
    # Without --quiet, twelve warnings of DVC hide the sentence of a stage that failed.
    if subprocess.run(["dvc", "exp", "run", "--quiet", *options], check=False).returncode:
        raise UserError(f"{name} failed; if no reason is above, try `dvc exp run --dry --temp`")


@main.command(epilog="Example: cifarlab study depth --jobs 2")
@click.argument("name", required=False, default="")
@JOBS
@WORKERS
@click.option("--page-only", is_flag=True, help="Write the page from the table, run nothing.")
def study(name: str, jobs: int, workers: str, page_only: bool) -> None:
    """Run what the study NAME lacks, and write its page.

    The question is studies/NAME.yaml, the page docs/studies/NAME.md.

    Stop it whenever you like: the same command continues. `cifarlab studies` lists the studies.
    """
    from cifarlab.studies import study as studies

    click.echo(studies.rewrite_page(name) if page_only else studies.run(name, jobs, workers))


@main.command(epilog="Example: cifarlab studies")
def studies() -> None:
    """List the studies, and how many of their results are valid for the present code."""
    from cifarlab.studies import study as asking

    asking.report()


@main.command(epilog="Example: cifarlab search search")
@click.argument("name", required=False, default="")
def search(name: str) -> None:
    """Look for the best variant within a limit of time.

    studies/NAME.yaml holds the limit and what to try.
    """
    from cifarlab.studies import search as searches

    click.echo(searches.run(name))


@main.command(epilog="Example: cifarlab queue --jobs 2")
@JOBS
@WORKERS
def queue(jobs: int, workers: str) -> None:
    """Run the queued experiments, and name those that fail."""
    from cifarlab.studies import executors

    executors.run_queue(jobs, workers)


@main.command(epilog="Example: cifarlab sync --check")
@click.option("--check", is_flag=True, help="Only report what is missing.")
def sync(check: bool) -> None:
    """Log to MLflow, from files, what it misses.

    These are results of experiments, commits and the workspace. Nothing is trained. It prints which
    run belongs to what, and the command that restores it.
    """
    from cifarlab.tracking import sync as syncing

    syncing.sync(check=check)


BEST = "Keep so many of the most accurate of each data set."


@main.command(epilog="Example: cifarlab prune --keep notebook --best 5 --remove")
@click.option("--keep", multiple=True, metavar="NAME", help="An experiment that stays.")
@click.option("--best", type=click.IntRange(0), default=10, help=BEST)
@click.option("--remove", is_flag=True, help="Remove them; otherwise they are only listed.")
def prune(keep: tuple[str, ...], best: int, remove: bool) -> None:
    """List the experiments that nobody needs any more, or remove them.

    They are removed from DVC, its cache and MLflow. What the table of a study names always stays,
    and so does what MLflow has registered.
    """
    from cifarlab.tracking import prune as pruning

    pruning.prune(keep, best, remove=remove)


@main.command(epilog="Examples: cifarlab verify HEAD; cifarlab verify my-experiment")
@click.argument("revision", default="HEAD")
def verify(revision: str) -> None:
    """Train a commit or experiment again, compare every byte.

    Without REVISION, it is HEAD.
    """
    from cifarlab import verify as verification

    verification.verify(revision)


@main.command(epilog="Examples: cifarlab report; cifarlab report HEAD my-experiment")
@click.argument("revisions", nargs=-1)
@click.option("--output", type=Path, default="report.html", help="The page.")
def report(revisions: tuple[str, ...], output: Path) -> None:
    """Write a page to show, about one run or several.

    REVISIONS are experiments or commits; without one, it is the workspace. Several are compared
    with the first. The page is one file that opens offline. It is also logged to the MLflow run of
    the first revision.
    """
    from cifarlab.report import page as pages

    for line in pages.write(revisions, HERE / output):
        click.echo(line)


MODELS = "An experiment, a commit, a run's id, models:/NAME@ALIAS or a file  [default: models/]"
MODEL = click.option("--model", metavar="MODEL", help=MODELS, default="", show_default=False)


def _from_here(model: str) -> str:
    return str(HERE / model) if (HERE / model).is_file() else model


@main.command(epilog='Examples: cifarlab predict cat.jpg "new/*.jpg"; cifarlab predict - <cat.jpg')
@click.argument("images", nargs=-1, required=True)
@MODEL
@click.option("--top", type=click.IntRange(1), default=1, help="How many classes to name.")
@click.option("--json", "form", flag_value="json", help="Write JSON.")
@click.option("--csv", "form", flag_value="csv", help="Write CSV.")
def predict(images: tuple[str, ...], model: str, top: int, form: str | None) -> None:
    """Say which class each of the IMAGES belongs to.

    They are paths, folders or patterns; - is standard input.
    """
    from cifarlab import predict as predicting

    broken: list[str] = []
    # Not by Path.expanduser: a name may begin with ./~
    names = [os.path.expanduser(name) for name in images]  # noqa: PTH111
    with chdir(HERE):
        paths = predicting.find(names, broken)
    total, network = len(paths) + len(broken), predicting.load(_from_here(model))
    with chdir(HERE):
        for line in predicting.shown(predicting.predict(network, paths, top, broken), form or ""):
            click.echo(line)
    if broken:
        raise UserError(f"{len(broken)} of {total} images cannot be read: {'; '.join(broken[:5])}")


@main.command(epilog="Example: cifarlab export --onnx network.onnx")
@MODEL
@click.option("--onnx", type=Path, help="Write ONNX, which returns probabilities.")
@click.option("--torch", type=Path, help="Write PyTorch's .pt2, which returns logits.")
def export(model: str, onnx: Path | None, torch: Path | None) -> None:
    """Write the network for other programs, for any number of images."""
    from cifarlab.nn.weights import export_onnx, export_torch
    from cifarlab.predict import load

    if onnx == torch:  # both are None, or one would replace the other
        raise UserError("name a file: --onnx FILE or --torch FILE, or two different ones")
    network = load(_from_here(model))
    for path, write in ((onnx, export_onnx), (torch, export_torch)):
        if path:
            write(network, HERE / path)
            click.echo(HERE / path)


@main.command(epilog="Example: cifarlab promote my-experiment")
@click.argument("run")
@click.option("--force", is_flag=True, help="Make it the champion in any case.")
def promote(run: str, force: bool) -> None:
    """Register a model in MLflow. RUN is an experiment, or the id of an MLflow run.

    It becomes the champion if it is better on the same test images.
    """
    from cifarlab.tracking import registry

    click.echo(registry.promote(run, force=force))


@main.command(epilog="Example: cifarlab champion")
def champion() -> None:
    """Describe the champion, and how to use and restore it."""
    from cifarlab.tracking import registry

    click.echo(registry.champion())


@main.command(epilog="Example: cifarlab ui --port 5001")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, help="Port of the page.")
def ui(port: int) -> None:
    """Compare runs in MLflow, in a browser on this machine."""
    from cifarlab.tracking.client import serve

    serve(port, load_params().tracking.experiment)


@main.command(epilog="Example: cifarlab page")
def page() -> None:
    """Make the pages of `dvc plots` of this checkout open offline."""
    import vl_convert
    from dvc_render.html import PAGE_HTML

    libraries = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub is incomplete
    head = f'<meta charset="utf-8">\n<script>{libraries}</script>\n<style>{STYLE}</style>'
    files.write(Path(".dvc/plots.html"), PAGE_HTML.replace("{scripts}", head))
    subprocess.run(["dvc", "config", "--local", "plots.html_template", "plots.html"], check=True)


if __name__ == "__main__":
    main(prog_name="cifarlab")
