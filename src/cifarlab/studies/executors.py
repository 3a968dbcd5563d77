"""Ways to run experiments: one after the other, several at a time, or on a cluster."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path

from cifarlab import files, pipeline
from cifarlab.errors import UserError, without_secrets
from cifarlab.params.load import load_params
from cifarlab.pipeline import git
from cifarlab.studies import clone, cluster
from cifarlab.studies.question import Parameters

Changes = Mapping[str, Parameters]
"""Changes to params.yaml by the name of the experiment."""


def run(changes: Changes, jobs: int, workers: str, on_end: Callable[[str], object]) -> None:
    """Run experiments at the present commit; one of the same name is replaced.

    Parameters
    ----------
    jobs : how many at a time, on this machine
    workers : the address of a Ray cluster, which runs them instead; or empty
    on_end : called with the name of each experiment that has succeeded

    Raises
    ------
    UserError
        Some failed. The others have been run.
    """
    failed: list[str] = []
    with closing(cluster.run(workers, changes) if workers else _here(jobs, changes)) as outcomes:
        for ended, (name, problem) in enumerate(outcomes, 1):
            if problem:
                failed.append(f"{name} failed: {without_secrets(problem)}")
            else:
                on_end(name)
            left = f", {len(changes) - ended} left" if len(changes) > 1 else ""
            print(f"{name} {'failed' if problem else 'done'}{left}", flush=True)
    if failed:
        raise UserError("; ".join(failed[:5]) + ("; …" if failed[5:] else ""))


def run_queue(jobs: int, workers: str) -> None:
    """Run the experiments in DVC's queue. Each is removed from it when it has succeeded.

    Raises
    ------
    UserError
        Some failed, or the code has changed since they were queued.
    """
    load_params()  # a damaged file is named
    # The files *.dvc name the images that DVC tracks.
    code = [*pipeline.dependencies(stages=pipeline.EVERY), "*.dvc"]
    tasks = pipeline.queued()
    for name, task in tasks.items():
        if different := git("diff", "--name-only", task.commit, "--", *code).split():
            reason = f"{' '.join(different)} changed since {name} was queued"
            raise UserError(f"{reason}; `dvc queue start` runs it as it was")
    changes = {name: pipeline.differences(task) for name, task in tasks.items()}
    print(f"{len(changes)} queued", flush=True)
    if changes:
        run(
            changes, jobs, workers, lambda name: pipeline.dvc("queue", "remove", tasks[name].commit)
        )


def _here(jobs: int, changes: Changes) -> clone.Outcomes:
    """Run experiments on this machine, in clones of the checkout with what is not committed yet."""
    local, head = Path(".dvc/config.local"), pipeline.git_commit()
    if new := git("ls-files", "--others", "--exclude-standard", "src", "stages").splitlines():
        raise UserError(f"Git does not know {new[0]}, so a clone would lack it; `git add {new[0]}`")
    order = clone.Order(
        source=git("rev-parse", "--show-toplevel").strip(),
        baseline=head,
        snapshot=git("stash", "create").strip() or head,
        prefix=git("rev-parse", "--show-prefix").strip(),
        env={k: v for k, v in os.environ.items() if k not in pipeline.OTHER_CHECKOUT},
        checkout=str(files.root()),
        cache=pipeline.dvc("cache", "dir").strip(),
        settings=local.read_text("utf-8") if local.exists() else "",
    )
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {
            pool.submit(clone.work, order, name, pipeline.set_options(values)): name
            for name, values in changes.items()
        }
        for future in as_completed(futures):
            error = future.exception()
            if error and not isinstance(error, RuntimeError | OSError):
                raise error
            yield futures[future], str(error or "")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        clone.stop()
