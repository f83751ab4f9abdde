"""MLflow runs that are found again by identity, and whose every part is logged once.

A pipeline that is killed, run again, or served from the cache must leave one MLflow run, not three. So a run
carries its identity in the tag `coalora.identity`, and the tag `coalora.logged` names each part that was logged
with the digest of its content. Runs are addressed by id through `MlflowClient`: MLflow's active run
and its tracking URI are state of a thread and of the process, and mapped tasks run in many threads.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from coalora.errors import CoaloraError
from pipeline.scrub import scrub, scrub_text
from pipeline.tracking.server import default_place
from pipeline.tracking.values import flatten

IDENTITY_TAG = "coalora.identity"
LOGGED_TAG = "coalora.logged"  # {part: first digits of its digest}
MAX_LOGGED = 150  # parts that the tag holds: MLflow cuts tags at 8000 characters
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
_IDENTITY = re.compile(r"[A-Za-z0-9._:-]{1,200}")
_PLAIN = "Use a digest, or 1 to 200 of A-Z a-z 0-9 . _ : -"
_SEARCH_OR_CREATE = threading.Lock()  # two threads must not both find nothing and create
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_READ_AND_WRITE = threading.Lock()  # of the tag above, by threads of this process


def open_tracker(experiment: str, tracking_uri: str | None = None) -> Tracker:
    """A tracker at `default_place(tracking_uri)`."""
    place = default_place(tracking_uri)
    return Tracker(place.tracking_uri, experiment, place.artifact_root)


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
        if database and database[1] != ":memory:":
            Path(database[1]).parent.mkdir(parents=True, exist_ok=True)
        self.tracking_uri, self.experiment = tracking_uri, experiment
        # The registry is named too: by default it is the process's, not the client's.
        self.client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        location = artifact_root.resolve().as_uri() if artifact_root and tracking_uri.startswith("sqlite:") else None
        self.experiment_id = self._experiment(location)

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
    ) -> TrackedRun:
        """The run of an identity: resumed if it was cut short, left as it is if finished, else created.

        Args:
            identity: equal for runs that are the same piece of work, such as a digest of settings and code.
            name: shown in MLflow.
            params: nested settings; see `flatten`.
            tags: such as the git commit; secrets are dropped.

        Raises:
            CoaloraError: the identity has characters that a search cannot quote.
        """
        if not _IDENTITY.fullmatch(identity):
            raise CoaloraError(f"Identity {identity!r} is no plain word", remedy=_PLAIN)
        return self._open(identity, name, params or {}, tags or {}, None)

    def open_child(
        self,
        parent: TrackedRun,
        name: str,
        key: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> TrackedRun:
        """As `TrackedRun.child`."""
        if not _IDENTITY.fullmatch(key):
            raise CoaloraError(f"Key {key!r} of a nested run is no plain word", remedy=_PLAIN)
        return self._open(f"{parent.identity}/{key}", name, params or {}, tags or {}, parent.run_id)

    def _open(
        self, identity: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any], parent: str | None
    ) -> TrackedRun:
        plain = flatten(tags) | {IDENTITY_TAG: identity}
        if parent is not None:
            plain[MLFLOW_PARENT_RUN_ID] = parent
        with _SEARCH_OR_CREATE:
            found = self._find(identity)
            if found is not None and found.info.status == "FINISHED":
                return TrackedRun(self, found.info.run_id, identity)
            if found is None:
                run_id = self.client.create_run(self.experiment_id, run_name=name, tags=plain).info.run_id
            else:
                run_id = found.info.run_id
        run = TrackedRun(self, run_id, identity)
        if found is not None:
            run.set_tags(plain)
            self.client.update_run(run_id, status="RUNNING")
        run.log_params(params)
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
            return f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"mlflow ui --backend-store-uri {uri}  (run {run_id})"


class TrackedRun:
    """A run of a `Tracker`; made by `Tracker.open_run` and `child`. Methods may be called from any thread.

    Attributes:
        run_id: MLflow's id.
        identity: what makes this the same run when it is opened again.
    """

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
        self,
        name: str,
        key: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> TrackedRun:
        """The nested run of a key, resumed by the same rule as `Tracker.open_run`.

        Args:
            name: shown in MLflow.
            key: tells the children of this run apart.
        """
        return self.tracker.open_child(self, name, key, params, tags)

    def log_once(self, part: str, digest: str, fn: Callable[[TrackedRun], None]) -> bool:
        """Run `fn(self)` unless it has been logged under this digest already.

        The tag is set after `fn` has returned: a part that was cut short is logged again as a whole.

        Args:
            part: name of what is logged, such as "calibration".
            digest: of the content that is logged.

        Returns:
            Whether `fn` was run.
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
        for chunk in _chunks([RunTag(k, v) for k, v in flatten(tags).items()], MAX_PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, tags=chunk, synchronous=True)

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
        new = [Param(k, v) for k, v in flat.items() if k not in known]
        for chunk in _chunks(new, MAX_PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=chunk, synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log numbers at one step; None is left out."""
        self.log_history([{**metrics, "step": step}])

    def log_history(self, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Log rows of numbers, each with its "step", in batches; points that the run has are left out.

        Args:
            rows: such as {"step": 10, "loss": 2.1, "lr": 1e-3}; None is left out.
            prefix: put before every name, such as "round-1/".

        Raises:
            CoaloraError: a row has no whole-number step, or a value is no number.
        """
        now = int(time.time() * 1000)
        metrics = [Metric(f"{prefix}{k}", v, now, step) for step, k, v in _points(rows)]
        known = self._known({m.key for m in metrics})
        new = {(m.key, m.step, repr(m.value)): m for m in metrics}
        for chunk in _chunks([m for k, m in new.items() if k not in known], MAX_METRICS_PER_BATCH):
            self.client.log_batch(self.run_id, metrics=chunk, synchronous=True)

    def _known(self, keys: set[str]) -> set[tuple[str, int, str]]:
        """Points whose (name, step, value) is the newest of that step: these need no second entry."""
        newest: dict[tuple[str, int], Metric] = {}
        for key in keys & set(self.client.get_run(self.run_id).data.metrics):
            for m in self.client.get_metric_history(self.run_id, key):
                at = (key, m.step)
                if at not in newest or m.timestamp >= newest[at].timestamp:
                    newest[at] = m
        return {(key, step, repr(m.value)) for (key, step), m in newest.items()}

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Copy a file, or a folder's contents, to the run's artifacts under `artifact_path`."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), artifact_path)
        elif path.is_file():
            self.client.log_artifact(self.run_id, str(path), artifact_path)
        else:
            raise CoaloraError(f"Artifact {path} is neither a file nor a folder")

    def log_dict(self, content: Mapping[str, Any], artifact_file: str) -> None:
        """Write a mapping as a JSON or YAML artifact (by the name's ending), without secrets."""
        self.client.log_dict(self.run_id, scrub(content), artifact_file)

    def log_bytes(self, content: bytes, artifact_file: str) -> None:
        """Write bytes, such as a picture, as an artifact."""
        at = PurePosixPath(artifact_file)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / at.name
            file.write_bytes(content)
            self.log_artifact(file, str(at.parent) if at.parent.name else None)

    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact_file: str) -> None:
        """Write rows as an artifact that MLflow's page shows as a table, in place of what it held before.

        MLflow's own `log_table` appends, which would double a table that is logged again.
        """
        columns = list(rows[0]) if rows else []
        self.log_dict({"columns": columns, "data": [[row[c] for c in columns] for row in rows]}, artifact_file)
        known = json.loads(self.client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": artifact_file, "type": "table"}
        if entry not in known:
            self.client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, entry]))

    def set_description(self, markdown: str) -> None:
        """What MLflow's page shows above the run."""
        self.client.set_tag(self.run_id, MLFLOW_RUN_NOTE, markdown)

    def log_dataset(
        self,
        name: str,
        source: str | Mapping[str, Any],
        digest: str,
        context: str = "training",
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a data set as an input of the run.

        Args:
            source: where it comes from, such as a path in the checkout, or a hub id with its revision.
            digest: of its content; MLflow keeps the first 36 characters.
            context: what it was used for.
            profile: its size.
        """
        plain = {"uri": source} if isinstance(source, str) else source
        dataset = Dataset(
            name,
            digest[:MAX_DATASET_DIGEST],
            "coalora",
            json.dumps(scrub(plain), sort_keys=True),
            profile=None if profile is None else json.dumps(profile, sort_keys=True),
        )
        tag = InputTag("mlflow.data.context", context)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run; a finished one stays finished with its first end time."""
        if self.status != "FINISHED":
            self.client.set_terminated(self.run_id, status)


def _points(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, float]]:
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise CoaloraError(f"A row of metrics has step {step!r}", remedy="Give it a whole number")
        for key, value in row.items():
            if key == "step" or value is None:
                continue
            try:
                if isinstance(value, str | bool):
                    raise TypeError
                yield step, key, float(value)
            except (TypeError, ValueError):
                raise CoaloraError(
                    f"Metric {key} is no number but {value!r}", remedy="Log words as parameters or tags"
                ) from None


def _chunks(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
