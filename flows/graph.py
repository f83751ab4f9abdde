"""Stage graph of a pipeline, the one place that says which stage reads what.

    calibration -> training -> evaluation -> export -> registration

A `Graph` is this graph over one run: each part is a property that runs its stages when it is first asked for, after the
parts that it reads. The Prefect flow asks for the last of them, a DVC stage for its own (`PARTS`), both under the same
cache keys, and `dvc.yaml` is written from the same table (`flows.stage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import Task
from pydantic import BaseModel

from coalora.adapt.methods import METHODS
from coalora.calibrate.costs import budget_name
from coalora.errors import CoaloraError
from coalora.evaluate.harness import harness_version
from flows.run import Run
from pipeline.inputs.adapted import ModelInputs, release_models
from pipeline.inputs.exports import ExportInputs
from pipeline.progress import get_logger
from pipeline.scrub import scrub
from pipeline.settings.sections import Settings
from pipeline.stages.runner import Runner, Stage
from pipeline.stages.stage import Pool
from pipeline.store.store import Artifact
from tasks.base import prepare_base
from tasks.benchmark import prepare_benchmark
from tasks.bundle import make_bundle
from tasks.calibrate import calibrate
from tasks.ceiling import train_ceiling
from tasks.cost import apply_cost
from tasks.evaluate import evaluate_method
from tasks.evaluate_shard import evaluate_shard, shard_bounds
from tasks.export import export_budget
from tasks.given_set import given_set
from tasks.harness import evaluate_harness, include_digest
from tasks.initial_set import initial_set
from tasks.prompts import continue_at_budget
from tasks.publish_s3 import publish_run
from tasks.reference import train_reference
from tasks.register import register_version
from tasks.remove_stale import remove_stale
from tasks.report import make_report
from tasks.result import assemble
from tasks.search import search_round
from tasks.select import select_budgets
from tasks.show_result import show_result
from tasks.show_round import show_round
from tasks.track_round import track_round
from tasks.track_run import track_run
from tasks.track_training import track_training
from tasks.train import train_round
from tasks.version_set import version_set
from tasks.write_run_folder import write_run_folder

# Part -> its cached stages. Registration acts on other systems: its tasks are never cached.
PARTS: dict[str, tuple[Stage, ...]] = {
    "calibration": (prepare_base, prepare_benchmark, calibrate, apply_cost),
    "training": (initial_set, given_set, train_round, search_round),
    "evaluation": (
        select_budgets,
        evaluate_shard,
        evaluate_method,
        evaluate_harness,
        continue_at_budget,
        train_reference,
        train_ceiling,
    ),
    "export": (make_bundle, export_budget, assemble, make_report),
    "registration": (),
}
STAGES = [stage for part in PARTS.values() for stage in part]
STAGE_NAMES = sorted(stage.name for stage in STAGES)


@dataclass(frozen=True)
class Calibrated:
    """Base model, benchmark and calibration tables, which every later stage reads."""

    base: Artifact
    benchmark: Artifact
    tables: Artifact

    def inputs(self) -> dict[str, Artifact]:
        return dict(vars(self))


@dataclass(frozen=True)
class Trained:
    """Sets and states round by round: `sets[i]` is what `states[method][i]` was trained on last."""

    sets: list[Artifact]
    states: dict[str, list[Artifact]]


@dataclass(frozen=True)
class Evaluated:
    """The final set with a configuration for each budget, and every method's scores.

    `references` holds a score for each budget, `harness` one where harness tasks are asked for. `continued` are prompts
    and `ceiling` is the score of an own adapter in full precision: None where they are not asked for.
    """

    selection: Artifact
    scores: dict[str, Artifact]
    references: dict[str, list[Artifact]]
    harness: list[Artifact]
    continued: Artifact | None
    ceiling: Artifact | None


@dataclass(frozen=True)
class Exported:
    """Files for devices, `exports` in the order of the budgets, and the numbers of the run."""

    bundle: Artifact
    exports: list[Artifact]
    result: Artifact
    report: Artifact


class Published(BaseModel):
    """Places of a run's results. Paths are relative to the working directory."""

    folder: str
    report: Artifact
    mlflow_run_id: str
    registered: dict[str, Any]
    s3_address: str | None = None


class Graph:
    """The stages of one run, each part run once, when it is first read.

    `watcher` is told of every round's set and state as soon as it exists; `known` are parts that exist already.
    """

    def __init__(self, run: Run, watcher: Rounds | None = None, **known: Calibrated | Trained | Evaluated) -> None:
        self.run, self.watcher = run, watcher
        vars(self).update(known)

    @cached_property
    def model(self) -> ModelInputs:
        """What every stage that loads an adapted model reads."""
        s = self.run.settings
        return ModelInputs(**self.calibrated.inputs(), adapter=s.adapter, runtime=s.runtime, seed=s.seed)

    @cached_property
    def calibrated(self) -> Calibrated:
        """Base model, tokenized benchmark, and error and size of every choice for every layer."""
        run, s = self.run, self.run.settings
        pretrained = s.model.pretrain is not None
        base = run.run(
            prepare_base,
            model=s.model,
            content=run.benchmark_content if pretrained else run.model_content,
            corpus=s.benchmark.data_only() if pretrained else None,
            runtime=s.runtime,
            seed=s.seed,
        )
        benchmark = run.run(
            prepare_benchmark, base=base, benchmark=s.benchmark.data_only(), content=run.benchmark_content
        )
        tables = run.run(
            calibrate,
            base=base,
            benchmark=benchmark,
            target_modules=s.target_modules,
            calibration=s.calibration,
            choices=s.choices,
            runtime=s.runtime,
            seed=s.seed,
        )
        if s.cost.kind != "average_bits":
            files = s.cost.kind == "file_bytes"
            tables = run.run(
                apply_cost,
                tables=tables,
                cost=s.cost,
                adapter=s.adapter if files else None,
                adapter_dtype=s.export.adapter_dtype if files else "float32",
                content=run.cost_content,
            )
        return Calibrated(base, benchmark, tables)

    @cached_property
    def trained(self) -> Trained:
        """The initial set (allocated, or given by a file), then rounds of training and Pareto search.

        The methods that CoA-LoRA is compared with train on the same sets, step by step: the sets of CoA-LoRA's search.
        """
        run, s, tables = self.run, self.run.settings, self.calibrated.tables
        if run.given is not None:
            sets = [run.run(given_set, tables=tables, content=run.given)]
        else:
            sets = [run.run(initial_set, tables=tables, initial=s.initial_set)]
        states: list[Artifact] = []
        for round_index in range(s.search.rounds + 1):
            if round_index:
                sets.append(
                    run.run(
                        search_round,
                        model=self.model,
                        configurations=sets[-1],
                        state=states[-1],
                        # Each round stands for itself: asking for more of them keeps those that are done.
                        search=replace(s.search, rounds=0),
                        round_index=round_index,
                        goal=s.goal,
                    )
                )
            if self.watcher is not None:
                self.watcher.on_set(round_index, sets[-1], tables)
            states = self._train("coa", sets[-1], states)
        methods = {"coa": states}
        for method in s.baselines.methods:
            methods[method] = []
            # Without an adapter a language model has nothing to learn; a classifier has its head.
            trains = METHODS[method].has_lora or s.benchmark.task == "classification"
            for configurations in sets if trains else sets[:1]:
                methods[method] = self._train(method, configurations, methods[method])
        return Trained(sets, methods)

    def _train(self, method: str, configurations: Artifact, before: list[Artifact]) -> list[Artifact]:
        """The states of a method with that of one more round."""
        s = self.run.settings
        state = self.run.run(
            train_round,
            model=self.model,
            configurations=configurations,
            previous=before[-1] if before else None,
            method=method,
            training=s.training.resolved(s.goal, s.benchmark.task),
            rounds=s.search.rounds,
            round_index=len(before),
        )
        if self.watcher is not None:
            self.watcher.on_state(method, len(before), state)
        return [*before, state]

    @cached_property
    def selection(self) -> Artifact:
        """The final set with a configuration for each budget."""
        s, trained = self.run.settings, self.trained
        return self.run.run(
            select_budgets,
            model=self.model,
            configurations=trained.sets[-1],
            state=trained.states["coa"][-1],
            batch_size=s.search.batch_size,
            budgets=s.evaluation.budgets,
            goal=s.goal,
        )

    @cached_property
    def bundle(self) -> Artifact:
        """What adapts to any budget, without the base model."""
        run, state = self.run, self.trained.states["coa"][-1]
        return run.run(
            make_bundle,
            model=self.model,
            selection=self.selection,
            state=state,
            quantized=run.settings.export.quantized,
            adapter_dtype=run.settings.export.adapter_dtype,
        )

    @cached_property
    def evaluated(self) -> Evaluated:
        """A configuration for each budget, then every method measured on all members and budgets."""
        run, s, trained = self.run, self.run.settings, self.trained
        state, selection = trained.states["coa"][-1], self.selection
        # Now, while CoA-LoRA's model is loaded.
        _ = self.bundle
        continued = self._continued(state, selection)
        asked = {"model": self.model, "selection": selection, "batch_size": s.evaluation.batch_size}
        ceiling = self._ceiling()
        beside = {"reference": ceiling if s.own_reference else None}
        bounds = shard_bounds(selection, s.evaluation.shard_size)
        scores = {}
        try:
            with run.workers() as pool:
                if pool is not None or s.evaluation.workers > 1:
                    release_models()  # of this thread: workers load their own
                for method, states in trained.states.items():
                    adapted = {**asked, **beside, "state": states[-1], "method": method}
                    calls = [{**adapted, "start": start, "stop": stop} for start, stop in bounds]
                    shards = run.run_many(evaluate_shard, calls, workers=s.evaluation.workers, pool=pool)
                    scores[method] = run.run(
                        evaluate_method,
                        tables=self.calibrated.tables,
                        selection=selection,
                        method=method,
                        shards=shards,
                    )
                harness = self._harness({**asked, "state": state, "method": "coa"}, pool)
                references = {m: self._reference(m, {**asked, **beside}, pool) for m in s.baselines.per_budget}
        finally:
            release_models()
        return Evaluated(selection, scores, references, harness, continued, ceiling)

    def _continued(self, state: Artifact, selection: Artifact) -> Artifact | None:
        """Continuations of the prompts."""
        asked = self.run.settings.evaluation
        if not asked.prompts:
            return None
        return self.run.run(
            continue_at_budget,
            model=self.model,
            selection=selection,
            state=state,
            prompts=asked.prompts,
            index=asked.budgets.index(asked.prompts_at),
            new_tokens=asked.prompt_tokens,
        )

    def _ceiling(self) -> Artifact | None:
        """The base in full precision with an adapter of its own."""
        s = self.run.settings
        if s.ceiling != "own":
            return None
        return self.run.run(
            train_ceiling,
            model=self.model,
            training=s.training.resolved(s.goal, s.benchmark.task),
            steps=s.training.total_steps(s.search.rounds),
            batch_size=s.evaluation.batch_size,
            own=s.own_reference,
        )

    def _harness(self, common: dict[str, Any], pool: Pool | None) -> list[Artifact]:
        """CoA-LoRA's model of every budget on the harness's tasks."""
        asked = self.run.settings.evaluation
        if not asked.harness_tasks:
            return []
        common |= {
            "tasks": asked.harness_tasks,
            "include": asked.harness_include,
            "include_content": include_digest(asked.harness_include),
            "limit": asked.harness_limit,
            "version": harness_version(),
        }
        calls = [{**common, "index": index} for index in range(len(asked.budgets))]
        return self.run.run_many(evaluate_harness, calls, workers=asked.workers, pool=pool)

    def _reference(self, method: str, common: dict[str, Any], pool: Pool | None) -> list[Artifact]:
        """Adapters trained for one budget alone, each in a process of its own where there are several."""
        s = self.run.settings
        steps = s.baselines.per_budget_steps or s.training.initial_steps + s.search.rounds * s.training.round_steps
        common = {**common, "method": method, "training": s.training.resolved(s.goal, s.benchmark.task), "steps": steps}
        calls = [{**common, "index": index} for index in range(len(s.evaluation.budgets))]
        return self.run.run_each(train_reference, calls, pool)

    @cached_property
    def exported(self) -> Exported:
        """Adapter and packed base for each budget, the bundle, the result and its report."""
        run, s, trained, evaluated = self.run, self.run.settings, self.trained, self.evaluated
        selection, bundle = evaluated.selection, self.bundle
        export = ExportInputs(
            **self.calibrated.inputs(), bundle=bundle, settings=s.export, runtime=s.runtime, seed=s.seed
        )
        budgets = range(len(s.evaluation.budgets))
        calls = [{"export": export, "selection": selection, "index": index} for index in budgets]
        try:
            with run.workers() as pool:
                exports = run.run_each(export_budget, calls, pool)
        finally:
            release_models()
        result = run.run(
            assemble,
            pipeline=run.name,
            settings=s.of_the_result(),
            **self.calibrated.inputs(),
            searches=trained.sets[1:],
            selection=selection,
            states=trained.states,
            scores=evaluated.scores,
            exports=exports,
            references=evaluated.references,
            harness=evaluated.harness,
            continued=evaluated.continued,
            ceiling=evaluated.ceiling,
        )
        return Exported(bundle, exports, result, run.run(make_report, result=result))

    @cached_property
    def published(self) -> Published:
        """DVC, MLflow with a registered version, the run folder, Prefect's page and S3."""
        run, s, call = self.run, self.run.settings, self.run.runner.call
        calibrated, trained, exported = self.calibrated, self.trained, self.exported
        common = {"pipeline": run.name, "settings": s, "identity": run.identity}
        versions = [version(run, index, made) for index, made in enumerate(trained.sets)]
        run_id = call(
            track_run,
            **common,
            benchmark=calibrated.benchmark,
            tables=calibrated.tables,
            sets=trained.sets,
            versions=versions,
            states=trained.states,
            report=exported.report,
        )
        registered = call(
            register_version,
            **common,
            benchmark=calibrated.benchmark,
            bundle=exported.bundle,
            result=exported.result,
            md5=versions[-1],
        )
        folder = f"runs/{run.name}/{run.identity[:8]}"
        artifacts = {**calibrated.inputs(), "bundle": exported.bundle}
        call(
            write_run_folder,
            folder=folder,
            report=exported.report,
            bundle=exported.bundle,
            exports={f"export/{name}": made for name, made in self.named_exports().items()},
            record={
                "pipeline": run.name,
                "identity": run.identity,
                # It is copied, sent and shown to others: without a password in a server's address.
                "settings": scrub(s.model_dump(mode="json")),
                **{name: artifact.model_dump(mode="json") for name, artifact in artifacts.items()},
                "mlflow_run_id": run_id,
            },
        )
        call(
            show_result,
            pipeline=run.name,
            settings=s,
            report=exported.report,
            folder=folder,
            mlflow_run_id=run_id,
            registered=registered,
        )
        address = None
        if s.storage.publish:
            address = call(publish_run, folder=folder, storage=s.storage, tracking=s.tracking, run_id=run_id)
        return Published(
            folder=folder, report=exported.report, mlflow_run_id=run_id, registered=registered, s3_address=address
        )

    def named_exports(self) -> dict[str, Artifact]:
        """The exports by the names of their folders, such as `2.5-bits`."""
        s = self.run.settings
        names = [budget_name(budget, s.cost.kind) for budget in s.evaluation.budgets]
        return dict(zip(names, self.exported.exports, strict=True))


@dataclass
class Rounds:
    """Listener that versions every round's set with DVC, logs sets and states to MLflow, and shows the Pareto front.

    A tracking server that is away in the middle of a run does not end it: `Graph.published` logs what is missing.
    """

    run: Run
    sets: list[Artifact] = field(default_factory=list)

    def on_set(self, round_index: int, configurations: Artifact, tables: Artifact) -> None:
        """Version, log and show a set."""
        self.sets.append(configurations)
        s, call, name = self.run.settings, self.run.runner.call, self.run.name
        md5 = version(self.run, round_index, configurations)
        run_id = self._track(
            track_round, round_index=round_index, configurations=configurations, tables=tables, md5=md5
        )
        call(show_round, pipeline=name, settings=s, round_index=round_index, sets=list(self.sets), mlflow_run_id=run_id)
        if round_index == s.search.rounds and s.versioning.enabled:
            call(remove_stale, pipeline=name, last_round=round_index, root=str(Path.cwd()))

    def on_state(self, method: str, round_index: int, state: Artifact) -> None:
        """Log a state's curve."""
        self._track(track_training, round_index=round_index, method=method, state=state)

    def _track(self, part: Task[..., Any], **inputs: Any) -> Any:
        run = self.run
        try:
            return run.runner.call(part, pipeline=run.name, settings=run.settings, identity=run.identity, **inputs)
        except CoaloraError as error:
            get_logger().warning("%s: not logged to MLflow yet, the run goes on: %s", part.name, error)
            return None


def version(run: Run, round_index: int, configurations: Artifact) -> str | None:
    """The md5 under which DVC keeps a round's set; None where sets are not versioned."""
    if not run.settings.versioning.enabled:
        return None
    return run.runner.call(
        version_set,
        pipeline=run.name,
        identity=run.identity,
        round_index=round_index,
        configurations=configurations,
        root=str(Path.cwd()),
        push=run.settings.versioning.push,
    )


def start(name: str, settings: Settings, runner: Runner, refresh: Sequence[str] = ()) -> Run:
    """The run of a pipeline, with the sources of all stages in its identity."""
    check_refresh(refresh)
    return Run.start(name, settings, runner, sources=[stage.source for stage in STAGES], refresh=refresh)


def check_refresh(refresh: Sequence[str]) -> None:
    """Refuse names of stages that do not exist: a misspelt one would silently refresh nothing."""
    if unknown := sorted(set(refresh) - set(STAGE_NAMES)):
        raise CoaloraError(f"No such stage: {', '.join(unknown)}", remedy=f"Refresh some of {', '.join(STAGE_NAMES)}")
