"""Registry of export formats: what a device gets for a budget.

A format writes one folder from an `ExportSource`; `write_export` writes all that are asked for beside
`configuration.json`. Other packages add formats in the entry point group ``coalora.export_formats``, or name one
``module:attribute``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from coalora.registry import Registry

if TYPE_CHECKING:  # names are listed without torch
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coalora.calibrate.tables import CalibrationTables
    from coalora.export.bundle import Adapted
    from coalora.models.loading import Task
    from coalora.quant.scheme import InputStatistics


@dataclass(frozen=True)
class ExportSource:
    """One configuration, its adapter, and the base model that both are for.

    Attributes:
        adapted: configuration (`choices` (N,), `content`) and adapter (`config`, `tensors` under PEFT's names).
        tables: calibration, with the target layers and the choice space.
        task: of the base model.
        load_model, load_tokenizer, load_statistics: give the base in full precision (anew: it may be changed), its
            tokenizer, and the statistics of its layers' inputs for calibrated schemes; called where they are needed.
        adapter_dtype: of the adapter's tensors; None keeps float32.
        rest_dtype: of the tensors outside of the target layers, where it holds their values exactly; None keeps the
            model's.
    """

    adapted: Adapted
    tables: CalibrationTables
    task: Task
    load_model: Callable[[], PreTrainedModel]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    load_statistics: Callable[[], Sequence[InputStatistics] | None]
    adapter_dtype: torch.dtype | None = None
    rest_dtype: torch.dtype | None = None


class ExportFormat(ABC):
    """One format; stateless.

    Attributes:
        folder: name of the folder that it writes.

    Example:
        >>> from coalora import EXPORT_FORMATS
        >>> {name: EXPORT_FORMATS[name].folder for name in ("peft", "packed")}
        {'peft': 'adapter', 'packed': 'base'}
    """

    folder: ClassVar[str]

    @abstractmethod
    def write(self, folder: Path, source: ExportSource) -> None:
        """Write into `folder`, which is new."""


class PeftFormat(ExportFormat):
    """PEFT adapter, which stock `PeftModel.from_pretrained` loads (`coalora.export.adapter`)."""

    folder = "adapter"

    def write(self, folder: Path, source: ExportSource) -> None:
        import torch

        source.adapted.save_pretrained(folder, dtype=source.adapter_dtype or torch.float32)


class PackedFormat(ExportFormat):
    """Packed quantized base (`coalora.export.base`) with its tokenizer."""

    folder = "base"

    def write(self, folder: Path, source: ExportSource) -> None:
        from coalora.export.base import write_base

        write_base(
            folder,
            source.load_model(),
            source.tables,
            source.adapted.choices,
            task=source.task,
            statistics=source.load_statistics(),
            rest_dtype=source.rest_dtype,
        )
        source.load_tokenizer().save_pretrained(folder)


EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry(
    "export format",
    "coalora.export_formats",
    "coalora.export.formats:ExportFormat",
    {"peft": PeftFormat, "packed": PackedFormat},
)


def write_export(folder: Path | str, formats: Sequence[str], source: ExportSource) -> None:
    """Write `configuration.json` and a folder for each of `formats` into `folder`.

    Raises:
        CoaloraError: no such format.
    """
    from coalora.export.base import CONFIGURATION  # torch comes with these
    from coalora.files import write_json

    folder, wanted = Path(folder), [EXPORT_FORMATS[name]() for name in formats]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIGURATION, source.adapted.content)
    for made in wanted:
        made.write(folder / made.folder, source)
