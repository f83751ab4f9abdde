"""Parts of a pipeline, as `dvc repro` runs them, and what each has made last: copied without what computed it.

A part that is known answers for all of its stages at once. Its key covers everything that their keys do and more: all
code of ours, the settings, the content of the input files, the versions of packages, the GPUs. So nothing slow has to
be imported to see that nothing is to be done; where anything differs, the stages are asked, each by its own key.
"""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coalora.errors import CoaloraError
from coalora.files import digest, file_sha256, json_bytes, read_json, replace_file, write_json
from coalora.registry import added_modules
from pipeline.environment import coalora_home
from pipeline.inputs.base import model_content
from pipeline.inputs.fingerprint import files_digest, input_files
from pipeline.progress import get_logger
from pipeline.settings.sections import Settings
from pipeline.stages.keys import strings, versions
from pipeline.store.store import Artifact, default_store
from pipeline.tracking.server import place_of_runs, require_server

INPUTS = "inputs"  # what decides the others
REGISTRATION = "registration"  # acts on other systems, and makes one file
ROOT = Path(__file__).parents[1]
# Of the code, what may change what a part makes: the rooms of the stages and of what registration does elsewhere.
DECIDING = (
    "coalora/", "tasks/", "flows/graph.py", "pipeline/inputs/", "pipeline/settings/", "pipeline/report/",
    "pipeline/tracking/", "pipeline/s3/",
)  # fmt: skip


def _code() -> list[Any]:
    rooms = [ROOT / room for room in ("coalora", "pipeline", "tasks", "flows")]
    files = [file for room in rooms for file in room.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return [[str(file.relative_to(ROOT)), file_sha256(file)] for file in sorted(files)]  # templates and tables as well


_CODE = _code()  # when it is imported: what an edit on disk changes later is not what runs here


def part_key(part: str, name: str, settings: Settings) -> str | None:
    """Digest of all that decides what a part makes; None where something decides that is not looked at here."""
    content = settings.model_dump(mode="json")
    if settings.evaluation.harness_tasks or any(map(added_modules, strings(content))):
        return None
    files = _files(settings)
    if not all(file.is_file() for file in files):
        return None
    if part != REGISTRATION:
        del content["tracking"], content["versioning"], content["storage"]
    return digest(
        [
            [part, name, content, model_content(settings.model), files_digest(files)],
            _CODE,
            [platform.python_version(), versions()],
            [sorted(map(str, Path("/dev").glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")],
        ]
    )


def _files(settings: Settings) -> list[Path]:
    named = [settings.cost.table, settings.initial_set.file]
    return [*input_files(settings.benchmark), *map(Path, filter(None, named))]


def write_inputs(name: str, settings: Settings) -> None:
    """Write `outputs/inputs`: digests of all that decides a result, and the few settings that runs are compared by.

    DVC shows a column for each dependency and each setting that it knows: so these stand for all of them. As with any
    dependency of DVC's, packages and GPUs do not count.
    """
    folder = Path("outputs", INPUTS)
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in _files(settings) if file.is_file()]  # one that is not is told by whoever reads it
    decides = {
        "code": digest([file for file in _CODE if file[0].startswith(DECIDING)]),
        "settings": digest([name, settings.model_dump(mode="json")]),
        "data": digest([model_content(settings.model), files_digest(files)]),
    }
    write_json(folder / "digests.json", decides)
    rounds = settings.search.rounds
    compared = {
        "adapter": {"r": settings.adapter.r},
        "training": {"steps": settings.training.total_steps(rounds)},
        "search": {"rounds": rounds},
    }
    write_json(folder / "settings.json", compared)


def remember(part: str, name: str, key: str | None, made: Iterable[tuple[str, Artifact]] | dict[str, Any]) -> None:
    """Keep what a part has made: (place below outputs/, artifact) of each, or the content of registration.json.

    Args:
        key: from before it was made: inputs may have changed since.
    """
    if key is None:
        return
    content = made if isinstance(made, dict) else [[place, found.model_dump(mode="json")] for place, found in made]
    file = _file(part, name)
    with suppress(OSError):  # without it the stages are asked: no reason to end a run
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json_bytes({"key": key, "made": content}))


def recall(part: str, name: str, settings: Settings) -> bool:
    """Bring `outputs/` up to date from what the part made last, where that still holds; whether it did."""
    try:
        known = read_json(_file(part, name))
        if known["key"] != part_key(part, name, settings):
            return False
        if part == REGISTRATION:
            if not _still_there(name, settings, known["made"]):
                return False
            write_registration(known["made"])
        else:
            store = default_store()
            made = [(str(place), Artifact.model_validate(artifact)) for place, artifact in known["made"]]
            if any(store.problems(artifact) for _, artifact in made):
                return False
            for place, artifact in made:
                store.materialize(artifact, Path("outputs", place))
    except (OSError, CoaloraError, ValueError, KeyError, TypeError):
        return False  # the stages say what is wrong, if anything is
    get_logger().info("%s: known, with everything that it was made from", part)
    return True


def write_registration(published: dict[str, Any]) -> None:
    """Write `outputs/registration.json`."""
    Path("outputs").mkdir(exist_ok=True)
    write_json(Path("outputs", "registration.json"), published)


def _still_there(name: str, settings: Settings, published: dict[str, Any]) -> bool:
    """Whether run folder, versioned sets and the place of MLflow's runs are as registration left them."""
    require_server(place_of_runs(settings.tracking.tracking_uri), existing=True)
    sets = list(Path("configurations", name).glob("round-*.json.dvc"))
    versioned = not settings.versioning.enabled or len(sets) > settings.search.rounds
    return versioned and not settings.storage.publish and Path(published["folder"], "run.json").is_file()


def _file(part: str, name: str) -> Path:
    return coalora_home() / "parts" / f"{name}-{part}.json"
