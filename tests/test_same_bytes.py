"""`bench.same_bytes` tells changed arithmetic from unchanged, in a clone with few variants."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from bench import same_bytes
from cifarlab.errors import UserError
from cifarlab.params.geometry import ModelParams
from cifarlab.params.load import load_params
from cifarlab.params.sections import EvaluateParams, TrainParams
from cifarlab.pipeline import stage_code
from tests.conftest import REPO

RECORD = "docs/studies/same-bytes.json"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose HEAD is this workspace, with three short variants."""
    listed = git(REPO, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / RECORD).unlink(missing_ok=True)
    trained = yaml.safe_load((tmp_path / "bench/same_bytes.yaml").read_text("utf-8"))
    trained["variants"] = {
        name: trained["variants"][name] for name in ("defaults", "resumed", "adam")
    }
    (tmp_path / "bench/same_bytes.yaml").write_text(
        yaml.safe_dump(trained, sort_keys=False), "utf-8"
    )
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "The project")
    return tmp_path


def run(folder: Path, rev: str = "HEAD") -> tuple[int, list[str]]:
    """Run the command; return its exit code and the lines that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.same_bytes", rev],
        cwd=folder, env={"PYTHONPATH": "src", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return done.returncode, (done.stdout or done.stderr).splitlines()


def edit(folder: Path, old: str, new: str) -> None:
    """Replace a text in every Python file under src that contains it."""
    found = [path for path in (folder / "src").rglob("*.py") if old in path.read_text("utf-8")]
    assert found
    for path in found:
        path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def test_the_variants_use_every_part_of_the_network_and_of_the_training() -> None:
    """Each parameter has several values, and all of its values if it has a list of them.

    The number of processes, their threads and their device are left out.
    """
    defaults = load_params(REPO / "params.yaml").flat()
    left_out = ["train.device", "train.graph", "train.processes", "train.threads"]
    left_out += ["evaluate.batch_size"]
    for name, fields in (
        ("model", ModelParams),
        ("train", TrainParams),
        ("evaluate", EvaluateParams),
    ):
        for key, field in fields.model_fields.items():
            choices = {
                value for value in get_args(field.annotation) if isinstance(value, str | int)
            }
            name_of = f"{name}.{key}"
            used = [variant.get(name_of) for variant in same_bytes.VARIANTS.values()]
            used += [same_bytes.SHARED.get(name_of)]
            if name_of not in left_out:  # with the defaults, which anyone may change
                assert len({*map(str, [*used, defaults[name_of]])} - {"None"}) > 1, key
                assert choices - {"auto"} <= {u for u in used if not isinstance(u, list)}, key


def test_an_unknown_commit_is_refused() -> None:
    code, lines = run(REPO, "no-such-commit")
    assert (code, len(lines)) == (1, 1)
    assert "'no-such-commit' is not a commit of this repository" in lines[0]


def test_parameters_to_leave_out_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError, match=r"WITHOUT: train.optimizerr is no parameter"):
        same_bytes.compare("HEAD", {"train.optimizerr": "sgd"})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_other_arithmetic_is_different_and_the_same_is_recorded_once(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changed constant belongs to Muon. The variant adam does not use it.

    If the code is the same as well, nothing is recorded.
    """
    identical = ["data", "defaults", "resumed", "adam"]
    expected = [f"identical  {name}" for name in identical] + ["identical: 3 variants"]
    assert run(clone) == (0, expected)
    assert not (clone / RECORD).exists()

    edit(clone, "beta=3.4445", "beta=3.4446")
    code, lines = run(clone)
    assert code == 1
    for line, name in zip(lines[1:3], ["defaults", "resumed"], strict=True):
        assert re.fullmatch(rf"DIFFERENT  {name}: first tensor [\w.]+, by up to \d.*", line)
    assert lines[0] == "identical  data"
    assert lines[3:] == ["identical  adam", "DIFFERENT: 3 variants"]
    assert not (clone / RECORD).exists()
    git(clone, "checkout", "--quiet", "src")

    edit(clone, "class Muon", "UNUSED = 1\n\n\nclass Muon")
    params = (clone / "params.yaml").read_text("utf-8")
    (clone / "params.yaml").write_text(
        params.replace("  layers:", "  unread: 7\n  layers:"), "utf-8"
    )
    edit(
        clone, 'stem: Literal["none", "whiten"]', 'unread: int\n    stem: Literal["none", "whiten"]'
    )
    assert run(clone) == (0, expected)
    (entry,) = json.loads((clone / RECORD).read_text("utf-8"))
    monkeypatch.chdir(clone)
    same_bytes.record(entry)
    assert json.loads((clone / RECORD).read_text("utf-8")) == [entry]
    machine = entry.pop("machine")
    assert machine
    digests = {"base_code": stage_code(REPO), "code": stage_code(clone)}
    base = git(clone, "rev-parse", "HEAD").strip()
    rest = {"new_parameters": {"model.unread": 7}, "old_parameters": {}, "without": {}}
    rest |= {"variants": 3}
    assert entry == {"base": base, **digests, **rest}
    # An entry that leaves something out is replaced by one that does not, and not the reverse.
    for without, left in (({}, {}), ({"train.optimizer": "sgd"}, {})):
        same_bytes.record(entry | {"without": without})
        assert [e["without"] for e in json.loads((clone / RECORD).read_text("utf-8"))] == [left]
    partial = entry | {"base_code": "older", "without": {"train.optimizer": "sgd"}}
    for new in (partial, partial | {"without": {}}):
        same_bytes.record(new)
        assert json.loads((clone / RECORD).read_text("utf-8"))[-1] == new
    assert len(json.loads((clone / RECORD).read_text("utf-8"))) == 2


def test_metrics_that_moved_to_another_file_are_no_difference(tmp_path: Path) -> None:
    both = {"metrics/evaluate.json": '{"accuracy": 0.5}', "plots/per_class.csv": "class\ncat\n"}
    old = both | {"metrics/evaluate.json": '{"accuracy": 0.5, "accuracy_per_class": {"cat": 1}}'}
    new = both | {"metrics/per_class.json": '{"cat": 1}'}
    for side, files in (("old", old), ("new", new)):
        for name, text in files.items():
            path = tmp_path / side / "defaults" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    one, other = (tmp_path / side / "defaults" for side in ("old", "new"))
    assert same_bytes.difference(one, other, set()) == ""
    (other / "plots/per_class.csv").write_text("class\ndog\n")
    assert "per_class.csv" in same_bytes.difference(one, other, set())
