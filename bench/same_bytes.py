"""`make same-bytes BASE=…`: do a commit and the workspace train the same bytes?

Small variants (bench/same_bytes.yaml) are trained and evaluated with both codes on this machine,
and everything that they write is compared. Where all of it is identical,
docs/studies/same-bytes.json gets an entry: results that the commit's code made are then valid for
the code of the workspace, too.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from cifarlab.errors import UserError
from cifarlab.files import EQUAL_CODE, WEIGHTS, atomic
from cifarlab.pipeline import stage_code

# Loaded once: every stage runs in a process that is forked from this one.
SLOW_IMPORTS = ("mlflow", "pandas", "sklearn.metrics", "torch", "torchvision.transforms.v2")
FORK = multiprocessing.get_context("fork")

CODE = ("src", "stages", "dvc.yaml", "params.yaml")
TRAINED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
SHARED, VARIANTS = TRAINED["shared"], TRAINED["variants"]
RESUMED, UNINTERRUPTED = "resumed", "defaults"
Parameters = dict[str, Any]


def compare(rev: str, without: Parameters) -> bool:
    """Train the variants with both codes and print a line for each; return whether none differs.

    Variants with one of the parameters `without` are left out.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        raise UserError(
            f"{rev!r} is not a commit of this repository; `git log --oneline` lists them"
        )
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as name:
        base, workspace = Path(name) / "base", Path(name) / "workspace"
        copy_commit(commit, base)
        copy_workspace(workspace)
        old, new = flat(base), flat(workspace)
        if unknown := [key for key in without if key not in new]:
            raise UserError(f"WITHOUT: {unknown[0]} is no parameter; give KEY=VALUE")
        chosen = {
            name: own
            for name, own in VARIANTS.items()
            if not any((new | SHARED | own).get(key) == value for key, value in without.items())
        }
        lacking = {name: [k for k in own if k not in old] for name, own in chosen.items()}
        compared = [name for name in chosen if not lacking[name]]
        if not compared:
            raise UserError("no variant is left that both can train")
        for variant in ["data", *compared]:
            changes = SHARED | VARIANTS.get(variant, {})
            prepare(base / variant, {k: v for k, v in (old | new | changes).items() if k in old})
            prepare(workspace / variant, {k: v for k, v in (new | changes).items() if k in new})
        same = True
        for variant, found in differences(base, workspace, compared, {*old} ^ {*new}):
            print(
                f"DIFFERENT  {variant}: {found}" if found else f"identical  {variant}", flush=True
            )
            same = same and not found
        code = {"base_code": stage_code(base), "code": stage_code(workspace)}
    for variant, keys in lacking.items():
        if keys:
            print(f"not compared {variant}: {rev} has no {', '.join(keys)}")
    print(f"{'identical' if same else 'DIFFERENT'}: {len(compared)} variants")
    if same and (code["base_code"] != code["code"] or old.keys() != new.keys()):
        added = {key: value for key, value in new.items() if key not in old}
        removed = {key: value for key, value in old.items() if key not in new}
        limits = {"new_parameters": added, "old_parameters": removed, "without": without}
        rest = {"variants": len(compared), "machine": processor()}
        record({"base": commit, **code, **limits, **rest})
    return same


def copy_commit(commit: str, folder: Path) -> None:
    """Write code and parameters of a commit."""
    folder.mkdir()
    command = ["git", "archive", commit, *CODE]
    archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)


def copy_workspace(folder: Path) -> None:
    """Copy code and parameters of the workspace, also new files, but none that Git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *CODE]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if Path(name).exists():  # Git lists a deleted file until the deletion is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)


def flat(folder: Path) -> Parameters:
    """Return what params.yaml says, by dotted key."""
    content = yaml.safe_load((folder / "params.yaml").read_text("utf-8"))
    return {f"{name}.{key}": v for name, section in content.items() for key, v in section.items()}


def prepare(folder: Path, parameters: Parameters) -> None:
    """Make the folder of a variant: its parameters, links to the code and to the data."""
    content: dict[str, Parameters] = {}
    for key, value in parameters.items():
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = value
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(content), "utf-8")
    for name in ("src", "stages", "dvc.yaml"):
        (folder / name).symlink_to(folder.parent / name)
    if folder.name != "data":  # the folder that the data are made in
        (folder / "data").symlink_to(folder.parent / "data" / "data")


def differences(
    base: Path, workspace: Path, variants: list[str], unshared: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield the data and each variant with the first difference, or what failed; "" for none."""
    sides = {"the commit": base, "the workspace": workspace}
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        for first, *others in (["data"], variants):  # no variant before the data are there
            names = [first, *others]
            tasks = {
                name: [pool.submit(produce, s / name) for s in sides.values()] for name in names
            }
            for name, pair in tasks.items():
                results = zip(sides, (task.result() for task in pair), strict=True)
                found = "; ".join(f"{failed} with {side}" for side, failed in results if failed)
                found = found or difference(base / name, workspace / name, unshared)
                if name == RESUMED and not found:
                    found = difference(workspace / UNINTERRUPTED, workspace / RESUMED, set())
                    found += " beside the training that was not killed" if found else ""
                yield name, found


def produce(folder: Path) -> str:
    """Make the data or train and evaluate a variant; return what failed, "" for nothing."""
    if folder.name == RESUMED:
        code, output = run_stage(folder, "train", kill_at="epoch 2/")
        if code != -signal.SIGKILL:
            return f"stages.train was not killed but ended with {code}: {output}"
    for stage in ["download"] if folder.name == "data" else ["train", "evaluate"]:
        code, output = run_stage(folder, stage)
        if code:
            return f"stages.{stage} ended with {code}: {' '.join(output.splitlines()[-1:])}"
        if folder.name == RESUMED and stage == "train" and "continuing after epoch" not in output:
            return "stages.train started over after it was killed"
    return ""


def run_stage(folder: Path, stage: str, kill_at: str = "") -> tuple[int | None, str]:
    """Run a stage in a process of its own; return its exit code and output.

    It is killed as soon as its output holds a line with the text `kill_at`.
    """
    reader, writer = os.pipe()
    process = FORK.Process(target=enter_stage, args=(folder, stage, writer))
    process.start()
    os.close(writer)
    output = []
    with open(reader, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123, a descriptor
        for line in lines:
            output.append(line)
            if kill_at and kill_at in line:
                process.kill()
    process.join()
    return process.exitcode, "".join(output)


def enter_stage(folder: Path, stage: str, output: int) -> None:
    """Run a stage here, with the code of its folder and nothing of the workspace's environment."""
    import torch

    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith(("DVC", "MLFLOW", "PYTHONPATH"))]:
        del os.environ[name]
    # Nobody listens on port 9: MLflow costs no time, and a stage goes on without it.
    retries = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    os.environ.update({"DVC_ROOT": str(folder), "CUDA_VISIBLE_DEVICES": "", **retries})
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("bench", "cifarlab", "stages")
    ]:
        del sys.modules[name]
    here = Path(__file__).resolve().parent.parent
    ours = {here, here / "src"}
    others = [path for path in sys.path if Path(path).resolve() not in ours]
    sys.path[:] = [str(folder), str(folder / "src"), *others]
    torch.set_num_threads(1)
    runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)


def difference(one: Path, other: Path, unshared: set[str]) -> str:
    """Return the first file that differs, of the weights the first tensor; "" where there is none.

    `unshared` are the parameters that only one of the two codes knows. The header of the weights
    may differ in them.
    """
    folders = ["data"] if one.name == "data" else ["models", "plots", "metrics"]
    pattern = "*.npy" if one.name == "data" else "*"
    files = [
        {
            p.relative_to(side)
            for f in folders
            for p in (side / f).rglob(pattern)
            if p.is_file() and p.name[0] != "."
        }
        for side in (one, other)
    ]
    if not files[0]:
        return "nothing was written"
    for file in sorted(files[0] | files[1], key=lambda path: (path != WEIGHTS, path)):
        if not all(file in found for found in files):
            if file.suffix == ".json":  # metrics that moved; the tables hold what they count
                continue
            return f"only one of the two wrote {file}"
        if (one / file).read_bytes() != (other / file).read_bytes():
            if file.suffix == ".json" and equal_metrics(one / file, other / file):
                continue
            found = (
                f"file {file}"
                if file != WEIGHTS
                else first_tensor(one / file, other / file, unshared)
            )
            if found:
                return f"first {found}"
    return ""


def equal_metrics(one: Path, other: Path) -> bool:
    """Tell whether the metrics that both files have are equal."""
    old, new = (json.loads(path.read_text("utf-8")) for path in (one, other))
    return all(old[name] == new[name] for name in old.keys() & new.keys())


def first_tensor(one: Path, other: Path, unshared: set[str]) -> str:
    """Return the first tensor that differs and by how much, or the header; "" for neither."""
    from safetensors import safe_open

    with safe_open(one, "pt") as old, safe_open(other, "pt") as new:
        if old.offset_keys() != new.offset_keys():
            return f"file {WEIGHTS}: the names of its tensors"
        for name in old.offset_keys():
            a, b = old.get_tensor(name), new.get_tensor(name)
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                return f"tensor {name}: its type or shape"
            if a.numpy().tobytes() != b.numpy().tobytes():
                return f"tensor {name}, by up to {(a.double() - b.double()).abs().max().item():.1g}"
        headers = [json.loads(file.metadata()["network"]) for file in (old, new)]
    for header in headers:
        header["params"] = {
            k: v for k, v in header["params"].items() if f"model.{k}" not in unshared
        }
    return f"file {WEIGHTS}: its header" if headers[0] != headers[1] else ""


def processor() -> str:
    """Return the name of the processor and of the vector instructions that PyTorch takes there."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def record(entry: dict[str, Any]) -> None:
    """Add an entry to docs/studies/same-bytes.json, but one for every pair of codes.

    Where nothing was left out, it replaces an entry for which something was.
    """
    entries = json.loads(EQUAL_CODE.read_text("utf-8")) if EQUAL_CODE.exists() else []
    pair = ("base_code", "code")
    others = [e for e in entries if [e[key] for key in pair] != [entry[key] for key in pair]]
    replaced = [e for e in entries if e not in others and e.get("without")]
    if len(others) == len(entries) or (replaced and not entry["without"]):
        text = json.dumps([*others, entry], indent=2, ensure_ascii=False)
        with atomic(EQUAL_CODE) as path:
            path.write_text(f"{text}\n", "utf-8")


def main() -> None:
    """Compare and exit with code 1 if anything differs."""
    parser = argparse.ArgumentParser("python -m bench.same_bytes", description=__doc__)
    parser.add_argument("rev", metavar="REV", help="a commit")
    parser.add_argument(
        "--without",
        metavar="'KEY=VALUE …'",
        default="",
        help="leave out variants with one of these; the entry is then valid for all others only",
    )
    arguments = parser.parse_args()
    pairs = [pair.partition("=") for pair in arguments.without.split()]
    try:
        same = compare(arguments.rev, {key: yaml.safe_load(value) for key, _, value in pairs})
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
