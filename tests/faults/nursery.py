"""Run `python -m MODULE` many times without loading PyTorch and MLflow each time: every request is a process of its own, forked.

Only what pip installed is loaded before; the code of the project, its environment and the end of the interpreter are the child's.
"""

import json
import os
import runpy
import sys

import matplotlib.pyplot
import mlflow.data
import mlflow.pytorch
import mlflow.store.tracking.sqlalchemy_store
import mlflow.system_metrics.system_metrics_monitor
import pandas
import safetensors.torch
import seaborn
import sklearn.metrics
import torch

LOADED = (matplotlib.pyplot, mlflow, pandas, safetensors.torch, seaborn, sklearn.metrics, torch)


def main() -> None:
    """Read requests, JSON a line; answer the process' id, then, when it has ended, its exit code."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        nothing, said = os.open(os.devnull, os.O_RDONLY), os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for old, new in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(old, new)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.path[:1] = [request["folder"], *filter(None, request["env"].get("PYTHONPATH", "").split(":"))]
        sys.argv[1:] = request["arguments"]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        return


if __name__ == "__main__":
    main()
