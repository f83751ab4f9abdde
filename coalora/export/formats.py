"""Registry of export formats: what a device gets for a budget.

A format writes one folder from an `ExportSource`; `write_export` writes all that are asked for beside
`configuration.json`. What a format cannot hold (`ExportFormat.check`) is refused before a run trains for it, and before
a file is written. Other packages add formats in the entry point group ``coalora.export_formats``, or name one
``module:attribute``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from coalora.registry import Registry

if TYPE_CHECKING:  # names are listed without torch
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from coalora.calibrate.tables import CalibrationTables
    from coalora.export.bundle import Adapted
    from coalora.models.loading import Task
    from coalora.quant.scheme import InputStatistics


DEFAULT_FORMATS = ("peft", "packed")  # what this package runs


@dataclass(frozen=True)
class ExportSource:
    """One configuration, its adapter, and the base model that both are for.

    Attributes:
        adapted: configuration (`choices` (N,), `content`) and adapter (`config`, `tensors` under PEFT's names).
        tables: calibration, with the target layers and the choice space.
        task: of the base model.
        config: of the base as its checkpoint has it.
        load_model, load_tokenizer, load_statistics: give the base in full precision, its tokenizer, and the statistics
            of its layers' inputs for calibrated schemes; called where they are needed.
        adapter_dtype: of the adapter's tensors, also int8 and int4 (`coalora.export.compact`); None keeps float32.
    """

    adapted: Adapted
    tables: CalibrationTables
    task: Task
    config: PretrainedConfig
    load_model: Callable[[], PreTrainedModel]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    load_statistics: Callable[[], Sequence[InputStatistics] | None]
    adapter_dtype: torch.dtype | None = None

    @property
    def floating_dtype(self) -> torch.dtype:
        """Type of the adapter's tensors in formats that hold floating ones only: float16 in place of integers."""
        import torch

        wanted = self.adapter_dtype or torch.float32
        return wanted if wanted.is_floating_point else torch.float16

    @property
    def rest_dtype(self) -> torch.dtype | None:
        """Type of the tensors outside of the target layers, where it holds their values exactly; None: the model's."""
        return getattr(self.config, "dtype", None)


class ExportFormat(ABC):
    """One format; stateless.

    Attributes:
        folder: name of the folder that it writes.
        keeps_model: whether `write` leaves the model that it loads as it was, so that one serves several exports.

    Example:
        >>> from coalora import EXPORT_FORMATS
        >>> {name: EXPORT_FORMATS[name].folder for name in ("peft", "packed")}
        {'peft': 'adapter', 'packed': 'base'}
    """

    folder: ClassVar[str]
    keeps_model: ClassVar[bool] = False

    def check(self, tables: CalibrationTables, config: PretrainedConfig, task: Task) -> None:  # noqa: B027
        """Look whether the format can hold every choice that the layers may take (`tables.allowed`), in a model of this
        architecture; arithmetic and names alone, for checks before long work.

        Args:
            tables: with one choice a layer where a configuration is asked about (`CalibrationTables.fixed`); the errors
                are not read.
            config: of the base model.

        Raises:
            CoaloraError: names the first layer, what is wrong, and what to train with instead.
        """

    @abstractmethod
    def write(self, folder: Path, source: ExportSource) -> None:
        """Write into `folder`, which is new; `check` has passed."""

    def start_line(self, export: Path) -> str:
        """Command, or lines of Python, that runs what was written under the folder `export`, the one that was given to
        `write_export`; empty where the format has no engine."""
        return ""


class PeftFormat(ExportFormat):
    """PEFT adapter, which stock `PeftModel.from_pretrained` loads (`coalora.export.adapter`)."""

    folder = "adapter"
    keeps_model = True

    def write(self, folder: Path, source: ExportSource) -> None:
        import torch

        source.adapted.save_pretrained(folder, dtype=source.adapter_dtype or torch.float32)

    def start_line(self, export: Path) -> str:
        from coalora.export.adapter import WEIGHTS

        at = export / self.folder
        return f'peft.PeftModel.from_pretrained(base, "{at}")' if (at / WEIGHTS).is_file() else ""


class PackedFormat(ExportFormat):
    """Packed quantized base (`coalora.export.base`) with its tokenizer."""

    folder = "base"
    keeps_model = True

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

    def start_line(self, export: Path) -> str:
        return f'coalora.load_adapted("{export / self.folder}", "{export / PeftFormat.folder}")'


EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry(
    "export format",
    "coalora.export_formats",
    "coalora.export.formats:ExportFormat",
    {
        "peft": PeftFormat,
        "packed": PackedFormat,
        "compressed-tensors": "coalora.export.compressed_tensors:CompressedTensorsFormat",
        "mlx": "coalora.export.mlx:MlxFormat",
        "gguf": "coalora.export.gguf:GGUFFormat",
        "gptq": "coalora.export.gptq:GPTQFormat",
    },
)


def write_export(
    folder: Path | str, formats: Sequence[str], source: ExportSource, about: Mapping[str, Any] | None = None
) -> None:
    """Write `configuration.json`, a folder for each of `formats`, a model card and `export.json` into `folder`.

    Args:
        about: what the record is to say beyond the source (`coalora.export.provenance`).

    Raises:
        CoaloraError: no such format, or one that cannot hold this configuration; nothing is written then.
    """
    from coalora.export.base import CONFIGURATION  # torch comes with these
    from coalora.export.provenance import write_record
    from coalora.files import write_json

    folder, wanted = Path(folder), {name: EXPORT_FORMATS[name]() for name in formats}
    for made in wanted.values():
        made.check(source.tables.fixed(source.adapted.choices), source.config, source.task)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIGURATION, source.adapted.content)
    for made in wanted.values():
        made.write(folder / made.folder, source)
    write_record(folder, wanted, source, about or {})
