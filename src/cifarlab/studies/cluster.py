"""Experiments on the machines of a Ray cluster.

Workers clone the Git remote, get data from the DVC remote and send results to both. So they need
neither this checkout nor an MLflow server: this process fetches the results.
"""

import os
from collections.abc import Mapping

from cifarlab import files, pipeline
from cifarlab.errors import UserError, in_a_sentence
from cifarlab.params.load import changed
from cifarlab.pipeline import Revision, git
from cifarlab.runtime import timings
from cifarlab.studies import clone
from cifarlab.studies.question import Parameters
from cifarlab.tracking import client as tracking

RETRIES = 10  # how often an experiment runs again whose worker or machine was lost
PASSED_ON = ("AWS_", "CIFARLAB_", "MLFLOW_")  # variables that workers get from here


def run(address: str, changes: Mapping[str, Parameters]) -> clone.Outcomes:
    """Run experiments on a Ray cluster. What the Git remote has already is not run again.

    Parameters
    ----------
    address : ray for the cluster of this machine, or ray://HOST:PORT
    """
    with in_a_sentence("Ray is not installed; `make cluster` installs it", ModuleNotFoundError):
        import ray
    remote, order = _remote()
    advice = "`ray start --head` starts one on this machine"
    with in_a_sentence(f"no Ray cluster answers at {address}; {advice}", ConnectionError):
        ray.init("auto" if address == "ray" else address, log_to_driver=False)
    try:
        ray.cloudpickle.register_pickle_by_value(clone)  # workers have no checkout
        gpus = "GPU" in ray.cluster_resources()
        running = {}
        for name, values in changes.items():
            train = changed(values).train
            cpus = 1 if train.threads == "auto" else train.threads
            gpu = int(train.device == "cuda" or (gpus and train.device == "auto"))
            needs = {"num_cpus": cpus, "num_gpus": gpu, "max_retries": RETRIES}
            task = ray.remote(clone.work).options(name=name, **needs)
            running[task.remote(order, name, pipeline.set_options(values))] = name
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            name = running.pop(done)
            try:
                # The epoch times of the training: where those of this machine are.
                for file, times in ray.get(done).items():
                    files.write(timings.path_of("").with_name(file), times)
                problem = _pull(remote, name, changes[name])
            except ray.exceptions.RayError as error:
                problem = str(error).strip().splitlines()[-1]
            yield name, problem
    finally:
        ray.shutdown()


def _remote() -> tuple[str, clone.Order]:
    """Return the name of the Git remote, and the order for workers that clone it.

    Raises
    ------
    UserError
        Workers could not get or send what they need.
    """
    remote = git("config", "remote.pushDefault", check=False).strip() or "origin"
    url, head = git("remote", "get-url", remote, check=False).strip(), pipeline.git_commit()
    deciding = ("params.yaml", "dvc.yaml", *pipeline.dependencies(stages=pipeline.EVERY))
    if different := git("diff", "--name-only", "HEAD", "--", *deciding).split():
        raise UserError(f"workers see commits only; commit and push {' '.join(different)}")
    if not url or not git("branch", "--remotes", "--contains", head, "--list", f"{remote}/*"):
        lack = f"the Git remote {remote}, which {'lacks this commit' if url else 'does not exist'}"
        raise UserError(f"workers clone {lack}; `git {'push' if url else 'remote add'} {remote}`")
    if "core.remote" not in pipeline.dvc("config", "--project", "--list"):
        advice = "`dvc remote add --default NAME URL`, commit and push"
        raise UserError(f"workers send their outputs to a DVC remote, and there is none; {advice}")
    env = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    for role in ("AUTHOR", "COMMITTER"):
        name, _, rest = git("var", f"GIT_{role}_IDENT").partition(" <")
        env |= {f"GIT_{role}_NAME": name, f"GIT_{role}_EMAIL": rest.partition(">")[0]}
    if tracking.database():  # of this machine, also if MLflow has set the variable
        env.pop("MLFLOW_TRACKING_URI", None)
    return remote, clone.Order(url, head, head, git("rev-parse", "--show-prefix").strip(), env)


def _pull(remote: str, name: str, changes: Parameters) -> str:
    """Bring an experiment and its outputs into this checkout; return what is wrong with it."""
    try:
        pipeline.dvc("exp", "pull", "--quiet", "--force", remote, name)
    except UserError as error:
        return str(error).strip().splitlines()[-1]
    ref = clone.reference(pipeline.git_commit(), name)
    if pipeline.params_of(Revision(name, pipeline.git_commit(ref), "")) == changed(changes):
        return ""
    advice = f"`dvc exp remove --git-remote {remote} {name}` removes it"
    return f"{remote} has another experiment of this name; {advice}"
