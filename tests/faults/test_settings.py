"""What a user has set for other programs changes no byte and breaks no command."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
import yaml

from cifarlab import files, pipeline
from cifarlab.errors import UserError
from tests.conftest import REPO
from tests.support.project import Project

# Draws with the real code, in a new process: matplotlib reads its settings when it is imported.
DRAW = """
import importlib.util, sys
from pathlib import Path
import pandas as pd
from cifarlab.figures import run, style

def program(name):
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/studies/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

counts = pd.DataFrame({"actual/predicted": ["cat", "dog"], "cat": [3, 1], "dog": [2, 4]})
history = pd.DataFrame({"epoch": [1, 2], "train_loss": [2, 1.5], "train_accuracy": [0.4, 0.5]})
history = history.assign(val_loss=[2.1, 1.6], val_accuracy=[0.3, 0.4])
style.apply()
figures = {
    "confusion": run.confusion_heatmap(counts.set_index("actual/predicted"), normalized=False),
    "curves": run.curves(history, "training", 0.2),
}
for name, figure in figures.items():
    style.save(figure, Path(name + ".png"), 60)
for name in ("gradient", "backprop"):
    style.save(program(name).draw(), Path(name + ".png"), 60)
"""
MATPLOTLIBRC = {
    "agg.path.chunksize": 3,
    "axes.formatter.limits": "-1, 1",
    "axes.grid": True,
    "axes.labelpad": 30,
    "axes.linewidth": 7,
    "axes.titlesize": 40,
    "axes.unicode_minus": False,
    "axes.xmargin": 0.4,
    "backend": "TkAgg",
    "figure.dpi": 40,
    "figure.figsize": "2, 2",
    "figure.max_open_warning": 1,
    "font.family": "serif",
    "font.size": 30,
    "image.cmap": "jet",
    "image.interpolation": "bilinear",
    "image.origin": "lower",
    "image.resample": False,
    "interactive": True,
    "legend.loc": "lower center",
    "lines.antialiased": False,
    "lines.linewidth": 9,
    "mathtext.fontset": "cm",
    "patch.linewidth": 6,
    "path.simplify": False,
    "path.sketch": "5, 100, 2",
    "path.snap": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 33,
    "savefig.facecolor": "red",
    "savefig.format": "svg",
    "savefig.pad_inches": 1,
    "savefig.transparent": True,
    "text.antialiased": False,
    "text.hinting": "none",
    "text.usetex": True,
    "timezone": "Asia/Tokyo",
    "xtick.labelsize": 25,
    "xtick.major.size": 20,
    "ytick.direction": "in",
}


def drawn(folder: Path, **env: str) -> dict[str, str]:
    """Draw in a folder; return the digest of each picture."""
    foreign = ("MPL", "MATPLOTLIB", "FREETYPE", "PYTHON")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    # The list of fonts takes seconds to make.
    clean |= {"PYTHONPATH": str(REPO / "src"), "MPLCONFIGDIR": mpl.get_cachedir()}
    command = [sys.executable, "-c", DRAW, str(REPO)]
    subprocess.run(command, cwd=folder, env=clean | env, check=True, timeout=120)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pictures = drawn(tmp_path_factory.mktemp("plain"))
    assert len(pictures) == 4
    return pictures


def matplotlibrc(path: Path) -> Path:
    """Write a file that matplotlib accepts as a whole."""
    path.write_text("".join(f"{key}: {value}\n" for key, value in MATPLOTLIBRC.items()), "utf-8")
    assert mpl.rc_params_from_file(path, use_default_template=False).keys() == MATPLOTLIBRC.keys()
    return path


@pytest.mark.slow
def test_the_settings_of_matplotlib_change_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(REPO)])
    pictures = []
    for settings in (mpl.rcdefaults, lambda: mpl.rc_file(matplotlibrc(tmp_path / "rc"))):
        with mpl.rc_context():
            settings()
            exec(DRAW, {})
        pictures.append({path.name: path.read_bytes() for path in tmp_path.glob("*.png")})
    assert len(pictures[0]) == 4
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["working folder", "MATPLOTLIBRC", "XDG_CONFIG_HOME"])
def test_no_place_for_the_settings_of_matplotlib_changes_a_picture(
    tmp_path: Path, plain: dict[str, str], where: str
) -> None:
    env: dict[str, str] = {
        "working folder": {"MPLBACKEND": "TkAgg"},
        "MATPLOTLIBRC": {
            "MATPLOTLIBRC": str(matplotlibrc(tmp_path / "rc")),
            "FREETYPE_PROPERTIES": "truetype:interpreter-version=35",
        },
        "XDG_CONFIG_HOME": {"MPLCONFIGDIR": "", "XDG_CONFIG_HOME": str(tmp_path)},
    }[where]
    (tmp_path / "matplotlib").mkdir()
    matplotlibrc(tmp_path / "matplotlib/matplotlibrc")
    (tmp_path / "work").mkdir()
    if where == "working folder":
        matplotlibrc(tmp_path / "work/matplotlibrc")
    assert drawn(tmp_path / "work", **env) == plain


def test_an_unknown_backend_does_not_matter(tmp_path: Path) -> None:
    code = "from cifarlab.figures import style; style.apply()"
    env = os.environ | {"PYTHONPATH": str(REPO / "src"), "MPLBACKEND": "nonsense"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)


# Git, DVC and Python

GITCONFIG = """
[color]
ui = always
[commit]
gpgSign = true
[core]
autocrlf = true
eol = crlf
fsmonitor = /bin/false
hooksPath = {home}/hooks
pager = /bin/false
[diff]
autoRefreshIndex = false
external = /bin/false
[format]
pretty = oneline
[gpg]
program = /bin/false
[log]
decorate = full
follow = true
showSignature = true
[status]
showUntrackedFiles = no
"""
DVC_CONFIG = """
[cache]
type = "hardlink,symlink"
[core]
autostage = true
checksum_jobs = 1
[exp]
auto_push = true
"""
SETTINGS = {
    "FREETYPE_PROPERTIES": "truetype:interpreter-version=35",
    "GIT_EXTERNAL_DIFF": "/bin/false",
    "MPLBACKEND": "TkAgg",
    "PYTHONIOENCODING": "ascii",
    "PYTHONOPTIMIZE": "2",
    "PYTHONSAFEPATH": "1",
    "TZ": "Pacific/Kiritimati",
}


def hostile_home(home: Path) -> None:
    """Write the settings of a user, with hooks that fail."""
    (home / "hooks").mkdir(parents=True)
    for name in ("pre-commit", "commit-msg", "post-commit", "post-checkout"):
        (home / "hooks" / name).write_text("#!/bin/sh\necho a hook; exit 1\n", "utf-8")
        (home / "hooks" / name).chmod(0o755)
    (home / ".gitconfig").write_text(GITCONFIG.format(home=home), "utf-8")
    (home / ".config/dvc").mkdir(parents=True)
    (home / ".config/dvc/config").write_text(DVC_CONFIG, "utf-8")
    matplotlibrc(home / "matplotlibrc")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit of dvc.lock and .gitattributes, which is the working folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    shutil.copy(REPO / ".gitattributes", folder)
    (folder / "dvc.lock").write_bytes(b"schema: '2.0'\nstages: {}\n")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "--all"], check=True)
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *author, "commit", "--quiet", "--message=x"], check=True)
    return folder


def test_settings_of_git_do_not_change_what_it_answers(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> list[object]:
        [commit] = pipeline.commits()
        archive = pipeline._git("archive", commit.commit)
        return [commit, pipeline.git_commit(), pipeline.read_text(files.DVC_LOCK, commit), archive]

    plain = answers()
    assert plain[2] == "schema: '2.0'\nstages: {}\n"
    hostile_home(tmp_path / "home")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "/bin/false")
    assert answers() == plain
    os.utime("dvc.lock", (1, 1))  # another time of the same content is no difference
    assert pipeline.git("diff", "--name-only", "HEAD", "--", "dvc.lock") == ""


def test_a_clone_has_the_same_bytes_with_the_line_ends_of_windows(
    repository: Path, tmp_path: Path
) -> None:
    options = ("-c", "core.autocrlf=true", "-c", "core.eol=crlf")
    subprocess.run(["git", *options, "clone", "--quiet", ".", tmp_path / "clone"], check=True)
    assert (tmp_path / "clone/dvc.lock").read_bytes() == (repository / "dvc.lock").read_bytes()


def test_the_reason_why_git_refuses_is_shown(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for ask in (pipeline.git_commit, pipeline.commits):
        with pytest.raises(UserError) as caught:
            ask()
        assert "dubious ownership" in str(caught.value)
        assert f"git config --global --add safe.directory {repository}" in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    assert pipeline.git_commit("nobody") == ""


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONWARNINGS": "error"},
    ],
)
def test_the_command_line_works_with_any_locale_and_filter_of_warnings(
    tmp_path: Path, env: dict[str, str]
) -> None:
    code = """if True:
        import warnings, click
        from cifarlab import cli
        @cli.main.command()
        def show():
            warnings.warn("old")
            click.echo("a \\u2192 b")
        cli.main(["show"])
    """
    paths = os.environ | {"PYTHONPATH": str(REPO / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=paths | env, timeout=120, capture_output=True, check=True)
    assert done.stdout.decode() in ("a → b\n", "a \\u2192 b\n")


@pytest.mark.parametrize("stage", ["download", "train", "evaluate", "plot"])
def test_the_command_of_a_stage_finds_its_code(tmp_path: Path, stage: str) -> None:
    for name in ("src", "stages"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "other/stages").mkdir(parents=True)  # a package of the same name
    (tmp_path / "other/stages/__init__.py").write_text("raise SystemExit('wrong')", "utf-8")
    command = yaml.safe_load((REPO / "dvc.yaml").read_text("utf-8"))["stages"][stage]["cmd"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for settings in ({"PYTHONSAFEPATH": "1"}, {"PYTHONPATH": str(tmp_path / "other")}):
        env = os.environ | {"PATH": path} | settings
        done = subprocess.run(
            ["sh", "-c", command],
            check=False,
            cwd=tmp_path,
            env=env,
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert done.stderr.startswith("error: params.yaml cannot be read"), done.stderr


def outputs(project: Project) -> dict[str, bytes]:
    """Return the content of dvc.lock and of all that the stages write."""
    folders = ("data", "models", "plots", "metrics")
    paths = [path for folder in folders for path in (project.folder / folder).rglob("*")]
    kept = [project.folder / "dvc.lock", *(path for path in paths if path.is_file())]
    return {str(path.relative_to(project.folder)): path.read_bytes() for path in kept}


@pytest.fixture
def all_settings(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables of a user with all these settings."""
    hostile_home(tmp_path / "home")
    before = os.umask(0o077)
    yield SETTINGS | {
        "HOME": str(tmp_path / "home"),
        "MATPLOTLIBRC": str(tmp_path / "home/matplotlibrc"),
    }
    os.umask(before)


@pytest.mark.slow
def test_no_setting_changes_a_byte_and_verify_repeats_the_commit(
    drawing_project: Project, all_settings: dict[str, str]
) -> None:
    project, command = drawing_project, ("python", "-m", "cifarlab.cli", "verify", "HEAD")
    project.edit("tracking", log_model=False)
    project.dvc("repro")
    assert "HEAD has no dvc.lock" in project.run(*command, check=False, PYTHONPATH="src").stdout
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=without settings")
    before = outputs(project)
    assert len(before) > 15
    project.dvc("repro", "--force", "--no-run-cache", **all_settings)
    assert outputs(project) == before
    env = all_settings | {"PYTHONPATH": "src", "PYTHONWARNINGS": "error"}
    assert "identical: 14 files of HEAD" in project.run(*command, **env).stdout
    assert project.run("git", "status", "--porcelain", **all_settings).stdout == ""
