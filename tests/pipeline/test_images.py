"""Images of one's own in the pipeline: DVC notices what changes."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.pictures import CATS, picture, write
from tests.support.project import Project, stages_run


def test_dvc_notices_a_changed_folder(project: Project, tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", CATS)
    project.edit("data", name="folder", folder=str(photos), image_size=8)
    output = project.dvc("repro", "download")
    assert "read 20 images of 2 classes (16 to train, 4 to test)" in output
    assert stages_run(project.dvc("repro", "download")) == []
    (photos / "cat/new.png").write_bytes(picture(99))
    (photos / "notes.txt").write_text("x")
    output = project.dvc("repro", "download")
    assert (
        "read 21 images of 2 classes (17 to train, 4 to test); unused or doubtful: 1 .txt" in output
    )
    problems = (project.folder / "plots/image_problems.csv").read_text("utf-8")
    assert problems == "file,kind,detail\nnotes.txt,.txt,\n"
    shutil.rmtree(photos / "dog")
    assert "holds one class only, cat" in project.dvc("repro", "download", check=False)


@pytest.mark.slow
def test_images_under_dvc_reach_temporary_copies_and_others_are_named(project: Project) -> None:
    small = {"name": "folder", "image_size": 8}
    project.edit("data", **small)
    project.edit("train", translate=1, batch_size=8, epochs=1)
    write(project.folder / "images", CATS)
    project.dvc("repro", "download")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=images")
    change = ("exp", "run", "--temp", "-S", "train.seed=1")
    output = project.dvc(*change, check=False)
    assert "DVC's temporary copy of the checkout lacks images/; set data.folder=/" in output
    (project.folder / "images").rename(project.folder / "photos")
    (project.folder / "photos/README.md").rename(project.folder / "README.md")
    (project.folder / "images").mkdir()
    (project.folder / "README.md").rename(project.folder / "images/README.md")
    project.dvc("add", "photos")
    project.edit("data", folder="photos")
    project.dvc("repro", "download")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=photos")
    output = project.dvc(*change, "train")
    assert stages_run(output) == ["train"]
    assert json.loads((project.folder / "data/dataset.json").read_text("utf-8"))["name"] == "photos"
