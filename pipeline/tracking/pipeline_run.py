"""MLflow run of a pipeline: open from the start with the machine's load, nested runs of its rounds, ended as it ended.

Each `log_` or `track_` function logs one part and may be repeated. Names are those of the reports; metrics are grouped
by the word before the slash, as MLflow's page shows them.
"""

import getpass
import logging
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

from coalora.calibrate.costs import budget_name
from coalora.data.benchmark import SPLITS
from coalora.files import digest, read_json
from pipeline.inputs.adapted import HISTORY
from pipeline.inputs.loaders import ROUND, SET, TABLES, load_benchmark, load_set, load_tables
from pipeline.progress import get_logger
from pipeline.report.curves import curves_figure
from pipeline.report.heatmap import heatmap_figure
from pipeline.report.rounds import round_figure, round_rows, rounds_figure
from pipeline.report.schema import RESULT, as_result
from pipeline.report.style import figure_png
from pipeline.settings.sections import Settings
from pipeline.store.locks import wait_for
from pipeline.store.store import Artifact, current_store
from pipeline.tracking.registry import REFERENCE
from pipeline.tracking.runs import TrackedRun, open_tracker
from pipeline.tracking.server import patiently, place_of_runs

T = TypeVar("T")

INTERVAL = 10.0  # seconds between two readings of the machine's load
CONTEXTS = {"train": "training", "search": "search", "validation": "evaluation"}
SEARCHED = ("n_candidates", "n_accepted", "surrogate_error", "hypervolume_before", "hypervolume_after")


def on_run(pipeline: str, settings: Settings, identity: str, use: Callable[[TrackedRun], T]) -> T:
    """What `use` does with the run of a pipeline's identity, opened or resumed, and named like its folder under runs/.

    Tried again while the tracking server is away for a moment. Another process with the same identity waits: both would
    look for run and version, find none, and make one each.
    """
    lock = current_store().lock(f"mlflow-{identity}")

    def call() -> T:
        wait_for(lock, lambda holder, waited: get_logger().info("MLflow: waiting for %s, which logs this run", holder))
        try:
            tracker = open_tracker(settings.tracking.experiment, settings.tracking.tracking_uri)
            params = settings.model_dump(mode="json", exclude_none=True)
            return use(tracker.open_run(identity, f"{pipeline} {identity[:8]}", params, run_tags(pipeline)))
        finally:
            lock.release()

    return patiently(call, place_of_runs(settings.tracking.tracking_uri))


def open_pipeline_run(pipeline: str, settings: Settings, identity: str) -> TrackedRun:
    """The run that `on_run` gives to what it calls."""
    return on_run(pipeline, settings, identity, lambda run: run)


def run_url(settings: Settings, run_id: str) -> str:
    """Address of a run on the MLflow server, or the command that shows it where there is none."""
    return open_tracker(settings.tracking.experiment, settings.tracking.tracking_uri).url_hint(run_id)


def run_tags(pipeline: str) -> dict[str, str]:
    """Who ran what from where: columns of MLflow's table of runs."""
    tags = {
        "pipeline": pipeline,
        "host": socket.gethostname(),
        MLFLOW_SOURCE_NAME: f"coalora run {pipeline}",
        MLFLOW_SOURCE_TYPE: "LOCAL",
        MLFLOW_USER: _user(),
    }
    if commit := git_commit():
        tags |= {"git_commit": commit, MLFLOW_GIT_COMMIT: commit.removesuffix("-dirty")}
    if url := _prefect_url():
        tags["prefect_run"] = url
    return tags


def version_tags(pipeline: str, result: Mapping[str, Any], benchmark: Artifact, md5: str | None) -> dict[str, str]:
    """What a registered version was trained and measured on."""
    volume = result["hypervolume"]
    bits = [member["average_bits"] for member in result["members"]]
    goal = ["recover"] if result["benchmark"]["goal"] == "recover" else []  # the loss is another one
    tags = {
        "pipeline": pipeline,
        REFERENCE: digest([benchmark.digest, volume["ideal"], volume["ref_point"], *goal])[:16],
        "benchmark": result["benchmark"]["name"],
        "average_bits_range": f"{min(bits):.3f} to {max(bits):.3f}",
        "base_model": result["model"]["name"],
        "base_model_digest": result["model"]["digest"],
    }
    tags |= {"dvc_md5": md5} if md5 else {}
    return tags | ({"git_commit": commit} if (commit := git_commit()) else {})


@contextmanager
def followed(pipeline: str, settings: Settings, identity: str) -> Iterator[TrackedRun]:
    """The run, with the machine's load logged while the block runs; FAILED or KILLED where an error ends the block.

    A run that is finished already is left as it is.
    """
    run = open_pipeline_run(pipeline, settings, identity)
    monitor = _monitor(run) if settings.tracking.system_metrics and run.status != "FINISHED" else None
    try:
        yield run
    except BaseException as error:
        ending: Literal["FAILED", "KILLED"] = "FAILED" if isinstance(error, Exception) else "KILLED"
        with suppress(Exception):  # the error that ended the run is the one to be told
            run.finish(ending)
        raise
    finally:
        if monitor is not None:
            monitor.finish()
            with suppress(Exception):  # what MLflow cannot take ends no run; `finish` logs that
                # The seconds since the last interval, which are all that a short run has.
                monitor.collect_metrics()
                monitor.publish_metrics(monitor.aggregate_metrics())
                monitor.mlflow_logger.flush()


def log_datasets(run: TrackedRun, benchmark: Artifact, source: Mapping[str, Any]) -> None:
    """The three splits as inputs of the run, each with its size."""
    data = load_benchmark(benchmark)
    for name in SPLITS:
        split = getattr(data, name)
        run.log_dataset(
            f"{data.name}/{name}",
            source,
            f"{name[:3]}-{benchmark.digest[:16]}",
            CONTEXTS[name],
            {"num_rows": len(split), "num_tokens": int(split.lengths.sum()), "task": data.task},
        )


def track_set(parent: TrackedRun, round_index: int, configurations: Artifact, tables: Artifact, md5: str | None) -> str:
    """Log a round's set to the round's nested run, once; returns the nested run's id."""
    child = _round_run(parent, round_index)
    if md5:
        child.set_tags({"dvc_md5": md5})
    child.log_once("set", configurations.digest, lambda run: _log_set(parent, run, configurations, tables))
    return child.run_id


def track_state(parent: TrackedRun, round_index: int, method: str, state: Artifact) -> None:
    """Log a round's loss curve, once; CoA's to the round's nested run too, which ends with it."""
    part = f"training-{method}-{round_index}"
    parent.log_once(part, state.digest, lambda run: _log_training(run, method, state))
    if method == "coa":
        child = _round_run(parent, round_index)
        child.log_once(part, state.digest, lambda run: _log_training(run, method, state))
        child.finish()


def _round_run(parent: TrackedRun, round_index: int) -> TrackedRun:
    name = "initial set" if round_index == 0 else f"round {round_index}"
    return parent.child(name, f"round-{round_index}", {"round": round_index}, {"round": str(round_index)})


def _log_set(parent: TrackedRun, child: TrackedRun, configurations: Artifact, tables: Artifact) -> None:
    """File and table, and, once the search has measured the set, picture and the search's numbers."""
    folder = current_store().path(configurations)
    measured = load_tables(tables)
    members = load_set(configurations, measured)
    child.log_artifact(folder / SET, "configurations")
    child.log_table(round_rows(members, measured), "configurations/table.json")
    bits = measured.average_bits(members.configurations)
    numbers: dict[str, Any] = {"n_members": len(members), "bits_min": float(bits.min()), "bits_max": float(bits.max())}
    step = 0
    if (folder / ROUND).is_file():
        record = read_json(folder / ROUND)
        step = record["round"]
        numbers |= {name: record[name] for name in SEARCHED}
        child.log_artifact(folder / ROUND, "configurations")
        picture = figure_png(round_figure(members, measured, record))
        child.log_bytes(picture, f"figures/round-{step:02d}.png")
        parent.log_bytes(picture, f"figures/rounds/round-{step:02d}.png")
    for run in (child, parent):
        run.log_metrics({f"search/{name}": value for name, value in numbers.items()}, step=step)


def _log_training(run: TrackedRun, method: str, state: Artifact) -> None:
    """Loss and learning rate by step; charts of one quantity stand beside each other, a chart for each method."""
    file = current_store().path(state) / HISTORY
    rows = read_json(file) if file.is_file() else []
    points = [{"step": row["step"], f"loss/{method}": row["loss"], f"lr/{method}": row["lr"]} for row in rows]
    run.log_history(points, "train/")


def log_result(run: TrackedRun, tables: Artifact, report: Artifact) -> None:
    """What the report says: hypervolumes, numbers by budget and method, seconds by stage, figures, files."""
    folder = current_store().path(report)
    result = read_json(folder / RESULT)
    checked = as_result(result)
    metric = result["benchmark"]["metric"]
    for method in result["arms"]:
        summary = {f"hypervolume/{method}": result["hypervolume"]["values"][method]}
        for row in result["budgets"]:
            at = budget_name(row["budget"], result["cost"]["kind"])
            for name, values in {**row["metrics"], metric: row["metric"]}.items():
                summary[f"{name}/{at}/{method}"] = values[method]
            summary[f"loss/{at}/{method}"] = row["loss"][method]
        run.log_metrics(summary)
    run.log_metrics({f"seconds/{name.replace(' ', '-')}": s for name, s in result["seconds"].items()})
    run.log_artifact(current_store().path(tables) / TABLES, "calibration")
    for name in ("report.html", "table.md", RESULT):
        run.log_artifact(folder / name, "report")
    run.log_artifact(folder / "front.png", "figures")
    for name, draw in (("curves", curves_figure), ("rounds", rounds_figure), ("bits-by-layer", heatmap_figure)):
        run.log_bytes(figure_png(draw(checked)), f"figures/{name}.png")
    run.set_description((folder / "table.md").read_text(encoding="utf-8"))


def _monitor(run: TrackedRun) -> Any:
    # It says that it starts and stops in every run's log.
    logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=INTERVAL, resume_logging=True, tracking_uri=run.tracker.tracking_uri
    )
    monitor.start()
    return monitor


def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _user() -> str:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "unknown"  # a container's user without a name


def _prefect_url() -> str | None:
    """The page of the pipeline's flow run on the Prefect server, from any of its subflows; None outside of one."""
    from prefect.runtime import flow_run

    with suppress(Exception):
        if flow_run.id:
            return f"{str(flow_run.ui_url).rsplit('/', 1)[0]}/{flow_run.root_flow_run_id}"
    return None
