"""MLflow tracking that can be repeated: runs are found by identity, and every part is logged once.

A pipeline that is killed, run again, or served from the cache must leave one MLflow run, not three. So a run
carries its identity in the tag `coalora.identity`, and the tag `coalora.logged` names each part that was logged
with the digest of its content. Runs are addressed by id through `MlflowClient`: MLflow's active run
and its tracking URI are state of a thread and of the process, and mapped tasks run in many threads.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from coalora.errors import CoaloraError
from pipeline.tracking.place import default_place
from pipeline.tracking.run import IDENTITY_TAG, TrackedRun
from pipeline.tracking.values import flatten, scrub_text

# MLflow's pages open with the views of training, not those of language-model applications.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "hypervolume/coa",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    "mlflow.note.content": "One run for each pipeline run, with a nested run for each round's configuration set. "
    "`hypervolume/coa` compares runs of one benchmark: higher is better.",
}
_IDENTITY = re.compile(r"[A-Za-z0-9._:-]{1,200}")
_SEARCH_OR_CREATE = threading.Lock()  # two threads must not both find nothing and create


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
                "tracking.tracking_uri is a server or a database",
                got=scrub_text(tracking_uri),
                expected="http://host:5000, or sqlite:////folder/mlflow.db",
                remedy="leave tracking.tracking_uri out for a database in COALORA_HOME",
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
                "runs go to an active experiment",
                got=f"experiment {self.experiment!r} is {found.lifecycle_stage}",
                remedy=f"mlflow experiments restore --experiment-id {found.experiment_id}, or set tracking.experiment",
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
            raise CoaloraError(
                "an identity is a short plain word",
                got=repr(identity),
                expected="1 to 200 of A-Z a-z 0-9 . _ : -",
                remedy="use a digest",
            )
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
            raise CoaloraError(
                "the key of a nested run is a short plain word",
                got=repr(key),
                expected="1 to 200 of A-Z a-z 0-9 . _ : -",
            )
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


def open_tracker(experiment: str, tracking_uri: str | None = None) -> Tracker:
    """A tracker at `default_place(tracking_uri)`."""
    place = default_place(tracking_uri)
    return Tracker(place.tracking_uri, experiment, place.artifact_root)
