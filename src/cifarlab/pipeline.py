"""The only module that knows DVC: stages, experiments, commits, the queue, scratch copies.

DVC itself is imported inside the functions that need it: a stage asks only for its key and its
outputs, and must not wait a second for that.
"""

import hashlib
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import psutil
import yaml
from pydantic import ValidationError

from cifarlab import files
from cifarlab.digest import code_digest, json_digest
from cifarlab.errors import DAMAGED, UserError, in_a_sentence, refuse_conflict, without_secrets
from cifarlab.params.load import parse_yaml
from cifarlab.params.sections import Params, flat

STAGES = ("train", "evaluate", "plot")  # all but download, in the order in which they run
RESULT = ("download", "train", "evaluate")  # those that make what a study compares
EVERY = ("download", *STAGES)


class Revision(NamedTuple):
    """A commit that holds outputs of the pipeline, or the workspace."""

    name: str
    """Name of the DVC experiment; empty for a commit of a branch and for the workspace."""
    commit: str
    """Full hash; empty for the workspace."""
    baseline: str
    """The commit that the experiment started from; for a commit of a branch, the commit itself."""

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.name or (f"commit {self.commit[:10]}" if self.commit else "workspace")

    @property
    def restore(self) -> str:
        """The command that brings it back into the workspace; empty for the workspace."""
        if self.name:
            # Experiments of other commits may have this name, too.
            return f"dvc exp apply {self.commit[:10] or shlex.quote(self.name)}"
        return f"git checkout {self.commit[:10]} && dvc checkout" if self.commit else ""


WORKSPACE = Revision("", "", "")
# Git sets some of these for the commands in its hooks.
OTHER_CHECKOUT = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE"}
OTHER_CHECKOUT |= {"GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}


def git(*arguments: str, check: bool = True) -> str:
    """Run git in the current folder and return its output; UserError if it fails or refuses to."""
    return _git(*arguments, check=check).decode("utf-8", "replace")


def _git(*arguments: str, check: bool = True) -> bytes:
    """Run git in the checkout of the current folder, like DVC, wherever a variable points."""
    env = {key: value for key, value in os.environ.items() if key not in OTHER_CHECKOUT}
    settings = ("core.autocrlf=false", "core.fsmonitor=false", "diff.autoRefreshIndex=true")
    command = ["git", *(part for setting in settings for part in ("-c", setting)), *arguments]
    done = subprocess.run(command, env=env | {"LC_ALL": "C"}, capture_output=True, check=False)
    # A checkout of another user: without this, it would look like one without commits.
    if done.returncode and (check or b"dubious ownership" in done.stderr):
        reason = " ".join(done.stderr.decode("utf-8", "replace").split())
        raise UserError(without_secrets(f"git {arguments[0]}: {reason or 'it failed'}"))
    return done.stdout


def git_commit(name: str = "HEAD") -> str:
    """Return the full hash of what Git calls so; empty if there is no such commit."""
    found = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False).strip()
    return found if found.isalnum() else ""  # a range gives several


def current_experiment() -> tuple[str, str]:
    """Return name and baseline commit of the experiment in which DVC runs this stage.

    Both are empty in `dvc repro`.
    """
    return os.environ.get("DVC_EXP_NAME", ""), os.environ.get("DVC_EXP_BASELINE_REV", "")


def refuse_shallow_clone() -> None:
    """Stop an experiment in a temporary copy whose result DVC would lose.

    DVC cannot bring the commit of `dvc exp run --temp` or `--queue` into a shallow clone, and does
    not say so.

    Raises
    ------
    UserError
        This is such a copy, and the main checkout is a shallow clone.
    """
    copy, root = Path.cwd() != files.root(), str(files.root())
    if copy and git("-C", root, "rev-parse", "--is-shallow-repository", check=False) == "true\n":
        advice = "`git fetch --unshallow` gets the rest, or leave out --temp and --queue"
        raise UserError(f"{root} is a shallow clone, in which DVC loses this experiment; {advice}")


def experiments() -> list[Revision]:
    """Return every DVC experiment of the main checkout, the newest first.

    It asks Git, because DVC needs a second, and is locked while a stage runs.
    """
    # The reference of the experiment NAME of the commit 0123… is refs/exps/01/23…/NAME.
    form = "--format=%(objectname)/%(refname:lstrip=2)"
    command = ("for-each-ref", "--sort=-committerdate", form, "refs/exps/??/*/*")
    lines = git("-C", str(files.root()), *command, check=False).splitlines()
    parts = [line.split("/") for line in lines]
    return [Revision(name, commit, start + rest) for commit, start, rest, name in parts]


def remove_experiments(revisions: Sequence[Revision]) -> None:
    """Remove experiments from DVC, and from its cache what nothing else uses.

    The cache keeps the outputs of every commit, and everything if it is not in this checkout: DVC
    does not know what other checkouts need. UserError: DVC cannot do it.
    """
    # By their references: experiments on two commits may have one name, and one commit two names.
    if refs := [f"refs/exps/{r.baseline[:2]}/{r.baseline[2:]}/{r.name}" for r in revisions]:
        dvc("exp", "remove", "--quiet", *refs)
    if Path(dvc("cache", "dir").strip()).resolve().is_relative_to(files.root().resolve()):
        dvc("gc", "--quiet", "--force", "--all-commits", "--all-experiments")
    else:
        print("DVC's cache keeps their files: other checkouts may need them (`dvc gc --help`)")


def dvc(*arguments: str) -> str:
    """Run a command of DVC and return its output; UserError if it fails."""
    done = subprocess.run(["dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`dvc {' '.join(arguments[:2])}` failed: {done.stderr.strip()}")
    return done.stdout


def find(name: str) -> Revision:
    """Return an experiment, or the commit that Git calls so.

    As in DVC's commands, a branch or tag comes first, then an experiment of the current commit.

    Raises
    ------
    UserError
        There is no such experiment or commit.
    """
    commit, head = git_commit(name), git_commit()
    named = [e for e in experiments() if e.name == name and commit in ("", e.commit)]
    if named:
        return next((experiment for experiment in named if experiment.baseline == head), named[0])
    if commit:
        return Revision("", commit, commit)
    advice = "`dvc exp list --all-commits` lists the experiments"
    raise UserError(f"{name} is not an experiment or a commit; {advice}")


def commits() -> list[Revision]:
    """Return every commit of a branch that changed dvc.lock, the newest first."""
    hashes = git("rev-list", "--branches", "HEAD", "--", str(files.DVC_LOCK)).split()
    return [Revision("", commit, commit) for commit in hashes]


def read(path: Path, commit: str) -> bytes:
    """Return the content of a file that Git or DVC tracks, as it is in a commit.

    Raises
    ------
    UserError
        The commit has no such file, or the content is neither in DVC's cache nor in its remote.
    """
    with tree(Revision("", commit, commit)) as open_file, open_file(path) as file:
        return file.read()


@contextmanager
def tree(revision: Revision) -> Iterator[Callable[[Path], BinaryIO]]:
    """Yield a function that opens files of a revision, to read bytes.

    For many files it is much faster than `read`. The function raises UserError if the
    revision has no such file, or if the content is neither in DVC's cache nor in its remote.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexError

    # In a commit, DVC starts at Git's top.
    top = git("rev-parse", "--show-prefix").strip() if revision.commit else ""
    with closing(DVCFileSystem(rev=revision.commit or None, subrepos=True)) as found:

        def open_file(path: Path) -> BinaryIO:
            lost = f"{path} of {revision.label} is neither in Git nor in DVC's cache or remote"
            with in_a_sentence(lost, DvcException, DataIndexError, OSError):
                return cast(BinaryIO, found.open(f"{top}{path}", "rb"))

        yield open_file


def outputs(stage: str, folder: Path = Path()) -> list[Path]:
    """Return the existing files that a stage writes, metrics included, relative to `folder`."""
    found = (path for out in _outs(stage, folder) for path in [out, *out.rglob("*")])
    return sorted(path.relative_to(folder) for path in found if path.is_file())


def output_digest(stage: str, folder: Path = Path()) -> str:
    """Hash the files that a stage has written in `folder`, as `Locked.digest` does."""
    found = [path for path in _outs(stage, folder) if path.is_file()]
    md5 = [hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in found]
    return json_digest({str(p.relative_to(folder)): h for p, h in zip(found, md5, strict=True)})


def params_of(revision: Revision) -> Params | None:
    """Return the parameters of a revision; None if the present version does not know them."""
    try:
        return Params.model_validate(parse_yaml(read_text(files.PARAMS, revision)))
    except (yaml.YAMLError, ValidationError):
        return None


class Locked(NamedTuple):
    """What dvc.lock says about the outputs of a stage that are files; folders are left out."""

    digest: str
    """Stands for the content of all files."""
    size: dict[str, int]


def read_text(path: Path, revision: Revision) -> str:
    """Return the text of a file that Git tracks; empty if there is none."""
    if revision.commit:
        return git("cat-file", "blob", f"{revision.commit}:./{path}", check=False)
    text = path.read_text("utf-8") if path.exists() else ""
    refuse_conflict(path, text)
    return text


def locked(revision: Revision) -> dict[str, Locked]:
    """Return the outputs of each stage in the dvc.lock of a revision.

    Raises
    ------
    UserError
        It is not a dvc.lock.
    """
    found, advice = {}, "`git checkout dvc.lock` or `dvc repro` repairs it"
    with in_a_sentence(f"its dvc.lock is damaged or missing; {advice}", yaml.YAMLError, *DAMAGED):
        for stage, entry in parse_yaml(read_text(files.DVC_LOCK, revision))["stages"].items():
            outs = [out for out in entry.get("outs", []) if "nfiles" not in out]
            md5, size = ({out["path"]: out[key] for out in outs} for key in ("md5", "size"))
            found[stage] = Locked(json_digest(md5), size)
    return found


def ran_as_asked(stages: Sequence[str], folder: Path = Path()) -> bool:
    """Tell whether dvc.lock says that these stages ran with what params.yaml has."""
    try:
        paths = folder / files.PARAMS, folder / files.DVC_LOCK
        asked, lock = (parse_yaml(path.read_text("utf-8")) for path in paths)
        ran = [lock["stages"][stage]["params"][str(files.PARAMS)].items() for stage in stages]
        return dict(flat(dict(chain(*ran)))).items() <= dict(flat(asked)).items()
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return False


def training_key(params: Params, folder: Path = Path(), data: str = "") -> str:
    """Hash the inputs of the train stage: its parameters, its code and the digest of its data.

    The same inputs give the same network, so the key names a training wherever and however often
    it runs. Comments, docstrings and formatting of the code do not count. `data` is the digest of
    the data, if they are not in `folder`.

    Raises
    ------
    UserError
        The data or the code is missing or damaged.
    """
    counted = tuple(f"{name}." for name in _stages(folder)["train"].get("params", []))
    inputs = {key: value for key, value in params.flat().items() if f"{key}.".startswith(counted)}
    description = folder / files.DATA / "dataset.json"
    problem = f"{description} is missing or damaged (%s); `dvc repro` makes the data again"
    with in_a_sentence(problem, OSError, *DAMAGED):
        inputs["data"] = data or files.read_json(description)["digest"]
    problem = "code is missing or damaged (%s); `git status` names what has changed"
    with in_a_sentence(problem, OSError, SyntaxError, ValueError):
        inputs["code"] = stage_code(folder, ["train"])
    return json_digest(inputs)


def dependencies(folder: Path = Path(), stages: Sequence[str] = RESULT) -> list[str]:
    """Return the files and folders that some stages of FOLDER/dvc.yaml depend on."""
    return sorted({path for stage in stages for path in _stages(folder)[stage]["deps"]})


def stage_code(folder: Path = Path(), stages: Sequence[str] = RESULT) -> str:
    """Return the digest of all Python files that some stages of FOLDER/dvc.yaml depend on."""
    return _code_of(folder / name for name in dependencies(folder, stages))


def network_code(folder: Path = Path()) -> str:
    """Return the digest of the code that says what the weights of a network compute."""
    paths = folder / "src/cifarlab/nn", folder / "src/cifarlab/params/geometry.py"
    return _code_of(path for path in paths if path.exists())  # old commits lack them


def has_this_network_code(commit: str) -> bool:
    """Tell whether the networks of a commit compute what those of this checkout compute."""
    with tracked_files(commit) as folder:
        return network_code(folder) == network_code()


def _code_of(paths: Iterable[Path]) -> str:
    code = {file for path in paths for file in [path, *path.rglob("*.py")] if file.suffix == ".py"}
    return code_digest(file.read_text("utf-8") for file in sorted(code))


def in_use(folder: Path) -> bool:
    """Tell whether a process works in a folder, such as the one of `dvc exp run --temp`."""
    here, processes = folder.resolve(), psutil.process_iter(["cwd"])
    return any(Path(process.info["cwd"] or "/").is_relative_to(here) for process in processes)


def workspace_is_current() -> bool:
    """Tell whether the outputs in the workspace are those of its parameters and code."""
    return subprocess.run(["dvc", "status", "--quiet"], check=False).returncode == 0


@contextmanager
def tracked_files(commit: str) -> Iterator[Path]:
    """Yield a temporary folder with the files of a commit that Git tracks."""
    files.scratch().mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files.scratch(), prefix="scratch-") as name:
        subprocess.run(["tar", "-x", "-C", name], input=_git("archive", commit), check=True)
        yield Path(name)


@contextmanager
def scratch_copy(commit: str, name: str = "it") -> Iterator[Path]:
    """Yield a temporary folder with the files of a commit and its outputs from DVC's cache.

    The copy has no Git and leaves the workspace alone. Messages call the commit `name`.

    Raises
    ------
    UserError
        The commit has no dvc.lock, or the cache lacks outputs.
    """
    with tracked_files(commit) as folder:
        if not (folder / files.DVC_LOCK).exists():
            raise UserError(f"{name} has no {files.DVC_LOCK}; run `dvc repro` and commit it")
        cache = dvc("cache", "dir").strip()
        mark = "'" if '"' in cache else '"'  # a path may hold # or a comma
        config = f"[core]\n    no_scm = true\n[cache]\n    dir = {mark}{cache}{mark}\n"
        (folder / ".dvc" / "config.local").write_text(config, "utf-8")
        checkout = ["dvc", "checkout", "--quiet"]
        if subprocess.run(checkout, cwd=folder, capture_output=True, check=False).returncode:
            advice = "`dvc exp pull REMOTE NAME` gets those of an experiment"
            advice += ", `dvc fetch --all-commits` those of commits; or run it again"
            raise UserError(f"{name} has outputs that are not in DVC's cache; {advice}")
        yield folder


def repeat(folder: Path) -> bool:
    """Run all stages but download again in a scratch copy; False if one failed.

    The copy acts as a checkout of its own, which shares no checkpoint and no MLflow store.
    """
    hidden = ("CIFARLAB", "DVC_EXP", "DVC_ROOT", "MLFLOW_TRACKING")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    command = ["dvc", "repro", "--force", "--single-item", "--no-run-cache", "--no-commit", *STAGES]
    return subprocess.run(command, cwd=folder, env=env, check=False).returncode == 0


def set_options(changes: dict[str, Any]) -> list[str]:
    """Return the options of `dvc exp run` that set parameters: ["-S", "model.layers=3", …]."""
    # Hydra does not read \u00e9.
    write = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    return [part for key, value in changes.items() for part in ("-S", f"{key}={write(value)}")]


def queued() -> dict[str, Revision]:
    """Return the experiments that wait in DVC's queue, by name.

    Raises
    ------
    UserError
        DVC cannot list them, or two have one name: the second would replace the first.
    """
    from dvc.repo import Repo

    with in_a_sentence("DVC cannot list its queue: %s"), Repo() as repo:
        tasks = repo.experiments.celery_queue.status()
    found: dict[str, Revision] = {}
    for task in [task for task in tasks if task["status"] == "Queued"]:
        if (name := task["name"]) in found:
            way_out = f"remove one: `dvc queue remove {task['rev'][:7]}`"
            raise UserError(f"two experiments called {name} are queued; {way_out}")
        found[name] = Revision(name, task["rev"], "")
    return found


def differences(revision: Revision) -> dict[str, Any]:
    """Return the parameters that a revision has, valid or not, and the workspace has not."""
    texts = (read_text(files.PARAMS, at) for at in (WORKSPACE, revision))
    now, then = (dict(flat(parse_yaml(text))) for text in texts)
    return {key: value for key, value in then.items() if now.get(key) != value}


def _outs(stage: str, folder: Path) -> list[Path]:
    entry = _stages(folder)[stage]
    listed = [*entry.get("outs", []), *entry.get("metrics", [])]
    return [folder / (next(iter(out)) if isinstance(out, dict) else out) for out in listed]


def _stages(folder: Path) -> Any:
    problem = "dvc.yaml is damaged (%s); `git checkout dvc.yaml` repairs it"
    with in_a_sentence(problem, yaml.YAMLError, LookupError, TypeError):
        return parse_yaml(read_text(folder / files.DVC_YAML, WORKSPACE))["stages"]
