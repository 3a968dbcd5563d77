"""Experiments and commits after the fact: what MLflow lacks of them is logged, and whether they repeat is tried."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cifarlab import UserError, tracking
from cifarlab.files import root
from cifarlab.params import load_params


class Revision(NamedTuple):
    """A commit that holds what the pipeline wrote, or the workspace."""

    name: str
    """of the DVC experiment; empty for a commit of a branch and for the workspace."""
    commit: str
    """Empty for the workspace."""
    baseline: str
    """The commit that the experiment started from; of a commit of a branch itself."""

    @property
    def restore(self) -> str:
        """The command that brings it back into the workspace."""
        return f"dvc exp apply {self.name}" if self.name else f"git checkout {self.commit[:10]} && dvc checkout" if self.commit else ""


def revisions() -> list[Revision]:
    """Return every DVC experiment, and every commit of a branch that changed dvc.lock, newest first."""
    refs = _git("for-each-ref", "--sort=-creatordate", "--format=%(objectname)/%(refname)", "refs/exps").splitlines()
    # …/refs/exps/12/34…/NAME, the digits those of the baseline; DVC keeps more than experiments there.
    parts = [ref.split("/") for ref in refs]
    experiments = [Revision(p[5], p[0], p[3] + p[4]) for p in parts if len(p) == 6 and len(p[3] + p[4]) == 40]
    commits = _git("log", "--branches", "HEAD", "--format=%H", "--", "dvc.lock").split()
    return experiments + [Revision("", commit, commit) for commit in commits]


def cache() -> Path:
    """Return the folder of DVC's cache, wherever it is configured to lie."""
    return Path(subprocess.run(["dvc", "cache", "dir"], cwd=root(), capture_output=True, text=True, check=True).stdout.strip())


@contextlib.contextmanager
def scratch(commit: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit and, from this checkout's DVC cache, its outputs; it is deleted afterwards.

    UserError says that the cache lacks outputs.
    """
    (root() / ".dvc" / "tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root() / ".dvc" / "tmp", prefix="scratch-") as name:
        archive = subprocess.run(["git", "archive", commit], stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # before Python 3.11.4 (Debian 12 has 3.11.2) there is none
            tar.extractall(name)  # noqa: S202, filtered by the line above; the archive is of this repository
        (Path(name) / ".dvc" / "config.local").write_text(f"[core]\n    no_scm = true\n[cache]\n    dir = {cache()}\n")
        if subprocess.run(["dvc", "checkout", "--quiet"], cwd=name, capture_output=True, check=False).returncode:
            raise UserError("its outputs are not all in DVC's cache; `dvc fetch --all-commits` where there is a remote, or run it again")
        yield Path(name)


def sync() -> None:
    """Log to MLflow, from files, what it lacks of experiments, commits and the workspace.

    Prints a row for each of them and for each run of MLflow that belongs to none: what, the command that restores it, its run,
    what was done. UserError says that something could not be logged.
    """
    runs = {run.info.run_id: run for run in tracking.all_runs()}
    rows: list[tuple[str, str, str, str]] = []
    whole, known, seen = True, set(), set()
    for revision in [*revisions(), Revision("", "", "")]:
        name, commit, _ = revision
        try:
            lock = _git("show", f"{commit}:dvc.lock") if commit else Path("dvc.lock").read_text("utf-8")
        except (OSError, subprocess.CalledProcessError):
            continue  # nothing has run there
        fits, done = [], "was there"
        try:
            digest = tracking.lock_digest(lock)
            if (name, digest) in seen:
                continue
            seen.add((name, digest))
            fits = _complete(runs.values(), digest, name)
            if not fits:
                fits, done = [_log(revision)], "logged"
        except UserError as error:
            whole, done = False, f"not logged: {error}"
        known |= set(fits)
        rows.append((name or (f"commit {commit[:10]}" if commit else "workspace"), revision.restore, " ".join(fits), done))
    for run_id in sorted(runs.keys() - known):
        tags = runs[run_id].data.tags
        what = f"{tags.get('dvc.exp.name') or 'workspace'} of {tags.get('git.commit', '')[:10]}"
        rows.append((what, "", run_id, f"a run of no experiment or commit, {runs[run_id].info.status.lower()}"))
    table = pd.DataFrame(rows, columns=["what", "restored by", "run", "MLflow"])
    print(table.to_string(index=False) if rows else "no experiment, no commit with a dvc.lock, no run yet")
    if not whole:
        raise UserError("MLflow lacks what the table says")


def run_of(revision: Revision) -> str:
    """Return the run of MLflow that an experiment has or, where DVC restored all of it from its cache, gets now.

    UserError says that MLflow cannot be read or written, or that the cache lacks files.
    """
    digest = tracking.lock_digest(_git("show", f"{revision.commit}:dvc.lock"))
    return next(iter(_complete(tracking.all_runs(), digest, revision.name)), "") or _log(revision)


def _complete(runs: Iterable[Any], digest: str, name: str) -> list[str]:
    """Return those of the runs that have all of a dvc.lock, of an experiment or, as a commit may be made of one, of any."""
    finished = {run.info.run_id: run.data.tags for run in runs if run.info.status == "FINISHED"}
    return [i for i, tags in finished.items() if tags.get("dvc.lock") == digest and name in ("", tags["dvc.exp.name"])]


def _log(revision: Revision) -> str:
    """Log a revision and return its run."""
    os.environ["DVC_ROOT"] = str(root())  # also from within a scratch copy: the store and the times of the epochs lie there
    with scratch(revision.commit) if revision.commit else contextlib.nullcontext(Path()) as folder, contextlib.chdir(folder):
        if not revision.commit and subprocess.run(["dvc", "status", "--quiet"], check=False).returncode:
            raise UserError("changed since its pipeline ran; `dvc repro` runs and logs it")
        if missing := [stage for stage in tracking.STAGES if not tracking.outputs(stage)]:
            raise UserError(f"its pipeline did not come to its end, {missing[0]} is missing; run it again")
        with tracking.Mirror("plot", load_params(), origin=(revision.name, revision.baseline)) as mirror:
            pass
    if mirror.client is None:
        raise UserError("MLflow did not take it")
    return mirror.run_id


def verify(name: str) -> None:
    """Train, evaluate and plot an experiment or a commit again, in a scratch copy, compare every file, and print what differs.

    Ends with exit code 1 but where the files are identical or, where the first run had another machine, threads, precision or PyTorch,
    the test accuracies differ no more than those of two networks of equal skill do on n images, 95 of 100 times: 1.96 √(2 p (1 - p) / n).
    """
    commit = next((revision.commit for revision in revisions() if revision.name == name), name)
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").strip()
    except subprocess.CalledProcessError as error:
        raise UserError(f"{name} is no experiment and no commit; `dvc exp list --all-commits` has the experiments") from error
    with scratch(commit) as folder:
        first = {path: (folder / path).read_bytes() for stage in tracking.STAGES for path in tracking.outputs(stage, folder)}
        if not any(path.suffix == ".safetensors" for path in first):
            raise UserError(f"{name} holds no trained network: commit dvc.lock and metrics/ after `dvc repro`")
        key = tracking.training_key(load_params(folder / "params.yaml"), folder)
        # The scratch copy is a checkout of its own: no checkpoint, no run of MLflow is shared.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_EXP", "DVC_ROOT", "MLFLOW_TRACKING"))}
        command = ["dvc", "repro", "--force", "--single-item", "--no-run-cache", "--no-commit", *tracking.STAGES]
        if subprocess.run(command, cwd=folder, env=env, check=False).returncode:
            raise UserError(f"{name} did not run to its end here, see above")
        again = {path: (folder / path).read_bytes() for path in first if (folder / path).exists()}
        before, now = (tracking.read_diary(key, checkout)["conditions"] for checkout in (root(), folder))
    different = [path for path in first if first[path] != again.get(path)]
    if not different:
        print(f"identical: {len(first)} files of {name}, the weights included")
        return
    told = f"{len(different)} of {len(first)} files differ, first {different[0]}"
    if (weights := Path("models/network.safetensors")) in different:
        told += f"; of the weights first the tensor {_first_tensor(first[weights], again[weights])}"
    if before == now:
        print(f"not repeated on {now['device']}: {told}")
        sys.exit(1)
    changed = ", ".join(f"{k} {before.get(k, 'unknown')} → {now[k]}" for k in now if before.get(k) != now[k])
    old, new = (json.loads(files[Path("metrics/evaluate.json")])["accuracy"] for files in (first, again))
    images = first[Path("plots/predictions.csv")].count(b"\n") - 1
    bound = 1.96 * math.sqrt(2 * old * (1 - old) / images)
    told = f"{told}, as it may under other conditions ({changed}); what holds there: test accuracy {old:.2%} then, {new:.2%} now"
    held = abs(new - old) <= bound
    print(f"{told}, {'within' if held else 'NOT within'} ±{bound:.2%} for {images:,} images")
    if not held:
        sys.exit(1)


def _first_tensor(one: bytes, other: bytes) -> str:
    from safetensors.torch import load

    old, new = load(one), load(other)
    for name in old:
        if not old[name].equal(new[name]):
            return f"{name}, by up to {(old[name].double() - new[name].double()).abs().max().item():.3g}"
    return "none: the headers differ"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout
