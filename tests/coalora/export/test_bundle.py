"""The bundle answers budgets without the base model, exactly as the trained model would, in bytes that repeat."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from coalora.errors import CoaloraError
from coalora.export.base import write_base
from coalora.export.bundle import FILES, HEADER, Bundle
from coalora.files import file_digests, read_json, read_tensors, write_json

ROOT = Path(__file__).parents[3]
_EXPORT = """
import sys
from pathlib import Path
import numpy as np
from transformers import LlamaForCausalLM
from coalora.export.base import write_base
from coalora.export.bundle import Bundle

source, target = map(Path, sys.argv[1:])
bundle = Bundle.load(source / "bundle")
bundle.save(target / "bundle")
made = bundle.adapt(3.5)
bundle.write(made, target / "export")
model = LlamaForCausalLM.from_pretrained(source / "model")
write_base(target / "base", model, bundle.tables, made.choices, task="language-modeling")
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_adapters_hold_exactly_the_effective_weights_of_the_model_in_memory(tiny_models, make_bundle, family) -> None:
    bundle, adapted = make_bundle(tiny_models[family])
    for k in (0, 5):
        configuration = (np.arange(len(adapted.layers)) + k) % 8
        made = bundle.adapt_to(configuration)
        adapted.switch(configuration)
        for layer, a in zip(adapted.layers, adapted.lora_A, strict=True):
            assert torch.equal(made.tensors[f"base_model.model.{layer.name}.lora_A.weight"], a.effective_weight())
        trained = adapted.state_dict()
        rest = {k for k in trained if not k.startswith("theta.") and ".lora_A." not in k}
        assert all(torch.equal(made.tensors["base_model.model." + k.split(".", 1)[1]], trained[k]) for k in rest)
        assert len(made.tensors) == len(rest) + len(adapted.layers)


RICH = {"r": 6, "compensation_rank": 2, "expert_bits": 3, "rank_pattern": {"*.0.*": 5}, "leading_ranks": 2}


@pytest.mark.parametrize(
    ("family", "theta"), [("llama", "all"), ("gpt2", "all"), ("bert", "none"), ("llama", "others"), ("gpt2", "none")]
)
def test_experts_compensation_and_ranks_fold_into_one_plain_adapter(
    tiny_models, make_bundle, family, theta, tmp_path
) -> None:
    """Stock PEFT, with nothing of this project but the folder, puts out what the model in memory does."""
    made, adapted = make_bundle(tiny_models[family], **RICH, theta=theta)
    made.save(tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    model = tiny_models[family]()
    for k in (0, 7):
        configuration = np.full(len(adapted.layers), k)
        adapted.switch(configuration)
        adapter = bundle.adapt_to(configuration)
        for layer, a, b in zip(adapted.layers, adapted.lora_A, adapted.lora_B, strict=True):
            for side, own in (("A", a), ("B", b)):
                exported = adapter.tensors[f"base_model.model.{layer.name}.lora_{side}.weight"]
                torch.testing.assert_close(exported, own.effective_weight(), rtol=0, atol=0)
        bundle.write(adapter, tmp_path / str(k))
        # The base of the model in memory is quantized: the adapter's share is what must agree.
        stock = PeftModel.from_pretrained(model, tmp_path / str(k) / "adapter").eval()
        for layer in adapted.layers:
            x = torch.randn(3, layer.shape[1], generator=torch.Generator().manual_seed(k))
            shares = []
            for peft_model in (stock, adapted.peft_model):
                module = peft_model.get_base_model().get_submodule(layer.name)
                shares.append(module(x) - module.base_layer(x))
            torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-4)
        model = stock.unload()


@pytest.mark.parametrize(
    ("recipe", "theta"), [({}, "all"), (RICH, "all"), (RICH, "none"), ({"expert_bits": 3}, "others")]
)
def test_kept_pairs_are_those_made_anew(tiny_models, make_bundle, recipe, theta, tmp_path, monkeypatch) -> None:
    make_bundle(tiny_models["llama"], **recipe, theta=theta)[0].save(tmp_path)
    anew, lazy, prepared = (Bundle.load(tmp_path, cache_bytes=limit) for limit in (0, None, None))
    n = len(anew.tables.layers)
    draw = np.random.default_rng(0)
    configurations = [np.full(n, k) for k in range(8)] + [draw.integers(0, 8, n) for _ in range(3)]
    wanted = [anew.adapt_to(C).tensors for C in configurations]
    prepared.prepare()
    monkeypatch.setattr(prepared, "_make", None)  # nothing is left to make
    for C, tensors in zip(configurations, wanted, strict=True):
        for bundle in (lazy, prepared):
            made = bundle.adapt_to(C).tensors
            assert list(made) == list(tensors)
            assert all(torch.equal(made[key], tensors[key]) for key in tensors)


def test_pairs_take_no_more_than_the_cache(tiny_models, make_bundle, tmp_path) -> None:
    make_bundle(tiny_models["llama"])[0].save(tmp_path)
    whole = Bundle.load(tmp_path)
    whole.prepare()
    assert len(whole._kept) == len(whole.tables.layers) * 8
    limit = whole._kept.nbytes // 2
    half = Bundle.load(tmp_path, cache_bytes=limit)
    half.prepare()
    assert 0.9 * limit < half._kept.nbytes <= limit
    for budget in (2.5, 3, 5):
        made, wanted = half.adapt(budget).tensors, whole.adapt(budget).tensors
        assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert half._kept.nbytes <= limit


def test_threads_share_a_bundle_whose_cache_is_small(tiny_models, make_bundle, tmp_path) -> None:
    make_bundle(tiny_models["llama"])[0].save(tmp_path)
    whole = Bundle.load(tmp_path)
    whole.prepare()
    small = Bundle.load(tmp_path, cache_bytes=whole._kept.nbytes // 8)
    draw = np.random.default_rng(0)
    configurations = [draw.integers(0, 8, len(whole.tables.layers)) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(small.adapt_to, configurations))
    for C, adapted in zip(configurations, made, strict=True):
        wanted = whole.adapt_to(C).tensors
        assert all(torch.equal(adapted.tensors[key], wanted[key]) for key in wanted)


def test_a_choice_that_no_member_has_lacks_its_compensation_and_says_so(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama, **RICH)
    del bundle.compensation[3, 5]
    with pytest.raises(CoaloraError, match=r"no compensation of nf4 b64"):
        bundle.adapt_to(np.full(14, 5))


def test_a_budget_that_no_member_fits_takes_choices_that_have_their_compensation(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama, **RICH)
    bundle.members = bundle.members.take(np.array([len(bundle.members) - 1]))
    budget = bundle.tables.cost_range()[0] * 1.3
    k = int(bundle.select(budget)[3])
    del bundle.compensation[3, k]
    adapted = bundle.adapt(budget)
    assert adapted.choices[3] != k
    assert adapted.average_bits <= budget


def test_bundle_survives_saving(tiny_bert_classifier, make_bundle, tmp_path) -> None:
    bundle, _ = make_bundle(tiny_bert_classifier)
    bundle.save(tmp_path)
    loaded = Bundle.load(tmp_path)
    assert (loaded.task, loaded.recipe, loaded.base_model) == ("classification", bundle.recipe, "some/base")
    assert np.array_equal(loaded.members.configurations, bundle.members.configurations)
    for budget in (2.9, 4.0, 8.0):
        first, second = bundle.adapt(budget), loaded.adapt(budget)
        assert (first.digest, first.average_bits) == (second.digest, second.average_bits)
        assert first.configuration == second.configuration
        assert all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())


def test_adapting_to_a_budget_is_adapting_to_its_configuration(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama)
    by_budget, by_configuration = bundle.adapt(3.5), bundle.adapt_to(bundle.select(3.5))
    assert by_budget.digest == by_configuration.digest
    assert np.array_equal(by_budget.choices, by_configuration.choices)
    assert by_budget.tensors.keys() == by_configuration.tensors.keys()
    assert all(torch.equal(v, by_configuration.tensors[k]) for k, v in by_budget.tensors.items())


def test_answers_fit_their_budget_and_are_the_best_that_was_measured(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama)
    low, high = bundle.tables.bits_range()
    members, bits = bundle.members, bundle.tables.average_bits(bundle.members.configurations)
    for budget in np.linspace(low, high, 12):
        made = bundle.adapt(budget)
        assert made.average_bits <= budget + 1e-9
        fits = bits <= budget + 1e-9
        if fits.any():
            best = members.configurations[fits][np.argmin(members.losses[fits])]
            assert (made.choices == best).all()
    assert bundle.adapt(low).average_bits == pytest.approx(low)


def test_the_ends_of_the_space_are_answered_and_what_lies_outside_is_refused(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama)
    low, high = bundle.tables.bits_range()
    assert bundle.adapt(low).average_bits == pytest.approx(low)
    for end in (high, round(high, 3)):
        assert bundle.adapt(end).average_bits <= high
    for budget in (low - 0.01, 0, -1, high + 0.1, 99, math.inf, math.nan):
        with pytest.raises(CoaloraError, match=f"{low:.3f} to {high:.3f}") as error:
            bundle.adapt(budget)
        assert str(budget) in str(error.value)


def test_a_configuration_outside_the_space_is_refused(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama)
    for configuration in (np.full(14, 8), np.full(14, -1), np.zeros(13, dtype=np.int64), np.zeros(14)):
        with pytest.raises(CoaloraError, match="configuration"):
            bundle.adapt_to(configuration)


def test_a_shared_bundle_gives_every_configuration_the_same_adapter(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama, "shared")
    first, second = (bundle.adapt_to(np.full(14, k)) for k in (0, 7))
    assert first.digest != second.digest
    assert all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())


def test_adapting_leaves_the_bundle_as_it_was(tiny_llama, make_bundle) -> None:
    bundle, _ = make_bundle(tiny_llama)
    before = {k: v.clone() for k, v in bundle.tensors.items()}
    made = bundle.adapt(4.0)
    assert not any(v.requires_grad for v in made.tensors.values())
    assert all(torch.equal(v, before[k]) for k, v in bundle.tensors.items())


def test_written_configuration_is_the_adapters(tiny_llama, make_bundle, tmp_path) -> None:
    bundle, _ = make_bundle(tiny_llama)
    made = bundle.adapt(3.5)
    bundle.write(made, tmp_path)
    content = json.loads((tmp_path / "configuration.json").read_text())
    assert content["digest"] == made.digest
    assert content["layers"] == made.configuration
    assert content["average_bits"] == pytest.approx(made.average_bits, abs=1e-6)


def test_a_bundle_is_small_and_holds_no_base_weights(tiny_llama, make_bundle, tmp_path) -> None:
    bundle, adapted = make_bundle(tiny_llama)
    bundle.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert tensors.keys() == adapted.state_dict().keys()
    assert sorted(files(tmp_path)) == sorted([HEADER, *FILES])


def test_exports_have_the_same_bytes_in_every_process(tiny_llama, make_bundle, tmp_path) -> None:
    bundle, _ = make_bundle(tiny_llama)
    tiny_llama().save_pretrained(tmp_path / "model")
    bundle.save(tmp_path / "bundle")
    made = bundle.adapt(3.5)
    for name in ("one", "two"):
        bundle.save(tmp_path / name / "bundle")
        bundle.write(made, tmp_path / name / "export")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        write_base(tmp_path / name / "base", model, bundle.tables, made.choices, task="language-modeling")
    (tmp_path / "child").mkdir()
    subprocess.run(
        [sys.executable, "-c", _EXPORT, str(tmp_path), str(tmp_path / "child")],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    one, two, child = (files(tmp_path / name) for name in ("one", "two", "child"))
    assert len(one) == 12
    assert one.keys() == two.keys() == child.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert [name for name in one if one[name] != child[name]] == []


@pytest.mark.parametrize("missing", [HEADER, *FILES])
def test_an_incomplete_bundle_is_refused(tiny_llama, make_bundle, tmp_path, missing) -> None:
    make_bundle(tiny_llama)[0].save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CoaloraError, match=f"no {missing}"):
        Bundle.load(tmp_path)


def test_another_format_is_refused(tiny_llama, make_bundle, tmp_path) -> None:
    make_bundle(tiny_llama)[0].save(tmp_path)
    write_json(tmp_path / HEADER, read_json(tmp_path / HEADER) | {"format": "coalora-bundle/99"})
    with pytest.raises(CoaloraError, match=r"coalora-bundle/99.*not that of a bundle \(coalora-bundle/3\)"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(tiny_llama, make_bundle, tmp_path, name) -> None:
    make_bundle(tiny_llama)[0].save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CoaloraError, match=f"{name} of .* has sha256"):
        Bundle.load(tmp_path)


def test_members_of_another_base_are_refused(tiny_llama, make_bundle, tables_for, tmp_path) -> None:
    make_bundle(tiny_llama)[0].save(tmp_path)
    tables_for(tiny_llama(), base_digest="e" * 64).save(tmp_path / "tables.safetensors")
    write_json(tmp_path / HEADER, read_json(tmp_path / HEADER) | {"files": file_digests(tmp_path, FILES)})
    with pytest.raises(CoaloraError, match="e" * 64):
        Bundle.load(tmp_path)


def test_a_bundle_without_members_is_refused(tiny_llama, make_bundle, tmp_path) -> None:
    make_bundle(tiny_llama)[0].save(tmp_path)
    write_json(tmp_path / "configurations.json", read_json(tmp_path / "configurations.json") | {"members": []})
    write_json(tmp_path / HEADER, read_json(tmp_path / HEADER) | {"files": file_digests(tmp_path, FILES)})
    with pytest.raises(CoaloraError, match=r"configurations\.json.* has no members"):
        Bundle.load(tmp_path)
