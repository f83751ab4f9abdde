"""MLflow runs that are found again by identity, and whose every part is logged once.

A pipeline that is killed, run again, or served from the cache must leave one MLflow run, not three. So a run
carries its identity in the tag `coalora.identity`, and the tag `coalora.logged` names each part that was logged
with the digest of its content. Runs are addressed by id through `MlflowClient`: MLflow's active run
and its tracking URI are state of a thread and of the process, and mapped tasks run in many threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import filelock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from coalora.errors import CoaloraError
from pipeline.environment import coalora_home
from pipeline.scrub import is_secret, scrub, scrub_text
from pipeline.tracking.server import place_of_runs, set_aside_unfinished

IDENTITY_TAG = "coalora.identity"
LOGGED_TAG = "coalora.logged"  # {part: first digits of its digest}
MAX_LOGGED = 150  # parts that the tag holds: MLflow cuts tags at 8000 characters
MAX_VALUE = 500  # MLflow's older servers refuse longer parameters
MAX_METRICS_PER_BATCH = 1000  # MLflow refuses more; likewise below
MAX_PARAMS_PER_BATCH = 100
MAX_DATASET_DIGEST = 36
DIGITS = 16

# MLflow's pages open with the views of training, not those of language-model applications.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "hypervolume/coa",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    "mlflow.note.content": "One run for each pipeline run, with a nested run for each round's configuration set. "
    "`hypervolume/coa` compares runs of one benchmark: higher is better.",
}
_SEARCH_OR_CREATE = threading.Lock()  # two threads must not both find nothing and create
_READ_AND_WRITE = threading.Lock()  # of the tag of what is logged, by threads of this process
_NO_NAME = re.compile(r"[^\w .:/-]")
_log = logging.getLogger(__name__)


def open_tracker(experiment: str, tracking_uri: str | None = None) -> Tracker:
    """The tracker of the place that settings name; artifacts of a database lie in COALORA_HOME."""
    return Tracker(place_of_runs(tracking_uri), experiment, coalora_home() / "mlartifacts")


# Address of MLflow's server for a person's browser, where workers call it by another.
UI_VARIABLE = "COALORA_MLFLOW_UI"


class Tracker:
    """Runs of one MLflow experiment.

    Args:
        tracking_uri: `http(s)://` of a server, or a database such as `sqlite:////folder/mlflow.db`.
        experiment: name; created where it is missing.
        artifact_root: folder of the artifacts of a database's experiment; a server decides by itself.

    Raises:
        CoaloraError: the URI is a plain folder (MLflow no longer keeps runs in files), or the experiment was
            deleted.
    """

    def __init__(self, tracking_uri: str, experiment: str, artifact_root: Path | None = None) -> None:
        if "://" not in tracking_uri or tracking_uri.startswith("file:"):
            raise CoaloraError(
                f"tracking.tracking_uri {scrub_text(tracking_uri)} is neither a server nor a database",
                remedy="Write http://host:5000 or sqlite:////folder/mlflow.db, or leave it out for a database in "
                "COALORA_HOME",
            )
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        database = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", tracking_uri)
        file = Path(database[1]) if database and database[1] != ":memory:" else None
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.tracking_uri, self.experiment = tracking_uri, experiment
        # Opening a database migrates it: of two processes that both begin, one would find the other's half.
        with filelock.FileLock(f"{file}.lock") if file else nullcontext():
            if file:
                set_aside_unfinished(file)
            # The registry is named too: by default it is the process's, not the client's.
            self.client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
            root = artifact_root.resolve().as_uri() if artifact_root and database else None
            self.experiment_id = self._experiment(root)

    def _experiment(self, artifact_location: str | None) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return self.client.create_experiment(
                    self.experiment, artifact_location=artifact_location, tags=EXPERIMENT_TAGS
                )
            except MlflowException:
                found = self.client.get_experiment_by_name(self.experiment)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise CoaloraError(
                f"MLflow's experiment {self.experiment!r} is {found.lifecycle_stage}",
                remedy=f"Run mlflow experiments restore --experiment-id {found.experiment_id}, or set "
                "tracking.experiment",
            )
        return found.experiment_id

    def open_run(
        self,
        identity: str,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: TrackedRun | None = None,
    ) -> TrackedRun:
        """The run of an identity: resumed if it was cut short, left as it is if finished, else created.

        Args:
            identity: equal for runs that are the same piece of work: a digest, below its parent's.
            name: shown in MLflow.
            params: nested settings; see `flatten`.
            tags: such as the git commit; secrets are dropped.
        """
        plain = flatten(tags or {}) | {IDENTITY_TAG: identity}
        if parent is not None:
            plain[MLFLOW_PARENT_RUN_ID] = parent.run_id
        with _SEARCH_OR_CREATE:
            found = self._find(identity)
            if found is not None and found.info.status == "FINISHED":
                return TrackedRun(self, found.info.run_id, identity)
            made = found or self.client.create_run(self.experiment_id, run_name=name, tags=plain)
        run = TrackedRun(self, made.info.run_id, identity)
        if found is not None:
            run.set_tags(plain)
            self.client.update_run(run.run_id, status="RUNNING")
        run.log_params(params or {})
        return run

    def _find(self, identity: str) -> Run | None:
        runs = self.client.search_runs(
            [self.experiment_id],
            filter_string=f"tags.`{IDENTITY_TAG}` = '{identity}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return runs[0] if runs else None

    def url_hint(self, run_id: str) -> str:
        """Where to look at a run: its page on a server, the command that shows it for a database."""
        uri = scrub_text(self.tracking_uri)
        if uri.startswith(("http://", "https://")):
            uri = os.environ.get(UI_VARIABLE) or uri
            return f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"mlflow ui --backend-store-uri {uri}  (run {run_id})"


class TrackedRun:
    """A run of a `Tracker`; made by `Tracker.open_run` and `child`. Methods may be called from any thread."""

    def __init__(self, tracker: Tracker, run_id: str, identity: str) -> None:
        self.tracker, self.run_id, self.identity = tracker, run_id, identity
        self.client = tracker.client

    @property
    def url_hint(self) -> str:
        return self.tracker.url_hint(self.run_id)

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
        return self.client.get_run(self.run_id).info.status

    def child(
        self, name: str, key: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
    ) -> TrackedRun:
        """The nested run of a key, which tells the children of this run apart; resumed as by `Tracker.open_run`."""
        return self.tracker.open_run(f"{self.identity}/{key}", name, params, tags, parent=self)

    def log_once(self, part: str, digest: str, fn: Callable[[TrackedRun], None]) -> bool:
        """Run `fn(self)` unless it has been logged under this digest already; whether it was run.

        The tag is set after `fn` has returned: a part that was cut short is logged again as a whole.
        """
        if self._logged().get(part) == digest[:DIGITS]:
            return False
        fn(self)
        with _READ_AND_WRITE:
            parts = {name: value for name, value in self._logged().items() if name != part} | {part: digest[:DIGITS]}
            # A part that falls off the front would only be looked through again: no point is logged twice.
            newest = dict(list(parts.items())[-MAX_LOGGED:])
            self.client.set_tag(self.run_id, LOGGED_TAG, json.dumps(newest))
        return True

    def _logged(self) -> dict[str, str]:
        logged: dict[str, str] = json.loads(self.client.get_run(self.run_id).data.tags.get(LOGGED_TAG, "{}"))
        return logged

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; nested ones are flattened, secrets dropped."""
        self._log("tags", [RunTag(k, v) for k, v in flatten(tags).items()], MAX_PARAMS_PER_BATCH)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested parameters, flattened and without secrets.

        MLflow never changes a parameter: of one that the run has with another value, the first is kept and a
        warning names it.
        """
        flat = flatten(params)
        known = self.client.get_run(self.run_id).data.params
        changed = sorted(k for k, v in flat.items() if k in known and known[k] != v)
        if changed:
            _log.warning("run %s keeps its first values of %s", self.run_id, ", ".join(changed))
        self._log("params", [Param(k, v) for k, v in flat.items() if k not in known], MAX_PARAMS_PER_BATCH)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log numbers at one step; None is left out."""
        self.log_history([{**metrics, "step": step}])

    def log_history(self, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Log rows of numbers, each with its "step", in batches; points that the run has are left out."""
        now = int(time.time() * 1000)
        points = [(row["step"], f"{prefix}{k}", float(v)) for row in rows for k, v in row.items() if v is not None]
        metrics = [Metric(name, value, now, step) for step, name, value in points if name != f"{prefix}step"]
        known = self._known({m.key for m in metrics})
        new = {(m.key, m.step, repr(m.value)): m for m in metrics}
        self._log("metrics", [m for k, m in new.items() if k not in known], MAX_METRICS_PER_BATCH)

    def _known(self, keys: set[str]) -> set[tuple[str, int, str]]:
        """Points whose (name, step, value) is the newest of that step: these need no second entry."""
        newest: dict[tuple[str, int], Metric] = {}
        for key in keys & set(self.client.get_run(self.run_id).data.metrics):
            for m in self.client.get_metric_history(self.run_id, key):
                at = (key, m.step)
                if at not in newest or m.timestamp >= newest[at].timestamp:
                    newest[at] = m
        return {(key, step, repr(m.value)) for (key, step), m in newest.items()}

    def _log(self, what: Literal["tags", "params", "metrics"], items: Sequence[Any], most: int) -> None:
        for start in range(0, len(items), most):
            self.client.log_batch(self.run_id, **{what: items[start : start + most]}, synchronous=True)

    def log_artifact(self, file: Path, artifact_path: str | None = None) -> None:
        """Copy a file to the run's artifacts, under `artifact_path`."""
        self.client.log_artifact(self.run_id, str(file), artifact_path)

    def log_bytes(self, content: bytes, artifact_file: str) -> None:
        """Write bytes, such as a picture, as an artifact."""
        at = PurePosixPath(artifact_file)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / at.name
            file.write_bytes(content)
            self.log_artifact(file, str(at.parent) if at.parent.name else None)

    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact_file: str) -> None:
        """Write rows, without secrets, as an artifact that MLflow's page shows as a table, in place of what it held.

        MLflow's own `log_table` appends, which would double a table that is logged again.
        """
        columns = list(rows[0]) if rows else []
        content = {"columns": columns, "data": [[row[c] for c in columns] for row in rows]}
        self.client.log_dict(self.run_id, scrub(content), artifact_file)
        known = json.loads(self.client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": artifact_file, "type": "table"}
        if entry not in known:
            self.client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, entry]))

    def set_description(self, markdown: str) -> None:
        """What MLflow's page shows above the run."""
        self.client.set_tag(self.run_id, MLFLOW_RUN_NOTE, markdown)

    def log_dataset(
        self, name: str, source: Mapping[str, Any], digest: str, context: str, profile: Mapping[str, Any]
    ) -> None:
        """Record a data set as an input of the run."""
        origin, size = json.dumps(scrub(source), sort_keys=True), json.dumps(profile, sort_keys=True)
        dataset = Dataset(name, digest[:MAX_DATASET_DIGEST], "coalora", origin, profile=size)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run; a finished one stays finished with its first end time."""
        if self.status != "FINISHED":
            self.client.set_terminated(self.run_id, status)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mapping -> {"a.b": text}, as MLflow keeps parameters and tags: no secrets, no value above `MAX_VALUE`.

    Lists become one JSON value. Values that are None are kept as "None": an absent parameter says nothing.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        # A key may be a glob (ranks by layer), which MLflow refuses in a name.
        name = f"{prefix}{_NO_NAME.sub('_', str(key))}"
        if is_secret(str(key)):
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat[name] = shorten(json.dumps(scrub(value), sort_keys=True, default=str))
        else:
            flat[name] = shorten(scrub_text(str(value)))
    return flat


def shorten(text: str) -> str:
    """The text, or its beginning with a digest of the whole: two long values stay distinct after the cut."""
    if len(text) <= MAX_VALUE:
        return text
    end = f"... sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text[: MAX_VALUE - len(end)] + end
