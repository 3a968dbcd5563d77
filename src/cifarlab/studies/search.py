"""`make search`: the best parameters within a training time; Optuna chooses, DVC trains."""

import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pandas import DataFrame

from cifarlab import files, pipeline
from cifarlab.digest import json_digest
from cifarlab.errors import UserError, first_line
from cifarlab.params.load import changed, data_set
from cifarlab.studies import executors
from cifarlab.studies.page import page_of, rendered
from cifarlab.studies.points import Point, finished, key_of
from cifarlab.studies.question import Range, Search, slug
from cifarlab.tracking.studies import publish

THIRD = 3  # one of so many trials goes on to the next rung


def run(name: str) -> Path:
    """Run the missing trials of studies/NAME.yaml, write docs/studies/NAME.md, return its path.

    Trials are drawn by TPE (Bergstra et al. 2011) and stopped by asynchronous successive halving
    (Li et al. 2018), by validation accuracy. Optuna keeps them in .cache/optuna.db. A search that
    was stopped continues; another trial replaces the one that was running.
    """
    search = Search.read(name)
    parameters = changed(search.base).flat()
    data = data_set(parameters)
    study = _open(name, search, data + key_of(parameters))
    done = len(study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]))
    print(f"{search.question}\n{done} of {search.trials} trials done", flush=True)
    study.optimize(lambda trial: _train(name, search, trial), max(0, search.trials - done))
    page = page_of(name, data)
    files.write(page, _page(name, search, study.trials, data))
    rungs = [rung for trial in study.trials for rung in trial.user_attrs.get("rungs", [])]
    publish(name, search.question, [page], [rung["run"] for rung in rungs])
    return page


def _open(name: str, search: Search, question: str) -> optuna.Study:
    """Return the Optuna study of these settings, this question and code, new or continued."""
    settings = search.model_dump_json(exclude={"findings", "trials", "question"})
    identity = json_digest(settings + question + pipeline.stage_code())[:16]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    files.cache().mkdir(exist_ok=True)
    study = optuna.create_study(
        study_name=f"{name} {identity}",
        storage="sqlite:///.cache/optuna.db",  # the path of the checkout may hold a ? or a brace
        pruner=optuna.pruners.SuccessiveHalvingPruner(1, reduction_factor=THIRD),
        direction="maximize",
        load_if_exists=True,
    )
    # A continued search needs another seed, otherwise it would draw the same trials again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    return study


def _train(name: str, search: Search, trial: optuna.Trial) -> float:
    """Train a trial on one rung after the other and return its validation accuracy."""
    drawn = {key: _draw(trial, key, values) for key, values in search.space.items()}
    rungs: list[dict[str, Any]] = []
    for place, epochs in enumerate(search.rungs):
        changes = {**search.base, **drawn, "train.epochs": epochs}
        try:
            parameters = changed(changes).flat()
        except UserError as error:  # a combination that is not possible
            trial.set_user_attr("refused", first_line(error))
            raise optuna.TrialPruned from error
        experiment = f"{slug(name)}-{trial.number}-{epochs}"
        executors.run({experiment: changes}, 1, "", lambda _: None)
        point = Point(f"trial {trial.number}", 0, experiment, changes, parameters)
        row = next((row for row, _ in finished([point])), {})
        if row.get("val_accuracy") is None or row.get("seconds") is None:
            raise UserError(f"{experiment}: a search needs data.validation, and times from MLflow")
        accuracy, seconds = row["val_accuracy"], row["seconds"] / epochs * search.rungs[-1]
        rungs.append(row | {"epochs": epochs, "seconds": seconds})
        trial.set_user_attr("rungs", rungs)
        time = f"{seconds:.0f} s for {search.rungs[-1]} epochs"
        print(f"{experiment}: {accuracy:.2%} on validation, {time}; {drawn}", flush=True)
        trial.report(accuracy, THIRD**place)  # where the pruner expects the rungs
        if seconds > search.seconds or (epochs != search.rungs[-1] and trial.should_prune()):
            raise optuna.TrialPruned
    return float(accuracy)


def _draw(trial: optuna.Trial, key: str, values: list[Any] | Range) -> Any:
    if isinstance(values, Range):
        whole = isinstance(values.low, int) and isinstance(values.high, int)
        draw: Any = trial.suggest_int if whole else trial.suggest_float
        return draw(key, values.low, values.high, log=values.log)
    # Optuna cannot store lists, so they are written as JSON.
    return json.loads(str(trial.suggest_categorical(key, [json.dumps(value) for value in values])))


def _page(name: str, search: Search, trials: list[FrozenTrial], data: str) -> str:
    """Return the text of docs/studies/NAME.md: all trials that trained, the best first."""

    def rank(trial: FrozenTrial) -> tuple[int, bool, float]:
        last = trial.user_attrs["rungs"][-1]
        return -last["epochs"], last["seconds"] > search.seconds, -last["val_accuracy"]

    ranked = sorted((trial for trial in trials if "rungs" in trial.user_attrs), key=rank)
    if not ranked or ranked[0].state != TrialState.COMPLETE:
        slow = f"no trial finished within {search.seconds:g} s; raise seconds or trials"
        refused = [trial.user_attrs.get("refused", slow) for trial in trials]
        raise UserError(f"studies/{name}.yaml: {slow if ranked else refused[-1]}")
    rows = []
    for trial in ranked:
        last, values = trial.user_attrs["rungs"][-1], [trial.params[key] for key in search.space]
        cells = [last["experiment"], str(last["epochs"]), f"{last['val_accuracy']:.2%}"]
        shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        rows.append([*cells, f"{last['seconds']:.0f}", *shown])
    pairs = zip(search.space, rows[0][4:], strict=True)
    settings = ", ".join(f"`{key}={value}`" for key, value in pairs)
    return rendered(
        "search.jinja",
        name=name,
        search=search,
        data=data,
        settings=settings,
        rows=rows,
        test=ranked[0].user_attrs["rungs"][-1]["test_accuracy"],
        made=DataFrame([rung for trial in ranked for rung in trial.user_attrs["rungs"]]),
    )
