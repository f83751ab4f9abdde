"""The registered model, as MLflow "models from code": this file is copied beside the bundle and run at load time.

It answers a device's question: a budget (average bits, or what else the run counted) or a configuration in; the choice
of every layer, the loss that training measured and, where asked, the adapter out, inline or behind a link. What it
needs at load time travels with it: the bundle as an artifact, the package `coalora` as code. Nothing else of the
checkout.

    mlflow models serve -m models:/coalora-demo@champion --env-manager local

Links lead to objects in the bucket of `COALORA_ADAPTERS` (`s3://BUCKET/PREFIX`), which the server writes with boto3's
own credentials, and are valid for an hour.
"""

import base64
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel, ConfigDict, Field, model_validator

ADAPTERS = "COALORA_ADAPTERS"
SECONDS = 3600


class AdaptRequest(BaseModel):
    """One device: a budget or a configuration.

    Attributes:
        budget: in the unit of the bundle's cost: average bits a weight of the target layers, MB or microseconds.
        configuration: layer -> choice, as answers hold it, in place of a budget.
        format: of the adapter: `none`, `inline` (safetensors in base64, megabytes) or `link` (a presigned address).
    """

    model_config = ConfigDict(extra="forbid")

    # strict takes an int, and no text or bool
    budget: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    configuration: dict[str, Any] | None = None
    format: str = Field("none", pattern="^(none|inline|link)$", strict=True)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.budget is None) == (self.configuration is None):
            raise ValueError("give exactly one of budget and configuration")
        return self


class BudgetModel(PythonModel):
    """`predict` of a bundle."""

    def load_context(self, context: PythonModelContext) -> None:
        # Imported here, so that MLflow can read the types above without loading torch.
        from coalora.export.bundle import Bundle

        self.bundle = Bundle.load(Path(context.artifacts["bundle"]))
        self.bundle.prepare()

    def predict(
        self, context: PythonModelContext, model_input: list[AdaptRequest], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One answer a request.

        Returns:
            `budget`, `average_bits` (stored bits a weight), `digest` (of the quantized base that the adapter is for),
            `configuration` (layer -> choice), `loss` (of this configuration on the run's search split as training
            measured it; None for one that was not), and of the adapter `adapter_config` (PEFT's `adapter_config.json`)
            with `adapter_safetensors` (base64 of PEFT's `adapter_model.safetensors`) or `adapter_url`; None where they
            were not asked for.

        Raises:
            MlflowException: what is asked for cannot be had (a server answers 400).
        """
        return [self._answer(request) for request in model_input]

    def _answer(self, request: AdaptRequest) -> dict[str, Any]:
        from coalora.configurations import CONFIGURATION_FORMAT, configuration_of
        from coalora.errors import CoaloraError

        bundle = self.bundle
        try:
            if request.budget is not None:
                chosen = bundle.select(request.budget)
            else:
                asked = {"format": CONFIGURATION_FORMAT, "base_digest": bundle.tables.base_digest}
                chosen = configuration_of({**asked, "layers": request.configuration}, bundle.tables)
            adapted = bundle.adapt_to(chosen)
        except CoaloraError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        answer: dict[str, Any] = {
            "budget": request.budget,
            "average_bits": adapted.average_bits,
            "digest": adapted.digest,
            "configuration": adapted.configuration,
            "loss": bundle.loss_of(chosen),
            "adapter_config": None,
            "adapter_safetensors": None,
            "adapter_url": None,
        }
        if request.format != "none":
            with tempfile.TemporaryDirectory() as folder:
                adapted.save_pretrained(folder)
                tensors = Path(folder, "adapter_model.safetensors").read_bytes()
                answer["adapter_config"] = Path(folder, "adapter_config.json").read_text(encoding="utf-8")
            if request.format == "inline":
                answer["adapter_safetensors"] = base64.b64encode(tensors).decode("ascii")
            else:
                answer["adapter_url"] = _link(tensors)
        return answer


def _link(tensors: bytes) -> str:
    """A presigned address of an object with these bytes, which is written where it is missing."""
    place = os.environ.get(ADAPTERS, "")
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    if not place.startswith("s3://") or not bucket:
        raise MlflowException.invalid_parameter_value(
            f"{ADAPTERS} names no place for links. Ask for format inline, or set it to s3://BUCKET/PREFIX"
        )
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3")
        name = f"{hashlib.sha256(tensors).hexdigest()}.safetensors"
        key = f"{prefix.strip('/')}/{name}".lstrip("/")
        try:
            client.head_object(Bucket=bucket, Key=key)
        except ClientError:
            client.put_object(Bucket=bucket, Key=key, Body=tensors)
        return str(
            client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=SECONDS)
        )
    except (BotoCoreError, ClientError) as error:
        raise MlflowException(f"The bucket {bucket} does not take the adapter ({type(error).__name__})") from error


set_model(BudgetModel())
