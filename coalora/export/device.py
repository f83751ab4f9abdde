"""Base and adapter of one device: chosen from a bundle within a budget, written in the formats of its engine.

    bundle = Bundle.load("bundle")
    made = export_for(bundle, "phone", bits=3.25, formats=["peft", "packed"], base="path/to/base-model")

A budget is average bits of the target layers, bytes of all that the device holds, or microseconds of its own latency
table. The best configuration that was measured within it is taken (`Bundle.select`). Formats store the same choices in
different numbers of bytes, so a budget of bytes is held against the files that were written, and what is over it goes
to a smaller configuration.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from coalora.calibrate.costs import CostKind, parse_budget
from coalora.configurations import configuration_of
from coalora.data.text import read_text
from coalora.errors import CoaloraError
from coalora.evaluate.perplexity import TextScore, score_text, windows
from coalora.export.base import load_adapted
from coalora.export.bundle import Adapted, Bundle
from coalora.export.formats import DEFAULT_FORMATS, EXPORT_FORMATS, ExportFormat, ExportSource, write_export
from coalora.export.profile import DeviceProfile
from coalora.export.provenance import licence_of
from coalora.files import folder_nbytes, read_json, require_new, whole_or_nothing
from coalora.models.files import model_digest, model_folder
from coalora.models.loading import load_config, load_model, load_tokenizer
from coalora.recipes import AdapterType

_FEW_BITS = 4.0  # of a base: from there on what int4 saves is worth no more than what it costs


@dataclass(frozen=True)
class DeviceExport:
    """An export as it was written.

    Attributes:
        folder: that holds `configuration.json`, `export.json`, the model card and a folder for each format.
        adapted: configuration and adapter.
        cost: of the configuration, with its unit; under a limit of bytes, those of the largest pair that was written.
        unused: what is to be said of a limit of which a good part is not used.
        loss: of the configuration on the search split when it was measured last; None: it never was.
        nbytes: bytes on disk by format.
        start: lines that run it, by format.
        score: on the text that was asked for.
    """

    folder: Path
    adapted: Adapted
    cost: str
    unused: str | None
    loss: float | None
    nbytes: dict[str, int]
    start: dict[str, str]
    score: TextScore | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.nbytes.items())
        lines = [f"{self.folder}: {self.cost}; {sizes}", *([self.unused] if self.unused else [])]
        if self.loss is not None:
            lines.append(f"loss {self.loss:.4g} on the search split, as training measured it")
        if self.score is not None:
            s = self.score
            lines.append(f"loss {s.loss:.4g}, perplexity {s.perplexity:.4g}, {s.tokens:,} tokens of the given text")
        for name, line in self.start.items():
            lines += [f"{name}: {part}" for part in line.splitlines()]
        return "\n".join(lines)


def choose(
    bundle: Bundle,
    *,
    bits: float | None = None,
    size: str | float | None = None,
    latency: str | float | None = None,
    table: Path | str | None = None,
    configuration: Path | str | None = None,
    adapter_dtype: torch.dtype = torch.float32,
) -> tuple[Bundle, float | None, np.ndarray]:
    """The bundle with its budgets in the unit of one limit, the limit in it, and the configuration (N,) for it.

    Args:
        bits: average bits a weight of the target layers.
        size: megabytes, or a text such as `120MB`, of base and adapter as the formats peft and packed store them, with
            config and tokenizer.
        latency: microseconds, or a text such as `20ms`, by `table` (CSV, `coalora.calibrate.latency`), or without one
            in a bundle that was trained for it.
        configuration: a file `configuration.json` instead.
        adapter_dtype: in which the adapter is to be stored; counts in `size`.

    Raises:
        CoaloraError: none or several are given, the limit is below the smallest or over the largest configuration, or
            the configuration is none of this bundle's.

    Example:
        >>> from coalora.export.device import choose
        >>> counted, limit, configuration = choose(bundle, size="101kB")
        >>> float(counted.tables.costs(configuration)) <= limit == 0.101
        True
    """
    check_limit(bits, size, latency, table, configuration)
    if configuration is not None:
        if not Path(configuration).is_file():
            raise CoaloraError(f"{configuration} does not exist", remedy="Name a configuration.json of an export")
        return bundle, None, configuration_of(read_json(Path(configuration)), bundle.tables)
    kind: CostKind = "average_bits" if bits is not None else "file_bytes" if size is not None else "latency"
    counted = bundle.counting(kind, table=table, adapter_dtype=adapter_dtype)
    limit = parse_budget(next(value for value in (bits, size, latency) if value is not None), kind)
    return counted, limit, counted.select(limit)


def adapter_dtype_for(
    bundle: Bundle, limit_with: Callable[[torch.dtype], Mapping[str, Any]], formats: Collection[str]
) -> torch.dtype:
    """Number type of the adapter that leaves the best pair within a size: smaller, and more bits for the base, or not.

    A type of fewer bytes is taken where they buy the base another configuration: int8 always, at a loss of next to
    nothing, int4 under a base of less than 4 bits (docs/results.md, "Bytes of the adapter"). Where stock PEFT or an
    engine reads the adapter, or nothing counts its bytes, it is float16.

    Args:
        limit_with: the limit as arguments of `choose`, for a number type.
        formats: names of those that are written.
    """
    integers = "packed" in formats and {*formats} <= {*DEFAULT_FORMATS}
    if limit_with(torch.float16).get("size") is None or not integers:
        return torch.float16
    types: tuple[torch.dtype, ...] = (torch.float16, torch.int8, torch.int4)  # type: ignore[attr-defined]
    least = {dtype: bundle.counting("file_bytes", adapter_dtype=dtype).tables.cost_range()[0] for dtype in types}
    best: tuple[torch.dtype, np.ndarray] | None = None
    for dtype in types:
        if best and least[dtype] >= least[best[0]]:  # small layers, which scales and names outweigh
            continue
        try:
            _, _, chosen = choose(bundle, **limit_with(dtype), adapter_dtype=dtype)
        except CoaloraError:  # the size holds no base beside an adapter of this type
            continue
        few = bundle.tables.average_bits(chosen) < _FEW_BITS
        if best is None or (not np.array_equal(chosen, best[1]) and (dtype == torch.int8 or few)):
            best = dtype, chosen
    return best[0] if best else min(least, key=lambda dtype: least[dtype])


def check_limit(
    bits: object = None,
    size: object = None,
    latency: object = None,
    table: object = None,
    configuration: object = None,
    device: object = None,
) -> None:
    """Refuse anything but one limit, before a bundle is opened.

    Raises:
        CoaloraError: none or several, or a latency table for nothing.
    """
    given = {"bits": bits, "size": size, "latency": latency, "configuration": configuration, "device": device}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise CoaloraError(
            f"{' and '.join(named) or 'No limit'} {'is' if not named else 'are'} given",
            remedy="Give exactly one of bits, size, latency, configuration and device",
        )
    if table is not None and latency is None:
        raise CoaloraError("A latency table is given without a latency", remedy="Give latency as well, such as 20ms")


def find_base(bundle: Bundle, base: Path | str | None = None) -> Path:
    """The folder of a bundle's base model, whose files are those that it was calibrated with.

    Args:
        base: a folder or hub id; by default what the bundle names.

    Raises:
        CoaloraError: it is nowhere, or another model.
    """
    address = str(base or bundle.base_model)
    if base is None and "/" not in address:
        raise CoaloraError(
            f"The base model {address or '(no name)'} was made or unpacked where it was trained, and no hub has it",
            remedy="Name its folder with --model, or call this where it was trained (COALORA_HOME)",
        )
    folder = model_folder(address)
    if (found := model_digest(folder)) != bundle.tables.base_digest:
        raise CoaloraError(
            f"The base model {folder} has digest {found[:12]}, and the bundle was trained on "
            f"{bundle.tables.base_digest[:12]}",
            remedy="Name the very files that were trained on with --model: another revision has other weights",
        )
    return folder


def export_for(
    bundle: Bundle,
    folder: Path | str,
    *,
    bits: float | None = None,
    size: str | float | None = None,
    latency: str | float | None = None,
    table: Path | str | None = None,
    configuration: Path | str | None = None,
    device: DeviceProfile | Path | str | None = None,
    formats: Sequence[str] | None = None,
    base: Path | str | None = None,
    adapter_dtype: torch.dtype | str | None = None,
    evaluate: Path | str | None = None,
    max_length: int = 512,
    about: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> DeviceExport:
    """Write base and adapter for one limit (`choose`) into `folder`, whole or not at all.

    Of a size, every format that is written keeps within it, its base, adapter, config and tokenizer together.

    Args:
        device: a profile instead of a limit, or its name or file: its limit, choices and formats.
        formats: names of `coalora.EXPORT_FORMATS`, by default the device's, else peft and packed. `peft` alone needs no
            base model.
        base: the base model's folder or hub id, by default what the bundle names; its digest is checked.
        adapter_dtype: of the adapter, by default the bundle's; a name (`coalora.recipes.AdapterType`) will do, and
            `auto` takes `adapter_dtype_for` the limit.
        evaluate: a text file on which the pair is measured, loaded from what was written, in blocks of `max_length`.
        about: what else the export's record is to say, JSON.

    Raises:
        CoaloraError: as `choose` and `find_base`; a format that cannot hold the configuration, or not within the size;
            a folder with files.

    Example:
        >>> from coalora.export.device import export_for
        >>> made = export_for(bundle, folder / "phone", bits=3.5, base=base_folder)
        >>> sorted(made.nbytes)
        ['packed', 'peft']
    """
    folder = Path(folder)
    require_new(folder)
    limit: dict[str, Any] = {
        "bits": bits, "size": size, "latency": latency, "table": table, "configuration": configuration,
    }  # fmt: skip
    check_limit(**limit, device=device)
    wanted = adapter_dtype or bundle.adapter_dtype
    if isinstance(wanted, str) and wanted not in (*get_args(AdapterType), "auto"):
        raise CoaloraError(
            f"There is no adapter type {wanted}", remedy=f"Name one of {', '.join(get_args(AdapterType))}, or auto"
        )
    limit_with: Callable[[torch.dtype], Mapping[str, Any]] = lambda dtype: limit  # noqa: E731
    most = size
    if device is not None:
        profile = device if isinstance(device, DeviceProfile) else DeviceProfile.load(device)
        bundle = profile.restrict(bundle)
        limit_with, formats, most = partial(profile.limit, bundle), formats or profile.to, profile.memory
        about = {"device": profile.name, **(about or {})}
    names = dict.fromkeys(formats or DEFAULT_FORMATS)
    known = {name: EXPORT_FORMATS[EXPORT_FORMATS.check_foreign(name)]() for name in names}
    if wanted == "auto":
        wanted = adapter_dtype_for(bundle, limit_with, names)
    adapter_dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    counted, asked, chosen = choose(bundle, **limit_with(adapter_dtype), adapter_dtype=adapter_dtype)
    most_bytes = None if most is None else 1e6 * parse_budget(most, "file_bytes")
    if evaluate is not None and bundle.task != "language-modeling":
        raise CoaloraError(
            "A classifier has no perplexity on a text", remedy="Leave evaluate out: the run's report has its accuracy"
        )
    text = None if evaluate is None else read_text(Path(evaluate))
    alone = {*known} == {"peft"} and text is None
    at = None if alone else find_base(bundle, base)

    def source_of(chosen: np.ndarray) -> ExportSource:
        adapted = bundle.adapt_to(chosen)
        if at is not None and Path(bundle.base_model).is_absolute():  # it may lie elsewhere than where it was trained
            adapted.config.base_model_name_or_path = str(at.resolve())
        return source_for(bundle, adapted, at, adapter_dtype, trust_remote_code=trust_remote_code)

    source = source_of(chosen)
    tokens = [] if text is None else source.load_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    if text is not None:
        windows(len(tokens), max_length, max_length - 1)
    with whole_or_nothing(folder) as part:
        while True:
            write_export(part, [*known], source, {**(about or {}), **facts_of(bundle, chosen, at)})
            cost = float(counted.tables.costs(chosen))
            largest, held = max(_pairs(part, known).items(), key=lambda pair: pair[1], default=("", 0))
            if most_bytes is None or held <= most_bytes:
                break
            low = counted.tables.cost_range()[0]
            if cost <= low:
                raise CoaloraError(
                    f"{largest} takes {held / 1e6:.4g} MB in its smallest configuration, and the limit is "
                    f"{most_bytes / 1e6:.4g} MB",
                    remedy="Raise the limit, or take another format",
                )
            for written in part.iterdir():
                shutil.rmtree(written) if written.is_dir() else written.unlink()
            asked = max(low, cost - (held - most_bytes) / 1e6)
            chosen = choose(bundle, size=asked, adapter_dtype=adapter_dtype)[2]
            source = source_of(chosen)
        score = None
        if text is not None:
            model = _written(part, source, trust_remote_code)
            stride = max_length - 1
            score = score_text(
                model, tokens, len(text.encode()), max_length=max_length, stride=stride, batch_size=8
            )  # fmt: skip
    unit = counted.tables.cost_unit
    return DeviceExport(
        folder,
        source.adapted,
        unit.text(held / 1e6 if most_bytes is not None and held else cost),
        None if asked is None else unit.unused(cost, asked),
        bundle.loss_of(chosen),
        {name: folder_nbytes(folder / made.folder) for name, made in known.items()},
        {name: line for name, made in known.items() if (line := made.start_line(folder))},
        score,
    )


def _pairs(folder: Path, formats: Mapping[str, ExportFormat]) -> dict[str, int]:
    """Bytes of each pair of base and adapter that an export holds: peft and packed are one, other formats are both."""
    sizes = {name: folder_nbytes(folder / made.folder) for name, made in formats.items()}
    ours = {name: sizes.pop(name) for name in DEFAULT_FORMATS if name in sizes}
    return sizes | ({" and ".join(ours): sum(ours.values())} if len(ours) == len(DEFAULT_FORMATS) else {})


def facts_of(bundle: Bundle, configuration: np.ndarray, base: Path | None) -> dict[str, Any]:
    """Facts of an export's record beyond its source: the base's licence, and the configuration's loss where known."""
    loss = bundle.loss_of(configuration)
    licence = {} if base is None else {"licence": licence_of(base)}
    return licence | ({} if loss is None else {"loss": loss})


def source_for(
    bundle: Bundle, adapted: Adapted, base: Path | None, adapter_dtype: torch.dtype, *, trust_remote_code: bool = False
) -> ExportSource:
    """Loaders of the base in `base`; without one, for an adapter alone, there is nothing to load."""
    at = base or Path()
    tokenizer = partial(load_tokenizer, at, trust_remote_code=trust_remote_code)

    def load() -> PreTrainedModel:
        return load_model(
            at, bundle.task, num_labels=bundle.num_labels, dtype=getattr(torch, bundle.dtype),
            device=torch.device("cpu"), seed=bundle.seed, trust_remote_code=trust_remote_code,
            pad_token_id=tokenizer().pad_token_id,
        )  # fmt: skip

    return ExportSource(
        adapted,
        bundle.tables,
        bundle.task,
        PretrainedConfig() if base is None else load_config(at, trust_remote_code=trust_remote_code),
        load_model=load,
        load_tokenizer=tokenizer,
        load_statistics=lambda: bundle.statistics,
        adapter_dtype=adapter_dtype,
    )


def _written(folder: Path, source: ExportSource, trust_remote_code: bool) -> PeftModel:
    """The pair that was written into `folder`, loaded again; one of its own where the formats are others."""
    with TemporaryDirectory(prefix="coalora-") as scratch:
        pair = folder
        if not all((folder / EXPORT_FORMATS[name]().folder).is_dir() for name in DEFAULT_FORMATS):
            pair = Path(scratch) / "pair"
            write_export(pair, DEFAULT_FORMATS, source)
        return load_adapted(pair / "base", pair / "adapter", trust_remote_code=trust_remote_code)
