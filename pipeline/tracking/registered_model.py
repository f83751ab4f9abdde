"""The registered model, as MLflow "models from code": this file is copied beside the bundle and run at load time.

It answers budgets (average bits, or what else the run counted): budget in, the configuration of every layer and (on
request) the adapter for it out. What it needs at load time travels with it: the bundle as an artifact, the package
`coalora` as code. Nothing else of the checkout.
"""

import base64
import tempfile
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel, ConfigDict, Field


class AdaptRequest(BaseModel):
    """One budget.

    Attributes:
        budget: in the unit of the bundle's cost: average bits a weight of the target layers, MB or microseconds.
        include_adapter: send the adapter's files too (megabytes).
    """

    model_config = ConfigDict(extra="forbid")

    budget: float = Field(gt=0, allow_inf_nan=False, strict=True)  # strict takes an int, and no text or bool
    include_adapter: bool = Field(False, strict=True)


class BudgetModel(PythonModel):
    """`predict` of a bundle."""

    def load_context(self, context: PythonModelContext) -> None:
        # Imported here, so that MLflow can read the types above without loading torch.
        from coalora.export.bundle import Bundle

        self.bundle = Bundle.load(Path(context.artifacts["bundle"]))

    def predict(
        self, context: PythonModelContext, model_input: list[AdaptRequest], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One answer a request.

        Returns:
            `budget`, `average_bits` (stored bits a weight), `digest` (of the quantized base that the adapter
            is for), `configuration` (layer -> choice), and `adapter_safetensors` (base64 of PEFT's
            `adapter_model.safetensors`) with `adapter_config` (PEFT's `adapter_config.json`), both None
            unless they were asked for.
        """
        return [self._answer(request) for request in model_input]

    def _answer(self, request: AdaptRequest) -> dict[str, Any]:
        adapted = self.bundle.adapt(request.budget)
        answer: dict[str, Any] = {
            "budget": request.budget,
            "average_bits": adapted.average_bits,
            "digest": adapted.digest,
            "configuration": adapted.configuration,
            "adapter_safetensors": None,
            "adapter_config": None,
        }
        if request.include_adapter:
            with tempfile.TemporaryDirectory() as folder:
                self.bundle.write(adapted, Path(folder))
                adapter = Path(folder) / "adapter"
                tensors = (adapter / "adapter_model.safetensors").read_bytes()
                answer["adapter_safetensors"] = base64.b64encode(tensors).decode("ascii")
                answer["adapter_config"] = (adapter / "adapter_config.json").read_text(encoding="utf-8")
        return answer


set_model(BudgetModel())
