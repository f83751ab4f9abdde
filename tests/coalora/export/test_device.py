"""Any limit in, base and adapter out: from a bundle and the base model alone, whole, bound and within the limit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, ConfigurationSet
from coalora.calibrate.costs import UNITS
from coalora.calibrate.tables import calibration_tables
from coalora.contents import compare, describe, problems, push
from coalora.errors import CoaloraError
from coalora.evaluate.perplexity import score_text
from coalora.export.base import load_adapted
from coalora.export.bundle import Bundle
from coalora.export.device import adapter_dtype_for, choose, export_for
from coalora.export.formats import ExportFormat, ExportSource, PackedFormat, PeftFormat
from coalora.export.provenance import licence_of
from coalora.export.source import open_source
from coalora.method.initial import initial_set
from coalora.models.targets import TargetLayer
from coalora.recipes import AdapterRecipe, CalibrationRecipe, InitialSetRecipe

TEXTS = [f"text {i}: the quick brown fox jumps over the lazy dog, and a small model reads it." for i in range(12)]


@dataclass
class Trained:
    model: CoaLoraModel
    base: Path
    folder: Path

    @property
    def bundle(self) -> Bundle:
        return Bundle.load(self.folder)


@pytest.fixture(scope="module")
def trained(tiny_llama: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Weights decided by error feedback: a base cannot be made from the base model's weights alone."""
    base, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("bundle")
    tiny_llama().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    space = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64])
    config = CoaLoraConfig(r=4, choices=space, calibration=CalibrationRecipe(n_samples=4, rounding="feedback"))
    model = CoaLoraModel.from_pretrained(base, config, max_length=16)
    model.calibrate(TEXTS)
    model.fit(TEXTS, TEXTS[:4], steps=4, rounds=1)
    model.save_pretrained(folder)
    return Trained(model, base, folder)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_and_the_base_model_give_the_bytes_that_the_trained_model_gives(
    trained: Trained, tmp_path: Path
) -> None:
    export_for(trained.bundle, tmp_path / "device", bits=3.0)
    trained.model.export(tmp_path / "here", budget=3.0)
    own, other = content(tmp_path / "device"), content(tmp_path / "here")
    del own["export.json"], other["export.json"], own["README.md"], other["README.md"]  # the licence is not known here
    assert own == other


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_everything_that_is_written_fits_the_size(trained: Trained, tmp_path: Path, share: float) -> None:
    low, high = trained.bundle.counting("file_bytes").tables.cost_range()
    size = low + share * (high - low)
    made = export_for(trained.bundle, tmp_path / "out", size=f"{size:.6f}MB")
    assert sum(made.nbytes.values()) <= size * 1e6
    assert (tmp_path / "out" / "base" / "tokenizer.json").is_file()  # which counts
    assert made.cost.endswith(" MB")


class Larger(ExportFormat):
    """Takes more bytes than formats peft and packed, but for few bits."""

    folder, keeps_model, few = "larger", True, 0

    def write(self, folder: Path, source: ExportSource) -> None:
        PackedFormat().write(folder / "base", source)
        PeftFormat().write(folder / "adapter", source)
        (folder / "more").write_bytes(bytes(10_000 if source.adapted.average_bits > 2.4 else self.few))


class FarLarger(Larger):
    folder, few = "far-larger", 10_000


def test_every_format_keeps_within_the_size(trained: Trained, tmp_path: Path) -> None:
    counted, name = trained.bundle.counting("file_bytes"), f"{__name__}:Larger"
    size = float(counted.tables.costs(choose(trained.bundle, bits=3.0)[2]))
    alone = export_for(trained.bundle, tmp_path / "alone", size=size)
    made = export_for(trained.bundle, tmp_path / "both", size=size, formats=["peft", "packed", name])
    assert alone.nbytes["packed"] + alone.nbytes["peft"] <= size * 1e6
    assert 0.8 * size * 1e6 < made.nbytes[name] <= size * 1e6
    assert made.adapted.average_bits < alone.adapted.average_bits
    assert made.cost == UNITS["file_bytes"].text(made.nbytes[name] / 1e6)
    assert problems(tmp_path / "both")[1] == []
    with pytest.raises(CoaloraError, match=r"FarLarger takes .* in its smallest configuration, and the limit is"):
        export_for(trained.bundle, tmp_path / "none", size=size, formats=[f"{__name__}:FarLarger"])
    assert not (tmp_path / "none").exists()


def _wide_bundle() -> Bundle:
    """Of layers that are large beside the names of an adapter's tensors."""
    layers = [TargetLayer(f"block.{i}.q_proj", "q_proj", i, (256, 256), False) for i in range(6)]
    space = ChoiceSpace("int", bits=[2, 3, 4, 8], group_size=[64], mode=["sym"])
    tables = calibration_tables(layers, space, np.repeat(4.0 ** -space.nominal_bits[None], 6, 0), "0" * 64)
    tables = replace(tables, rest_nbytes=1000)
    members = initial_set(tables, InitialSetRecipe(size=40))
    losses = 5 - tables.average_bits(members.configurations) / 4
    found = ConfigurationSet(members.configurations, losses, np.zeros(len(losses), dtype=np.int64)).sorted(tables)
    recipe = AdapterRecipe(r=8, lora_alpha=8, theta="none", compensation_rank=0, expert_bits=0)
    tensors = {f"lora.{layer.name}.lora_A.weight": torch.zeros(8, 256) for layer in layers}
    tensors |= {f"lora.{layer.name}.lora_B.weight": torch.zeros(256, 8) for layer in layers}
    return Bundle(tables, found, tensors, recipe, "language-modeling", base_model="some/base")


def test_a_size_decides_between_a_smaller_adapter_and_more_bits() -> None:
    bundle, int4 = _wide_bundle(), torch.int4
    most = bundle.counting("file_bytes", adapter_dtype=torch.float16).tables.cost_range()[1]
    least = bundle.counting("file_bytes", adapter_dtype=int4).tables.cost_range()[0]

    def taken(size: float, formats: tuple[str, ...] = ("peft", "packed")) -> torch.dtype:
        return adapter_dtype_for(bundle, lambda dtype: {"size": size}, formats)

    assert taken(1.001 * most) == torch.float16  # the largest base fits beside it: nothing to buy
    assert taken(least) == int4  # and here nothing else does
    assert taken(least, ("peft",)) == taken(least, ("peft", "packed", "mlx")) == torch.float16
    assert adapter_dtype_for(bundle, lambda dtype: {"bits": 3.0}, ("packed",)) == torch.float16
    along = {}
    for size in np.linspace(least, most, 12):
        dtype = taken(float(size))
        configuration = choose(bundle, size=float(size), adapter_dtype=dtype)[2]
        along[float(bundle.tables.average_bits(configuration))] = dtype
    assert {dtype for bits, dtype in along.items() if bits < 4} == {int4}
    assert {dtype for bits, dtype in along.items() if bits >= 4} >= {torch.int8}
    assert int4 not in {dtype for bits, dtype in along.items() if bits >= 4}


def test_an_adapter_type_may_be_named(trained: Trained, tmp_path: Path) -> None:
    export_for(trained.bundle, tmp_path / "few", bits=3.0, adapter_dtype="int4")
    assert (tmp_path / "few/adapter/adapter_integers.safetensors").is_file()
    export_for(trained.bundle, tmp_path / "auto", bits=3.0, adapter_dtype="auto")
    stored = load_file(tmp_path / "auto/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    with pytest.raises(CoaloraError, match="There is no adapter type int3"):
        export_for(trained.bundle, tmp_path / "other", bits=3.0, adapter_dtype="int3")
    assert not (tmp_path / "other").exists()


def test_a_latency_table_decides(trained: Trained, tmp_path: Path) -> None:
    rows = [f"{layer.name},nf{bits} *,{10 * bits}" for layer in trained.model.layers for bits in (2, 3, 4)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["layer,choice,microseconds", *rows]))
    counted, limit, chosen = choose(trained.bundle, latency="0.4ms", table=table)
    assert limit == 400
    bits = [counted.tables.space.choices[k].as_dict()["bits"] for k in chosen]
    assert 10 * sum(map(int, bits)) <= 400
    with pytest.raises(CoaloraError, match="Give its latency table"):
        choose(trained.bundle, latency=400)


def test_a_configuration_is_taken_as_it_is(trained: Trained, tmp_path: Path) -> None:
    export_for(trained.bundle, tmp_path / "a", bits=3.4)
    made = export_for(trained.bundle, tmp_path / "b", configuration=tmp_path / "a" / "configuration.json")
    assert content(tmp_path / "a/base") == content(tmp_path / "b/base")
    assert made.unused is None
    written = json.loads((tmp_path / "a" / "configuration.json").read_text())
    written["layers"].popitem()
    (tmp_path / "less.json").write_text(json.dumps(written))
    with pytest.raises(CoaloraError, match="Give each layer a choice"):
        choose(trained.bundle, configuration=tmp_path / "less.json")


def test_the_loss_is_that_of_training_and_a_text_is_measured_on_what_was_written(
    trained: Trained, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    made = export_for(trained.bundle, tmp_path / "out", bits=3.0, evaluate=text, max_length=16)
    at = np.flatnonzero((trained.bundle.members.configurations == made.adapted.choices).all(1))
    assert made.loss == trained.bundle.members.losses[at[0]]
    tokens = trained.model.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    pair = load_adapted(tmp_path / "out/base", tmp_path / "out/adapter")
    direct = score_text(pair, tokens, len(text.read_bytes()), max_length=16, stride=15, batch_size=8)
    assert made.score == direct
    assert f"perplexity {direct.perplexity:.4g}" in str(made)


def test_an_adapter_alone_needs_no_base(trained: Trained, tmp_path: Path) -> None:
    bundle = trained.bundle
    bundle.base_model = "made-elsewhere"
    export_for(bundle, tmp_path / "out", bits=3.0, formats=["peft"])
    with pytest.raises(CoaloraError, match="no hub has it"):
        export_for(bundle, tmp_path / "other", bits=3.0)
    assert not (tmp_path / "other").exists()
    export_for(bundle, tmp_path / "named", bits=3.0, base=trained.base)
    assert problems(tmp_path / "named")[1] == []


def test_another_revision_of_the_base_is_refused(trained: Trained, tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(CoaloraError, match="the bundle was trained on"):
        export_for(trained.bundle, tmp_path / "out", bits=3.0, base=tmp_path / "model")


def test_without_quantized_weights_a_bundle_gives_adapters_alone(trained: Trained, tmp_path: Path) -> None:
    trained.model.save_pretrained(tmp_path / "small", quantized=False)
    bundle = Bundle.load(tmp_path / "small")
    assert not bundle.carries_statistics
    export_for(bundle, tmp_path / "adapter", bits=3.0, formats=["peft"])
    with pytest.raises(CoaloraError, match="Save it with quantized=True"):
        export_for(bundle, tmp_path / "out", bits=3.0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "No limit is given"),
        ({"bits": 3.0, "size": "1MB"}, "bits and size are given"),
        ({"bits": 3.0, "table": "t.csv"}, "without a latency"),
        ({"bits": 9.0}, "above the choice space"),
        ({"bits": 0.5}, "below the choice space"),
        ({"size": "1kB"}, "below the choice space"),
        ({"size": "3ms"}, "megabytes"),
        ({"latency": "1MB", "table": "t.csv"}, "does not exist"),
        ({"bits": 3.0, "formats": ["peff"]}, "peff"),
        ({"bits": 3.0, "evaluate": "none.txt"}, "none.txt"),
    ],
)
def test_a_limit_that_cannot_be_met_leaves_nothing(
    trained: Trained, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(CoaloraError, match=words):
        export_for(trained.bundle, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_an_export_is_bound(trained: Trained, tmp_path: Path) -> None:
    export_for(trained.bundle, tmp_path / "out", bits=3.0)
    assert problems(tmp_path / "out") == ([tmp_path / "out"], [])
    for file in [p for p in (tmp_path / "out").rglob("*") if p.is_file()]:
        before = file.read_bytes()
        middle = len(before) // 2
        file.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        assert problems(tmp_path / "out")[1], file
        if file.parent != tmp_path / "out":  # the others say what the folder is
            file.unlink()
            assert "is missing" in problems(tmp_path / "out")[1][0], file
        file.write_bytes(before)
    (tmp_path / "out" / "base" / "more.txt").touch()
    assert "more.txt" in problems(tmp_path / "out")[1][0]


def test_a_flipped_weight_in_a_bundle_is_found_before_a_base_is_made_of_it(trained: Trained, tmp_path: Path) -> None:
    trained.model.save_pretrained(tmp_path / "bundle")
    file = tmp_path / "bundle" / "quantized.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(CoaloraError, match=r"quantized.safetensors of .* has sha256"):
        export_for(Bundle.load(tmp_path / "bundle"), tmp_path / "out", bits=3.0)
    assert "quantized.safetensors" in problems(tmp_path / "bundle")[1][0]


def test_card_and_record_say_where_an_export_comes_from(trained: Trained, tmp_path: Path) -> None:
    made = export_for(trained.bundle, tmp_path / "out", bits=3.0, about={"run": {"pipeline": "p"}})
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["licence"] == licence_of(trained.base) == "apache-2.0"
    assert (record["run"], record["digest"], record["loss"]) == ({"pipeline": "p"}, made.adapted.digest, made.loss)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: peft\n")
    assert str(tmp_path) not in card + json.dumps(record)
    assert f"at {made.adapted.average_bits:.2f} bits a weight" in card
    facts = describe(tmp_path / "out")
    assert (facts["formats"], facts["licence"], facts["run's pipeline"]) == ("packed, peft", "apache-2.0", "p")


def test_a_comparison_names_what_differs(trained: Trained, tmp_path: Path) -> None:
    low, high = trained.bundle.tables.cost_range()
    export_for(trained.bundle, tmp_path / "a", bits=low + 1e-3)
    export_for(trained.bundle, tmp_path / "b", bits=high)
    found = {name: (one, other) for name, one, other in compare(tmp_path / "a", tmp_path / "b")}
    assert "average bits" in found
    layers = {layer.name for layer in trained.model.layers} & set(found)
    a, b = (json.loads((tmp_path / name / "configuration.json").read_text())["layers"] for name in "ab")
    assert layers == {name for name in a if a[name] != b[name]} != set()
    assert compare(tmp_path / "a", tmp_path / "a") == []
    with pytest.raises(CoaloraError, match="Name two of one kind"):
        compare(tmp_path / "a", trained.folder)


def test_a_push_uploads_what_is_whole(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Unreachable(Exception):  # as those of the HTTP library are
        pass

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            if repo == "me/away":
                raise Unreachable("Name or service not known\nmore")
            calls.append(("create", (repo, options)))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options["folder_path"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    export_for(trained.bundle, tmp_path / "out", bits=3.0)
    assert push(tmp_path / "out", "me/phone", private=True).startswith("https://huggingface.co/me/phone")
    assert calls == [("create", ("me/phone", {"private": True, "exist_ok": True})), ("upload", tmp_path / "out")]
    with pytest.raises(CoaloraError, match=r"does not take me/away \(Name or service not known\)\. Log in"):
        push(tmp_path / "out", "me/away")
    (tmp_path / "out" / "base" / "config.json").write_text("{}")
    with pytest.raises(CoaloraError, match="is not whole"):
        push(tmp_path / "out", "me/phone")
    assert len(calls) == 2


def test_sources_are_folders_hub_ids_and_what_a_pipeline_adds(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_source(trained.folder).bundle.tables.base_digest == trained.model.base_digest
    asked: list[str] = []

    def download(what: str, repo: str, patterns: list[str]) -> Path:
        asked.append(repo)
        return trained.folder

    monkeypatch.setattr("coalora.export.source.hub_folder", download)
    assert len(open_source("me/phone").bundle.members) == len(trained.bundle.members)
    assert asked == ["me/phone"]
    with pytest.raises(CoaloraError, match="folders and hub ids alone"):
        open_source("s3://bucket/runs/demo/latest")
    source: Callable[[Any], Any] = lambda address: (address, "opened")  # noqa: E731
    assert open_source("s3://b/runs/demo/1", {"s3": source}) == ("s3://b/runs/demo/1", "opened")
    with pytest.raises(CoaloraError, match="is no run folder or bundle"):
        open_source(tmp_path)
    with pytest.raises(CoaloraError, match="does not exist"):
        open_source("a/b/c")


def test_an_adapter_does_not_depend_on_what_was_asked_before(trained: Trained) -> None:
    bundle = trained.bundle
    first = bundle.adapt(3.0).tensors
    bundle.adapt(2.5)
    again = bundle.adapt(3.0).tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
