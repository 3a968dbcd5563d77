"""`make ablation`: what each trick of the default parameters is worth, one taken away at a time, on the validation split.

Every point is a DVC experiment of the current commit, ablation-NAME-SEED, of a small network; those that are there are not trained
again.
"""

import argparse
import json
import subprocess
from pathlib import Path
from statistics import mean

import numpy as np
import pandas as pd
from scipy import stats

# Half of the training images train, the other half are held out: cheap, and an accuracy of 25,000 images has little noise.
BASE = ["data.validation=0.5", "model.widths=[32,64,128]", "train.epochs=6"]
QUIET = ["tracking.system_metrics=false", "tracking.log_model=false"]
TRICKS: dict[str, list[str]] = {
    "base": [],
    "stem none": ["model.stem=none"],
    "pool_at end": ["model.pool_at=end"],
    "norm_scale true": ["model.norm_scale=true"],
    "norm_momentum 0.1": ["model.norm_momentum=0.1"],
    "activation relu": ["model.activation=relu"],
    "init default": ["model.init=default"],
    "logit_scale 1": ["model.logit_scale=1"],
    "optimizer sgd": ["train.optimizer=sgd"],
    "muon_lr 0.05": ["train.muon_lr=0.05"],
    "muon_lr 0.2": ["train.muon_lr=0.2"],
    "schedule one_cycle": ["train.schedule=one_cycle"],
    "norm_bias_lr 1": ["train.norm_bias_lr=1"],
    "label_smoothing 0": ["train.label_smoothing=0"],
    "flip random": ["train.flip=random"],
    "flip none": ["train.flip=none"],
    "translate 0": ["train.translate=0"],
    "precision float32": ["train.precision=float32"],
}


def validation_accuracy(label: str, seed: int) -> float:
    """Return the validation accuracy of an experiment, run now where it is missing."""
    name = "ablation-" + "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-") + f"-{seed}"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    point = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    if subprocess.run(["git", "rev-parse", "--quiet", "--verify", point], stdout=subprocess.DEVNULL, check=False).returncode:
        changes = [*BASE, *QUIET, f"train.seed={seed}", *TRICKS[label]]
        options = [option for change in changes for option in ("-S", change)]
        with (Path(".dvc/tmp") / f"{name}.log").open("w") as log:
            subprocess.run(["dvc", "exp", "run", "--temp", "--name", name, *options], stdout=log, stderr=log, check=True)
    metrics = subprocess.run(["git", "show", f"{point}:metrics/train.json"], capture_output=True, text=True, check=True)
    accuracy = float(json.loads(metrics.stdout)["val_accuracy"])
    print(f"{name} {accuracy:.2%}", flush=True)
    return accuracy


def main() -> None:
    """Run what is missing and write docs/ablation.csv."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 100), metavar="N")
    seeds = range(parser.parse_args().seeds)
    found = {label: np.array([100 * validation_accuracy(label, seed) for seed in seeds]) for label in TRICKS}
    base = next(iter(found.values()))
    rows = []
    for label, accuracy in found.items():
        difference = accuracy - base  # paired: the same seed draws the same order and the same views
        half = stats.t.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / len(seeds) ** 0.5
        rows.append(
            {
                "variant": label,
                "validation accuracy %": f"{mean(accuracy):.2f} ± {accuracy.std(ddof=1):.2f}",
                "difference": f"{mean(difference):+.2f}",
                "95 % interval": f"{mean(difference) - half:+.2f} … {mean(difference) + half:+.2f}",
            }
        )
    table = pd.DataFrame(rows)
    table.to_csv("docs/ablation.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
