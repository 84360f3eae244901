"""Searches for better settings of a recipe. ``fuselip sweep --help``, or ``python -m flows.sweep --help``.

Each trial is a run runs/<name>-<trial>-<seed>/ that starts from the results of runs/<name>/, so that the stages before
the first swept one run once. The study is runs/<name>/artifacts/study.db, or in the database that FUSELIP_STUDIES
names. The same command resumes it; given while it runs, there or on another machine, it adds a worker.
"""

from __future__ import annotations

import os
import statistics
import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from prefect import flow, tags
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from flows.command_line import run_from_command_line
from flows.environment import REPOSITORY
from flows.run.folder import Run, plan
from flows.run.forms import RunRequest, Split, nested
from flows.run.runner import Ending
from flows.study.outcome import write_outcome
from flows.study.pruning import PruningRunner
from flows.study.space import SweptField, first_stage, read_space
from flows.tasks import RUNNER, RunnerName, finish, run_stages
from fuselip_core.config import STAGES
from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import read_json, write_json
from fuselip_core.tracking.events import read_run
from fuselip_core.tracking.run import open_run

INTERRUPTED = "interrupted; another trial goes on with it"
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
MOST_FAILED = 3  # in a row, before the sweep gives up
# Heartbeats, and trials that run again, are what Optuna calls experimental.
warnings.filterwarnings("ignore", category=ExperimentalWarning)
HEARTBEAT_SECONDS = 15  # after two without one, another worker takes the trial over


class SweepRequest(RunRequest):
    """What to vary, how often, and by which metric trials are compared; the rest is as for a run."""

    split: Split = Field("dev", description="Split to compare trials on.")
    search: tuple[str, ...] = Field(
        (),
        description="Field to vary and its values: train.learning_rate=1e-4..1e-2 log, train.batch_size=64..256, "
        "or choices such as model.family=fuselip,siglip-sf. May be repeated.",
    )
    metric: str = Field(
        "retrieval/image_to_text/mean_reciprocal_rank", description="Metric to compare trials by; see metrics.json."
    )
    minimise: bool = Field(False, description="Smaller is better.")
    trials: int = Field(20, ge=1, description="Trials of the whole study, those of earlier calls included.")
    seeds: int = Field(1, ge=1, le=20, description="Trainings for each trial; the mean of their metric counts.")
    prune: bool = Field(
        True,
        description="Stop a training whose validation curve is below the median of other trials; not if minimised.",
    )

    def run_request(self, suffix: str = "", values: dict[str, Any] | None = None) -> RunRequest:
        """The request of the base run, or of a trial's run: `values` are what it changes, by dotted name."""
        fields = {name: getattr(self, name) for name in RunRequest.model_fields}
        fields["name"] = (self.name or "-".join(filter(None, ("sweep", self.recipe or self.source)))) + suffix
        fields["overrides"] = nested({**self.overrides, **(values or {})})
        return RunRequest(**fields)

    def question(self) -> dict[str, Any]:
        """What must be the same in all calls for one study: values of other questions cannot be compared."""
        return self.model_dump(mode="json", exclude={"trials", "prune", "name", "root", "dry_run"})


NOTHING = SweepRequest()


@flow(name="sweep")
def sweep(request: SweepRequest = NOTHING, runner: RunnerName = RUNNER) -> Any:
    """Searches for the settings with the best metric; the same request goes on where an earlier one stopped.

    Args:
        request: What to vary, and how often.
        runner: Where stages run: in processes on the worker's machine, or in the project's containers there.
    """
    try:
        space = read_space(request.search)
        for field in space:  # no trial may meet a value that the settings refuse
            for value in field.ends:
                plan(REPOSITORY, request.run_request(values={field.name: value}))
        once = STAGES[: STAGES.index(first_stage(space))]
        ending = run_stages(request.run_request(), once, runner)
        if ending.error or ending.run is None or request.dry_run:
            return finish(ending)
        study = _open_study(request, ending.run)
        stages = STAGES[len(once) : STAGES.index("register")]
        return _search(study, Trials(request, space, stages, ending.run, runner))
    except FuselipError as error:
        return Failed(message=str(error))


def _open_study(request: SweepRequest, base: Run) -> optuna.Study:
    """The study of the base run's name; what a killed worker was at is run again by whoever comes next."""
    base.artifacts.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    address = os.environ.get("FUSELIP_STUDIES") or f"sqlite:///{base.artifacts / 'study.db'}"
    try:
        study = optuna.create_study(
            storage=RDBStorage(
                address,
                heartbeat_interval=HEARTBEAT_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MOST_FAILED),
            ),
            study_name=base.name,
            direction="minimize" if request.minimise else "maximize",
            pruner=optuna.pruners.MedianPruner() if request.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError) as error:
        raise FuselipError(
            f"no study can be kept at {address} ({one_line(error)[:200]}); see FUSELIP_STUDIES"
        ) from error
    asked = request.question()
    if (before := study.user_attrs.get("question", asked)) != asked:
        changed = ", ".join(name for name in asked if before.get(name) != asked[name])
        raise FuselipError(f"the sweep {base.name} was begun with another {changed}; give this one another name")
    study.set_user_attr("question", asked)
    return study


@dataclass(frozen=True)
class Trials:
    """What each trial runs: `stages` once for each seed, starting from the results of `base`."""

    request: SweepRequest
    space: list[SweptField]
    stages: tuple[str, ...]
    base: Run
    runner: RunnerName

    def __call__(self, trial: optuna.Trial) -> float:
        """The mean of the metric over the seeds; raises TrialPruned, or FuselipError where a stage failed."""
        chosen = {field.name: field.suggest(trial) for field in self.space}
        trial.set_user_attr("settings", chosen)
        kept = trial.study.get_trials(deepcopy=False)[trial.number]
        # A trial that was interrupted runs again in its folder, where the training goes on from its checkpoint.
        first = RetryHeartbeatStaleTrialCallback.retried_trial_number(kept)
        number = trial.number if first is None else first
        try:
            values = [self._measure(trial, number, seed, chosen) for seed in range(self.request.seeds)]
        except FuselipError as error:
            trial.set_user_attr("note", str(error))
            raise
        except BaseException as stop:
            if not isinstance(stop, Exception):  # this process is asked to end
                trial.set_user_attr("note", INTERRUPTED)
                RetryHeartbeatStaleTrialCallback()(trial.study, kept)
                if not isinstance(stop, KeyboardInterrupt):  # of which Optuna takes note itself
                    trial.study.tell(trial, state=TrialState.FAIL)
            raise
        get_run_logger().info(f"trial {number}: {self.request.metric} {statistics.mean(values):.4g} with {chosen}")
        return statistics.mean(values)

    def _measure(self, trial: optuna.Trial, number: int, seed: int, chosen: dict[str, Any]) -> float:
        """The metric of one training, which is a flow of its own below the sweep's."""
        request = self.request.run_request(
            f"-{number}-{seed}", {**chosen, "train.seed": self.base.settings.train.seed + seed}
        )
        # One curve a trial is compared with those of the others: that of the first seed.
        compared = seed == 0 and self.request.prune and not self.request.minimise
        watch = PruningRunner(trial, self.request.metric) if compared else None
        endings: list[Ending] = []

        @flow(name="trial")
        def run(trial: int, seed: int, settings: dict[str, Any]) -> Any:
            endings.append(run_stages(request, self.stages, self.runner, self.base, watch.around if watch else None))
            pruned = watch.pruned if watch else None
            return Completed(name="Pruned", message=pruned) if pruned else finish(endings[0])

        with tags(f"trial-{number}", f"seed-{seed}"):
            run(number, seed, chosen, return_state=True)
        if watch and watch.pruned:
            trial.set_user_attr("note", watch.pruned)
            raise optuna.TrialPruned(watch.pruned)
        if not endings or endings[0].error or endings[0].run is None:
            raise FuselipError((endings[0].error if endings else None) or "the trial did not run")
        metrics = read_json(endings[0].run.artifacts / "metrics.json", "run the sweep again")
        name = self.request.metric
        if name not in metrics:
            near = [each for each in metrics if each.rpartition("/")[2] == name.rpartition("/")[2]][:5]
            raise FuselipError(
                f"metrics.json has no {name}; --metric may be {', '.join(near or list(metrics)[:5])}, ..."
            )
        return float(metrics[name])


def _search(study: optuna.Study, trials: Trials) -> Any:
    request, base = trials.request, trials.base
    tracked_in = base.artifacts / "tracking" / "sweep"
    if (shared := study.user_attrs.get("mlflow_run")) and not read_run(tracked_in):
        write_json(tracked_in / "run.json", {"mlflow_run_id": shared})  # that of the worker who began the study
    with open_run(base.settings.model_copy(update={"artifacts": base.artifacts}), "sweep", resume=True) as tracked:
        tracked.flush(force=True)
        study.set_user_attr("mlflow_run", tracked.run.get("mlflow_run_id", ""))
        os.environ["FUSELIP_PARENT_RUN"] = tracked.run.get("mlflow_run_id", "")  # for the trials' stages
        if sum(trial.state in COUNTED for trial in study.get_trials(deepcopy=False)) < request.trials:
            limit = MaxTrialsCallback(request.trials, states=COUNTED)
            study.optimize(trials, catch=(FuselipError,), callbacks=[limit, _stop_if_hopeless])
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            notes = [trial.user_attrs.get("note", "") for trial in study.get_trials(deepcopy=False)]
            raise FuselipError(f"no trial came to an end; the last one said: {notes[-1] if notes else 'nothing'}")
        folder = write_outcome(study, base, request.metric)
        tracked.metrics({"best": study.best_value}, len(study.trials))
        tracked.artifact(folder, "sweep")
    text = f"trial {study.best_trial.number} of {len(study.trials)} is best: {request.metric} {study.best_value:.4g}"
    recipe = (folder / "best.yaml").read_text(encoding="utf-8")
    create_markdown_artifact(key="sweep", markdown=f"{text}\n\n```yaml\n{recipe}```\n", description="Best settings")
    return Completed(message=f"{text}; settings: {folder / 'best.yaml'}, all trials: {folder / 'index.html'}")


def _stop_if_hopeless(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    ended = [each for each in study.get_trials(deepcopy=False) if each.user_attrs.get("note") != INTERRUPTED]
    last = ended[-MOST_FAILED:]
    if len(last) == MOST_FAILED and all(each.state == TrialState.FAIL for each in last):
        study.stop()


if __name__ == "__main__":
    run_from_command_line(sweep, SweepRequest)
