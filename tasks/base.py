"""Stage `base`: the base model, found or pre-trained."""

from pathlib import Path

import torch

from coalora.errors import CoaloraError
from coalora.files import write_json
from coalora.models.files import model_folder
from coalora.train.pretrain import pretrain
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
    """The base model as an artifact: a reference to an existing one, or a decoder pre-trained here.

    Args:
        content: digest of a local model's files; None for the hub and for pre-training.
        corpus: the benchmark whose training text a decoder is pre-trained on; None otherwise.
    """

    def refer(folder: Path) -> dict[str, Scalar]:
        path, name = Path(str(model.name_or_path)), str(model.name_or_path)
        reference: dict[str, object] = {"trust_remote_code": model.trust_remote_code}
        if path.is_dir():
            name = path.resolve().name
        else:
            path = model_folder(name, model.revision)
            # The snapshot's folder is named after the commit, which stays exact when a branch moves on.
            reference["revision"] = path.name
        write_json(folder / REFERENCE, reference | {"name": name, "digest": model_digest(path)})
        # Where it lies is no part of what it is: a model that has moved is not measured and trained on again.
        return {"name": name, "path": str(path.resolve())}

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

    return current_store().put("base", refer if model.pretrain is None else train)
