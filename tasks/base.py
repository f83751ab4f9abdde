"""Stage `base`: the base model, found, unpacked or pre-trained."""

import os
import shutil
from pathlib import Path

import torch

from coalora.errors import CoaloraError
from coalora.files import write_json
from coalora.models.files import model_folder
from coalora.train.pretrain import pretrain
from pipeline.inputs.base import base_name, base_source
from pipeline.inputs.corpus import documents
from pipeline.inputs.fingerprint import model_digest
from pipeline.inputs.loaders import MODEL, REFERENCE
from pipeline.progress import Progress
from pipeline.settings.sections import BenchmarkSettings, ModelSettings, RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


@stage("base", tags=("gpu",))
def prepare_base(
    *, model: ModelSettings, content: str | None, corpus: BenchmarkSettings | None, runtime: RuntimeSettings, seed: int
) -> Artifact:
    """The base model as an artifact: a reference to an existing one, one that was unpacked, or one pre-trained here.

    Args:
        content: digest of a local model's files; None for the hub and for pre-training.
        corpus: the benchmark whose training text a decoder is pre-trained on; None otherwise.
    """

    def refer(folder: Path) -> dict[str, Scalar]:
        path, name = Path(base_source(model)), base_name(model)
        reference: dict[str, object] = {"trust_remote_code": model.trust_remote_code}
        if not path.is_dir():
            path = model_folder(name, model.revision)
            # The snapshot's folder is named after the commit, which stays exact when a branch moves on.
            reference["revision"] = path.name
        write_json(folder / REFERENCE, reference | {"name": name, "digest": model_digest(path)})
        # Where it lies is no part of what it is: a model that has moved is not measured and trained on again.
        return {"name": name, "path": str(path.resolve())}

    def keep(folder: Path) -> dict[str, Scalar]:
        # Unlike a folder of the user's, what was unpacked here is on no other machine: the store carries it.
        shutil.copytree(base_source(model), folder / MODEL, copy_function=_link)
        return {"name": base_name(model)}

    def train(folder: Path) -> dict[str, Scalar]:
        if model.pretrain is None or corpus is None:
            raise CoaloraError(
                "There is nothing to pre-train on: model.pretrain or the benchmark's text is missing",
                remedy="Set model.pretrain with a benchmark of text, or model.name_or_path",
            )
        (folder / MODEL).mkdir()
        records = pretrain(
            documents(corpus)["train"],
            model.pretrain,
            folder / MODEL,
            seed=seed,
            device=torch.device(runtime.device),
            progress=Progress("pre-training"),
        )
        write_json(folder / "history.json", records)
        return {"name": "pretrained-llama", "loss": records[-1]["loss"]}

    existing = refer if model.gguf_file is None else keep
    return current_store().put("base", existing if model.pretrain is None else train)


def _link(source: str, target: str) -> None:
    """The file under another name, or a copy where the file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
