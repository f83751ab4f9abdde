"""The model registry: every trained bundle is a version, `champion` the best one measured on the same yardstick,
`newest` the one that was made last.

A hypervolume only compares with one of the same benchmark and reference point, so both are part of the tag
`hypervolume_reference`, and the alias never moves across two of them by itself.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models.model import Model
from mlflow.pyfunc import save_model
from packaging.version import Version

import coalora
from coalora.errors import CoaloraError
from coalora.files import digest
from pipeline.scrub import one_line, scrub_text
from pipeline.settings.sections import TrackingSettings
from pipeline.tracking.runs import IDENTITY_TAG, TrackedRun, flatten, open_tracker

CHAMPION = "champion"
NEWEST = "newest"  # MLflow keeps the word `latest` for itself
HYPERVOLUME = "hypervolume"
REFERENCE = "hypervolume_reference"
ADDRESS = "s3_address"
DECISION = "coalora.champion_decision"  # set last: a version without it was cut short
PACKAGES = ("mlflow", "torch", "transformers", "peft", "numpy", "scipy", "safetensors", "boto3")

CODE = Path(coalora.__file__).resolve().parent  # travels with the model

_LOADING = """Load it, and ask for any budget:

```python
import mlflow

mlflow.set_tracking_uri("{uri}")
model = mlflow.pyfunc.load_model("models:/{model}")
answer = model.predict([{{"budget": 3.0, "format": "inline"}}])[0]  # choices of all layers, loss, and the adapter
```
"""

_MODEL_CODE = Path(__file__).with_name("registered_model.py")


@dataclass(frozen=True)
class Registered:
    """What became of a bundle."""

    name: str
    version: int
    champion_moved: bool  # by this call
    reason: str  # why the alias moved, or why it did not


def requirements() -> list[str]:
    """Pinned requirements of what is installed.

    MLflow's own inference loads the model in a new process and takes tens of seconds. The local part of a
    version (2.13.0+cpu) is left out: no index serves it.
    """
    return [f"{name}=={Version(installed_version(name)).public}" for name in PACKAGES]


def register(
    run: TrackedRun,
    bundle_folder: Path,
    content: str,
    model_name: str,
    *,
    hypervolume: float,
    tags: Mapping[str, str],
    description: str,
) -> Registered:
    """Register a bundle as a version of a model, and make it champion if it is better.

    Repeating a call returns the version that the first one made. A call that was cut short is finished by
    the next.

    Args:
        run: the run that it comes from.
        bundle_folder: what `Bundle.save` wrote.
        content: its digest; a version stands for this content of this run.
        model_name: letters, digits, dots, dashes and underscores.
        hypervolume: of the evaluated set; larger is better.
        tags: of the version, among them `hypervolume_reference`: benchmark, objectives and reference point.
        description: of the version, in Markdown; the lines that load it are added.
    """
    identity, client = digest([run.identity, content]), run.client
    _create_registered_model(client, model_name)
    found = client.search_model_versions(f"name = '{model_name}' and tags.`{IDENTITY_TAG}` = '{identity}'")
    made = min(found, key=lambda version: int(version.version)) if found else None
    if made is not None and DECISION in made.tags:
        return Registered(model_name, int(made.version), False, made.tags[DECISION])
    if made is None:
        plain = flatten(tags) | {HYPERVOLUME: repr(float(hypervolume)), IDENTITY_TAG: identity}
        made = _create(run, bundle_folder, model_name, plain)
    loading = _LOADING.format(uri=scrub_text(run.tracker.tracking_uri), model=f"{model_name}/{made.version}")
    client.update_model_version(model_name, made.version, f"{description}\n{loading}")
    client.set_registered_model_alias(model_name, NEWEST, made.version)
    return _crown(client, model_name, made)


def tag_address(tracking: TrackingSettings, run_id: str, address: str) -> list[str]:
    """Set the tag `s3_address` of a run and of all versions registered from it; returns these, as `NAME version N`.

    Raises:
        CoaloraError: MLflow does not know the run, or cannot be reached: the publication itself is whole.
    """
    try:
        client = open_tracker(tracking.experiment, tracking.tracking_uri).client
        client.set_tag(run_id, ADDRESS, address)
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        for version in versions:
            client.set_model_version_tag(version.name, version.version, ADDRESS, address)
    except MlflowException as error:
        raise CoaloraError(
            f"Run {run_id} is not tagged with its address: MLflow refuses, or is away ({one_line(error)[:200]})",
            remedy=f"Call `coalora upload` where MLflow can be reached; {address} itself is whole",
        ) from error
    return sorted(f"{version.name} version {version.version}" for version in versions)


def tag_pairs(client: MlflowClient, version: ModelVersion, rows: Iterable[Mapping[str, Any]]) -> str:
    """Tag a version with the pairs made of it, `device.NAME`: bits, bytes, digest and place; returns its name."""
    for row in rows:
        place = row["address"] or row["folder"]
        value = f"{row['bits']:.3f} bits, {row['bytes']} bytes, {row['digest']}, {place}"
        client.set_model_version_tag(version.name, version.version, f"device.{row['device']}", value)
    return f"{version.name} version {version.version}"


def _create_registered_model(client: MlflowClient, model_name: str) -> None:
    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create(run: TrackedRun, bundle_folder: Path, model_name: str, tags: Mapping[str, str]) -> ModelVersion:
    # By hand what mlflow.pyfunc.log_model does: that works on the process's tracking URI, not the client's.
    client = run.client
    logged = client.create_logged_model(run.tracker.experiment_id, model_name, source_run_id=run.run_id)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            with _without_type_remark():
                save_model(
                    path=str(folder),
                    python_model=str(_MODEL_CODE),
                    artifacts={"bundle": str(bundle_folder.resolve())},
                    code_paths=[str(CODE)],
                    pip_requirements=requirements(),
                    mlflow_model=Model(
                        artifact_path=logged.artifact_location, model_id=logged.model_id, run_id=run.run_id
                    ),
                )
            client.log_model_artifacts(logged.model_id, str(folder))
        client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, 0)])
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    # A database's registry resolves models:/<id> by the process's tracking URI; a server by its own.
    served = run.tracker.tracking_uri.startswith(("http://", "https://"))
    source = logged.model_uri if served else logged.artifact_location
    return client.create_model_version(
        model_name,
        source,
        run_id=run.run_id,
        tags=dict(tags),
        model_id=logged.model_id,
        await_creation_for=0,  # both stores answer when it is there
    )


@contextmanager
def _without_type_remark() -> Iterator[None]:
    """Drop MLflow's remark on answers of any type: a choice holds numbers and words. Other warnings pass.

    Recorded and not filtered, since imports during `save_model` put filters of their own before ours.
    """
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if "Any type hint is inferred" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _champion(client: MlflowClient, model_name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(model_name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _crown(client: MlflowClient, model_name: str, made: ModelVersion) -> Registered:
    champion = _champion(client, model_name)
    moved, reason = _compare(made.tags, None if champion is None else champion.tags)
    if champion is not None and champion.version == made.version:
        moved, reason = True, "made champion by a call that was cut short"
    if moved:
        client.set_registered_model_alias(model_name, CHAMPION, made.version)
    client.set_model_version_tag(model_name, made.version, DECISION, reason)
    return Registered(model_name, int(made.version), moved, reason)


def _compare(new: Mapping[str, str], old: Mapping[str, str] | None) -> tuple[bool, str]:
    """(becomes champion, reason) from the tags of two versions."""
    if old is None:
        return True, "the first champion"
    try:
        previous = float(old[HYPERVOLUME])
    except (KeyError, ValueError):
        return False, "the champion has no hypervolume to compare with: move the alias by hand"
    if old.get(REFERENCE) != new[REFERENCE]:
        yardsticks = f"measured on {new[REFERENCE]!r}, the champion on {old.get(REFERENCE)!r}"
        return False, f"{yardsticks}: move the alias by hand"
    hypervolume = float(new[HYPERVOLUME])
    better = hypervolume > previous
    return better, f"hypervolume {hypervolume:.6g} is {'' if better else 'not '}above the champion's {previous:.6g}"
