"""The best variant under a budget of time: Optuna draws, DVC runs, halves are dropped early."""

import json
from pathlib import Path
from typing import Annotated, Any

import optuna
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field

from cifarlab import UserError
from cifarlab.files import root
from cifarlab.params import changed, load_params
from cifarlab.studies import Point, Question, key_of, publish, read_points, run_point, table


class Range(BaseModel):
    """Numbers from low to high."""

    model_config = ConfigDict(extra="forbid")
    low: float
    high: float
    log: bool = False


class Search(Question):
    """Trials of parameters drawn from a space."""

    space: Annotated[dict[str, list[Any] | Range], Field(min_length=1)]
    """What is drawn: one of a list, or from a range."""
    rungs: Annotated[list[int], Field(min_length=1)]
    """Epochs of a trial: first so many; the better third goes on to a new training of the next number (successive halving)."""
    seconds: float
    """Of training at the last rung; what would take longer on this machine is dropped."""
    trials: int


def run(name: str) -> Path:
    """Run what is left of the trials of studies/NAME.yaml, and write and return docs/studies/NAME.md.

    Trials are drawn by TPE (Bergstra et al. 2011) and pruned by asynchronous successive halving (Li et al. 2018), on validation
    accuracy. Optuna's memory is .cache/optuna.db; a search that was stopped tries the trial again that was running.
    """
    search = Search.read(name)
    load_params()  # what is wrong there is no trial's fault
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (root() / ".cache").mkdir(exist_ok=True)
    study = optuna.create_study(
        study_name=f"{name} {search.model_dump_json(exclude={'findings', 'trials', 'question'})}"[:500],
        storage=f"sqlite:///{root() / '.cache' / 'optuna.db'}",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=search.rungs[0], reduction_factor=3),
        direction="maximize",
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # continued, it must not draw the same again
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
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
            changes = {**search.base, **drawn, "train.epochs": epochs}
            try:
                key = key_of(changed(changes))
            except UserError as error:
                raise optuna.TrialPruned(str(error)) from error
            point = Point(f"trial {trial.number}", 0, f"{name}-{trial.number}-{epochs}", changes, key)
            run_point(point, "--temp")
            [(row, _)] = read_points([point])
            if "val_accuracy" not in row:
                raise UserError(f"studies/{name}.yaml: a search judges on validation, but data.validation holds nothing out")
            if row["seconds"] is None:
                raise UserError("a budget of time needs the times of the epochs, which MLflow has not got")
            accuracy, seconds = row["val_accuracy"], row["seconds"] / epochs * search.rungs[-1]
            told = {"experiment": point.experiment, "seconds": seconds, "test": row["test_accuracy"], "epochs": epochs}
            told["runs"] = [*trial.user_attrs.get("runs", []), row["run"]]
            for attribute, value in told.items():
                trial.set_user_attr(attribute, value)
            print(f"{point.experiment}: {accuracy:.2%} on validation, {seconds:.0f} s for {search.rungs[-1]} epochs; {drawn}", flush=True)
            trial.report(accuracy, epochs)
            if seconds > search.seconds or (epochs != search.rungs[-1] and trial.should_prune()):
                raise optuna.TrialPruned
        return accuracy

    over = len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    print(f"{search.question}\n{over} of {search.trials} trials done", flush=True)
    study.optimize(objective, max(0, search.trials - over))
    runs = [run for trial in study.trials for run in trial.user_attrs.get("runs", [])]
    return publish(name, search.question, _page(name, search, study.trials), runs)


def _page(name: str, search: Search, trials: list[optuna.trial.FrozenTrial]) -> list[str]:
    """Return the lines of docs/studies/NAME.md: all trials that trained, the best first."""
    told = [(trial.user_attrs, trial.value, trial) for trial in trials if trial.value is not None]
    told.sort(key=lambda of: (of[2].state != TrialState.COMPLETE, -of[0]["epochs"], of[0]["seconds"] > search.seconds, -of[1]))
    if not told or told[0][2].state != TrialState.COMPLETE:
        raise UserError(f"studies/{name}.yaml: no trial came to its end within {search.seconds:g} s; raise seconds or trials")
    rows = []
    for of, accuracy, trial in told:
        drawn = [f"{value:.3g}" if isinstance(value := trial.params[key], float) else str(value) for key in search.space]
        rows.append([of["experiment"], str(of["epochs"]), f"{accuracy:.2%}", f"{of['seconds']:.0f}", *drawn])
    best = ", ".join(f"`{key}={value}`" for key, value in told[0][2].params.items())
    return [
        f"# {search.question}\n",
        f"**{best}**: {rows[0][2]} on validation, {told[0][0]['test']:.2%} on the test images, which chose nothing. {search.findings}\n",
        *table(["experiment", "epochs", "validation accuracy", f"s for {search.rungs[-1]} epochs", *search.space], rows),
        f"\nTrials by TPE, the better third of a rung ({', '.join(map(str, search.rungs))} epochs) goes on;",
        f"above {search.seconds:g} s a trial is dropped. One seed a trial: ask a study whether neighbours in this table differ.",
        f"All else as in params.yaml, but for\n{search.shared}.\n",
        f"    make search NAME={name}\n\nasks studies/{name}.yaml again; each trial is DVC experiments and runs in MLflow.",
    ]
