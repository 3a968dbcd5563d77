"""The best variant under a budget of time: Optuna draws, DVC runs, halves are dropped early."""

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifarlab import UserError, first_line
from cifarlab.files import atomic, root
from cifarlab.params import changed
from cifarlab.studies import ANSWERS, Point, gather, read_points, run_point


class Range(BaseModel):
    """Numbers from low to high."""

    model_config = ConfigDict(extra="forbid")
    low: float
    high: float
    log: bool = False


class Search(BaseModel):
    """studies/NAME.yaml of a search."""

    model_config = ConfigDict(extra="forbid")
    question: str
    base: dict[str, Any] = {}
    """Changes to params.yaml that all trials share."""
    space: Annotated[dict[str, list[Any] | Range], Field(min_length=1)]
    """What is drawn: one of a list, or from a range."""
    rungs: Annotated[list[int], Field(min_length=1)]
    """Epochs of a trial: first so many; the better third goes on to a new training of the next number (successive halving)."""
    seconds: float
    """Of training at the last rung; what would take longer on this machine is dropped."""
    trials: int
    findings: str = ""


def run(name: str) -> Path:
    """Run what is left of the trials of studies/NAME.yaml, and write and return docs/studies/NAME.md.

    Trials are drawn by TPE (Bergstra et al. 2011) and pruned by asynchronous successive halving (Li et al. 2018), on validation
    accuracy. Optuna's memory is .cache/optuna.db; a search that was stopped tries the trial again that was running.
    """
    import optuna

    path = Path("studies") / f"{name}.yaml"
    try:
        search = Search.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, ValidationError, yaml.YAMLError) as error:
        told = "; ".join(f"{fault['loc']} {fault['msg']}" for fault in error.errors()) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{path} is no search: {' '.join(told.split())}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (root() / ".cache").mkdir(exist_ok=True)
    study = optuna.create_study(
        study_name=f"{name} {search.model_dump_json(exclude={'findings', 'trials', 'question'})}"[:500],
        storage=f"sqlite:///{root() / '.cache' / 'optuna.db'}",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=search.rungs[0], reduction_factor=3),
        direction="maximize",
        load_if_exists=True,
    )
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)

    def objective(trial: optuna.Trial) -> float:
        drawn: dict[str, Any] = {}
        for key, values in search.space.items():
            if isinstance(values, Range):
                drawn[key] = trial.suggest_float(key, values.low, values.high, log=values.log)
            else:  # Optuna keeps no lists
                drawn[key] = json.loads(str(trial.suggest_categorical(key, [json.dumps(value) for value in values])))
        accuracy = 0.0
        for epochs in search.rungs:
            point = Point(f"trial {trial.number}", 0, f"{name}-{trial.number}-{epochs}", {**search.base, **drawn, "train.epochs": epochs})
            try:
                changed(point.changes)
            except ValidationError as error:
                raise optuna.TrialPruned(first_line(error)) from error
            run_point(point, "--temp")
            [(_, row, _)] = read_points([point])
            if "val_accuracy" not in row:
                raise UserError(f"{path}: a search judges on validation, but data.validation holds nothing out")
            if row["seconds"] is None:
                raise UserError("a budget of time needs the times of the epochs, which MLflow has not got")
            accuracy, seconds = row["val_accuracy"], row["seconds"] / epochs * search.rungs[-1]
            told = {"experiment": point.experiment, "run": row["run"], "seconds": seconds, "test": row["test_accuracy"], "epochs": epochs}
            for key, value in told.items():
                trial.set_user_attr(key, value)
            print(f"{point.experiment}: {accuracy:.2%} on validation, {seconds:.0f} s for {search.rungs[-1]} epochs; {drawn}", flush=True)
            trial.report(accuracy, epochs)
            if seconds > search.seconds or (epochs != search.rungs[-1] and trial.should_prune()):
                raise optuna.TrialPruned
        return accuracy

    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    print(f"{search.question}\n{len(study.get_trials(states=over))} of {search.trials} trials done", flush=True)
    study.optimize(objective, max(0, search.trials - len(study.get_trials(states=over))))
    _write(name, search, study)
    gather(name, search.question, [trial.user_attrs["run"] for trial in study.trials if "run" in trial.user_attrs])
    return ANSWERS / f"{name}.md"


def _write(name: str, search: Search, study: Any) -> None:
    """Write the table of all trials, the best first."""
    done = [trial for trial in study.trials if trial.user_attrs]
    done.sort(
        key=lambda trial: (-trial.last_step, trial.user_attrs["seconds"] > search.seconds, -trial.intermediate_values[trial.last_step])
    )
    if not done or done[0].state.name != "COMPLETE":  # a pruned trial has a value, too
        raise UserError(f"studies/{name}.yaml: no trial came to its end within {search.seconds:g} s; raise seconds or trials")
    keys = list(search.space)
    rows = [
        f"| {trial.user_attrs['experiment']} | {trial.last_step} | {trial.intermediate_values[trial.last_step]:.2%} | "
        f"{trial.user_attrs['seconds']:.0f} | {' | '.join(str(trial.params.get(key, '')) for key in keys)} |"
        for trial in done
    ]
    best = done[0]
    page = [
        f"# {search.question}\n",
        f"**{', '.join(f'`{key}={value}`' for key, value in best.params.items())}**: {best.value:.2%} on validation,"
        f" {best.user_attrs['test']:.2%} on the test images, which chose nothing. {search.findings.strip()}\n",
        f"| experiment | epochs | validation accuracy | s for {search.rungs[-1]} epochs | {' | '.join(keys)} |",
        "|---" * (4 + len(keys)) + "|",
        *rows,
        f"\nTrials by TPE, the better third of a rung ({', '.join(map(str, search.rungs))} epochs) goes on;",
        f"above {search.seconds:g} s a trial is dropped. One seed a trial: ask a study whether neighbours in this table differ.",
        "All else as in params.yaml, but for",
        f"{', '.join(f'`{key}={json.dumps(value)}`' for key, value in search.base.items()) or 'nothing'}.\n",
        f"    make search NAME={name}\n\nasks studies/{name}.yaml again; each trial is DVC experiments and runs in MLflow.",
    ]
    with atomic(ANSWERS / f"{name}.md") as path:
        path.write_text("\n".join(page) + "\n", "utf-8")
