"""What the project asks DVC and Git: keys, outputs, experiments, commits, scratch copies."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from dvc.repo.experiments.queue.celery import LocalCeleryQueue

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.params.sections import Params
from tests.conftest import REPO

Make = Callable[..., Params]
DATASET = '{"name": "tiny", "digest": "0123"}'


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Return a folder with dvc.yaml, the code of the train stage and the digest of its data."""
    folder = tmp_path / "code"
    stages = yaml.safe_load((REPO / "dvc.yaml").read_text("utf-8"))["stages"]
    for name in ["dvc.yaml", *(dep for dep in stages["train"]["deps"] if dep != "data")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, folder / name)
    (folder / "data").mkdir()
    (folder / "data/dataset.json").write_text(DATASET)
    return folder


@pytest.mark.parametrize(
    ("change", "value", "counts"),
    [
        ("train.lr", 0.01, True),
        ("model.layers", 2, True),
        ("data.validation", 0.2, True),
        ("data.validation_seed", 1, True),
        ("plot.dpi", 50, False),
        ("evaluate.batch_size", 7, False),
        ("tracking.experiment", "x", False),
    ],
)
def test_the_key_depends_on_the_parameters_of_the_training(
    code: Path, make_params: Make, change: str, value: object, counts: bool
) -> None:
    before = pipeline.training_key(make_params(), code)
    assert (pipeline.training_key(make_params({change: value}), code) != before) == counts


def test_the_key_depends_on_the_data(code: Path, make_params: Make) -> None:
    before = pipeline.training_key(make_params(), code)
    (code / "data/dataset.json").write_text(DATASET.replace("0123", "4567"))
    assert pipeline.training_key(make_params(), code) != before


def change_constant(source: str) -> str:
    return source + "\nADDED = 1\n"


def reformat(source: str) -> str:
    return "# A comment.\n\n\n" + source.replace("\n\n", "\n\n# Another one.\n\n") + "\n\n\n"


@pytest.mark.parametrize("name", ["stages/train.py", "src/cifarlab/training/loop.py"])
@pytest.mark.parametrize(("change", "counts"), [(change_constant, True), (reformat, False)])
def test_the_key_depends_on_code_but_not_on_comments_and_formatting(
    code: Path, make_params: Make, name: str, change: Callable[[str], str], counts: bool
) -> None:
    before = pipeline.training_key(make_params(), code)
    path = code / name
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    assert (pipeline.training_key(make_params(), code) != before) == counts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/dataset.json", None),
        ("data/dataset.json", "{"),
        ("data/dataset.json", "[]"),
        ("data/dataset.json", "{}"),
        ("stages/train.py", None),
        ("stages/train.py", "def"),
    ],
)
def test_without_data_or_code_there_is_no_key(
    code: Path, make_params: Make, name: str, text: str | None
) -> None:
    (code / name).unlink() if text is None else (code / name).write_text(text)
    with pytest.raises(UserError, match="missing or damaged"):
        pipeline.training_key(make_params(), code)


def test_outputs_are_the_files_that_exist(code: Path) -> None:
    assert pipeline.outputs("train", code) == []
    for name in ("models/network.safetensors", "metrics/train.json", "plots/per_class.csv"):
        (code / name).parent.mkdir(exist_ok=True)
        (code / name).write_text("")
    expected = [Path("metrics/train.json"), Path("models/network.safetensors")]
    assert pipeline.outputs("train", code) == expected
    assert pipeline.outputs("evaluate", code) == [Path("plots/per_class.csv")]


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        *((lock, "dvc.lock is damaged") for lock in ("", "[]", "stages: 1", "stages: {a: 1}")),
        ("<<<<<<< HEAD\nstages: {}", r"merge conflict.*`git checkout --ours dvc\.lock`"),
    ],
)
def test_a_damaged_lock_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(lock)
    with pytest.raises(UserError, match=reason):
        pipeline.locked(pipeline.WORKSPACE)


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        ("{model.layers: 3, train: {lr: 0.1}}", True),
        ("{model: {layers: 3}, train.widths: [1, 2]}", True),
        ("{train.widths: [1, 3]}", False),
        ("{model.layers: 4, train: {lr: 0.1}}", False),
        ("{model.layers: 3, train: {lr: 0.1, old: 1}}", False),
        ("{model.depth: 3}", False),
        (None, False),
    ],
)
def test_a_lock_tells_whether_a_training_is_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str | None, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{model: {layers: 3}, train: {lr: 1e-1, widths: [1, 2]}}")
    if lock:
        Path("dvc.lock").write_text(f"stages: {{train: {{params: {{params.yaml: {lock}}}}}}}")
    assert pipeline.ran_as_asked(["train"]) is expected


def test_a_damaged_pipeline_is_reported(tmp_path: Path) -> None:
    for text, reason in (
        ("stages:\n  a: 1\n b", r"dvc\.yaml is damaged \(.*git checkout dvc\.yaml"),
        ("<<<<<<< HEAD\nstages:\n  a: 1\n=======\n", r"dvc\.yaml holds a merge conflict"),
    ):
        (tmp_path / "dvc.yaml").write_text(text)
        with pytest.raises(UserError, match=reason):
            pipeline.dependencies(tmp_path)


def test_a_stage_may_have_no_parameters_and_no_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {check: {cmd: pytest, deps: [a.py]}}")
    Path("dvc.lock").write_text("stages: {check: {cmd: pytest}}")
    assert pipeline.outputs("check") == []
    assert pipeline.locked(pipeline.WORKSPACE)["check"].size == {}


def test_two_experiments_of_one_name_in_the_queue_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"name": "same", "status": "Queued", "rev": "a" * 40}
    monkeypatch.setattr(LocalCeleryQueue, "status", lambda _: [task, task | {"rev": "b" * 40}])
    with pytest.raises(UserError, match="two experiments called same are queued; remove one: `dvc"):
        pipeline.queued()


def test_the_experiment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    assert pipeline.current_experiment() == ("", "")
    monkeypatch.setenv("DVC_EXP_NAME", "try")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc")
    assert pipeline.current_experiment() == ("try", "abc")


@pytest.fixture
def project(small_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter the small project."""
    monkeypatch.chdir(small_project)
    return small_project


@pytest.mark.usefixtures("project")
def test_experiments_and_commits_are_listed() -> None:
    head = pipeline.git_commit()
    assert pipeline.commits() == [pipeline.Revision("", head, head)]
    found = pipeline.experiments()
    assert {(revision.name, revision.baseline) for revision in found} == {
        ("n-2", head),
        ("n-3", head),
    }
    for revision in found:
        assert pipeline.find(revision.name) == revision
    assert pipeline.find("main") == pipeline.find(head[:8]) == pipeline.Revision("", head, head)
    for name in ("nobody", "HEAD..HEAD"):
        with pytest.raises(UserError, match=f"{name} is not an experiment or a commit"):
            pipeline.find(name)


def test_a_name_means_what_it_means_to_dvc(
    small_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(small_project, tmp_path / "copy", symlinks=True))
    head, other = pipeline.git_commit(), "b" * 40
    newer = pipeline.Revision("twice", "1" * 40, other)
    here = pipeline.Revision("twice", "2" * 40, head)
    monkeypatch.setattr(pipeline, "experiments", lambda: [newer, here])
    assert pipeline.find("twice") == here
    monkeypatch.setattr(pipeline, "experiments", lambda: [newer, newer])
    assert pipeline.find("twice") == newer
    pipeline.git("branch", "twice")
    assert pipeline.find("twice") == pipeline.Revision("", head, head)


@pytest.mark.usefixtures("project")
def test_files_are_read_from_an_experiment_and_a_commit() -> None:
    by_name = {revision.name: revision for revision in pipeline.experiments()}
    for name in ("params.yaml", "train.txt"):  # one is in Git, the other in DVC's cache
        assert pipeline.read(Path(name), by_name["n-3"].commit) == b"n: 3\n"
        assert pipeline.read(Path(name), "main") == b"n: 1\n"
    assert "train.txt" in pipeline.read_text(Path("dvc.lock"), by_name["n-3"])
    for revision in (pipeline.WORKSPACE, pipeline.Revision("", "main", "main")):
        lock = pipeline.locked(revision)
        assert lock["train"].size == {"train.txt": 5}
        assert lock["train"].digest == pipeline.output_digest("train")
    assert pipeline.read_text(Path("missing"), by_name["n-3"]) == ""
    with pytest.raises(UserError, match=r"missing.txt of commit \w{10} is neither in Git"):
        pipeline.read(Path("missing.txt"), by_name["n-3"].commit)


def test_only_the_given_experiments_are_removed(
    small_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(small_project, tmp_path / "copy", symlinks=True))
    first, second = pipeline.experiments()
    pipeline.remove_experiments([])
    assert pipeline.experiments() == [first, second]
    # An experiment that changes nothing may be the same commit under another name.
    base, same = second.baseline, second._replace(name="same")
    pipeline.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/same", second.commit)
    pipeline.remove_experiments([first, same])
    assert pipeline.experiments() == [second]


def test_files_of_a_commit_are_read_in_a_project_in_a_subfolder(
    small_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer/inner"
    shutil.copytree(small_project, inner, symlinks=True)
    shutil.rmtree(inner / ".git")
    monkeypatch.chdir(inner)
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (("init", str(outer)), ("add", "."), ("commit", "--message=outer")):
        subprocess.run(["git", *identity, *command], check=True, capture_output=True)
    head = pipeline.find("HEAD")
    with pipeline.tree(head) as open_file:
        for name in ("params.yaml", "train.txt"):
            assert pipeline.read(Path(name), head.commit) == b"n: 1\n"
            with open_file(Path(name)) as file:
                assert file.read() == b"n: 1\n"


def test_a_scratch_copy_has_the_outputs_and_can_be_repeated(project: Path) -> None:
    commit = pipeline.find("n-3").commit
    with pipeline.scratch_copy(commit) as folder:
        assert (folder / "train.txt").read_text() == "n: 3\n"
        (folder / "train.txt").unlink()
        assert pipeline.repeat(folder)
        assert (folder / "train.txt").read_text() == "n: 3\n"
        (folder / "params.yaml").unlink()
        assert not pipeline.repeat(folder)
    assert not folder.exists()
    assert (project / "train.txt").read_text() == "n: 1\n"
    assert pipeline.workspace_is_current()


def test_a_scratch_copy_finds_a_cache_whose_path_has_any_character(
    project: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "C#, really"
    (project / ".dvc/cache").rename(cache)
    (project / ".dvc/config.local").write_text(f'[cache]\n    dir = "{cache}"\n')
    try:
        with pipeline.scratch_copy("HEAD") as folder:
            assert (folder / "train.txt").read_text() == "n: 1\n"
    finally:
        (project / ".dvc/config.local").unlink()
        cache.rename(project / ".dvc/cache")


def test_a_scratch_copy_needs_the_cache(project: Path) -> None:
    (project / ".dvc/cache").rename(project / ".dvc/elsewhere")
    try:
        with pytest.raises(UserError, match="HEAD has outputs that are not in DVC's cache"):  # noqa: SIM117
            with pipeline.scratch_copy("HEAD", "HEAD"):
                pytest.fail("there is nothing to copy")
    finally:
        (project / ".dvc/elsewhere").rename(project / ".dvc/cache")
    assert not list((project / ".dvc/tmp").glob("scratch-*"))


def test_a_list_is_passed_to_dvc_as_one_value() -> None:
    options = pipeline.set_options({"model.widths": [16, 32], "data.name": "digits"})
    assert options == ["-S", "model.widths=[16,32]", "-S", 'data.name="digits"']


@pytest.mark.parametrize("value", ["/home/josé/photos", "Vögel", "鳥", "a b, [c]: {d} 'e'"])
def test_a_text_of_any_script_reaches_dvc_as_it_is(tmp_path: Path, value: str) -> None:
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_text("data:\n  folder: images\n")
    [_, override] = pipeline.set_options({"data.folder": value})
    apply_overrides(path, [override])
    assert yaml.safe_load(path.read_text("utf-8")) == {"data": {"folder": value}}
