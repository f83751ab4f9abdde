"""Exported adapters load with stock PEFT, behave as the model in memory, and stay with the base they are for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel, load_peft_weights
from safetensors import safe_open

from coalora.errors import CoaloraError
from coalora.export.adapter import check_binding
from coalora.files import write_tensors

IDS = torch.arange(2 * 7).view(2, 7)


def stock(model, folder) -> PeftModel:
    return PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("method", ["coa", "shared"])
def test_stock_peft_on_a_fresh_quantized_base_equals_the_model_in_memory(
    tiny_models, make_bundle, quantized, tmp_path, family, method
) -> None:
    bundle, adapted = make_bundle(tiny_models[family], method)
    configuration = np.arange(len(adapted.layers)) % 8
    bundle.write(bundle.adapt_to(configuration), tmp_path)
    adapted.switch(configuration)
    expected = adapted.peft_model.eval()(IDS).logits
    # The head is random before the adapter brings the trained one: another seed's must not matter.
    fresh = quantized(tiny_models[family](), bundle.tables, configuration)
    if bundle.task == "classification":
        torch.nn.init.normal_(fresh.classifier.weight if family == "bert" else fresh.classifier.out_proj.weight)
    torch.testing.assert_close(stock(fresh, tmp_path / "adapter")(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    bare = quantized(tiny_models[family](), bundle.tables, configuration)(IDS).logits
    assert (bare - expected).abs().max() > 1e-2


def test_methods_export_different_adapters_of_the_same_pair(tiny_llama, make_bundle) -> None:
    coa, shared = (make_bundle(tiny_llama, m)[0].adapt_to(np.zeros(14, dtype=np.int64)) for m in ("coa", "shared"))
    assert coa.digest == shared.digest
    assert coa.tensors.keys() == shared.tensors.keys()
    same = {k for k in coa.tensors if torch.equal(coa.tensors[k], shared.tensors[k])}
    assert same == {k for k in coa.tensors if ".lora_B." in k}


def test_stock_peft_finds_every_tensor_it_wants_and_no_other(tiny_models, make_bundle, tmp_path) -> None:
    for family in ("llama", "bert", "gpt2"):
        folder = tmp_path / family
        bundle, _ = make_bundle(tiny_models[family])
        bundle.write(bundle.adapt_to(np.zeros(len(bundle.tables.layers), dtype=np.int64)), folder)
        model = stock(tiny_models[family](), folder / "adapter")
        model.save_pretrained(tmp_path / "again")
        written = load_peft_weights(str(folder / "adapter"))
        again = load_peft_weights(str(tmp_path / "again"))
        assert written.keys() == again.keys()
        assert all(torch.equal(v, again[k]) for k, v in written.items())
        assert not any("theta" in k for k in written)


def test_adapter_config_says_what_stock_peft_needs(tiny_gpt2, tiny_bert_classifier, make_bundle, tmp_path) -> None:
    bundle, _ = make_bundle(tiny_gpt2)
    bundle.write(bundle.adapt_to(np.zeros(8, dtype=np.int64)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "fan_in_fan_out": True,
                "inference_mode": True, "base_model_name_or_path": "some/base",
                "target_modules": sorted(layer.name for layer in bundle.tables.layers)}  # fmt: skip
    assert {k: config[k] for k in expected} == expected
    bundle, _ = make_bundle(tiny_bert_classifier)
    bundle.write(bundle.adapt_to(np.zeros(12, dtype=np.int64)), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_adapter_carries_the_digest_of_its_base_in_both_files(tiny_llama, make_bundle, tmp_path) -> None:
    bundle, _ = make_bundle(tiny_llama)
    made = bundle.adapt_to(np.zeros(14, dtype=np.int64))
    bundle.write(made, tmp_path)
    binding = json.loads((tmp_path / "adapter" / "coalora.json").read_text())
    assert sorted(binding.pop("files")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert binding == {"base_configuration_digest": made.digest, "base_digest": "0" * 64}
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["coalora"]) == binding
    check_binding(tmp_path / "adapter", made.digest)


def test_half_precision_adapters_round_every_tensor(tiny_bert_classifier, make_bundle, tmp_path) -> None:
    bundle, _ = make_bundle(tiny_bert_classifier)
    made = bundle.adapt_to(np.zeros(12, dtype=np.int64))
    bundle.write(made, tmp_path, dtype=torch.bfloat16)
    written = load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert all(torch.equal(written[k], v.to(torch.bfloat16)) for k, v in made.tensors.items())


@pytest.fixture
def exported(tiny_llama, make_bundle, tmp_path):
    """(folder, digest) of two adapters of one bundle."""
    bundle, _ = make_bundle(tiny_llama)
    folders = []
    for k in (0, 1):
        made = bundle.adapt_to(np.full(14, k))
        bundle.write(made, tmp_path / str(k))
        folders.append((tmp_path / str(k) / "adapter", made.digest))
    return folders


def test_another_base_is_refused_with_both_digests(exported) -> None:
    (folder, own), (_, other) = exported
    with pytest.raises(CoaloraError, match="was made for the quantized base") as error:
        check_binding(folder, other)
    assert own in str(error.value)
    assert other in str(error.value)
    assert own != other


@pytest.mark.parametrize("missing", ["coalora.json", "adapter_model.safetensors"])
def test_an_adapter_without_binding_or_weights_is_refused(exported, missing) -> None:
    folder, digest = exported[0]
    (folder / missing).unlink()
    with pytest.raises(CoaloraError, match=f"no {missing}"):
        check_binding(folder, digest)


def test_weights_exchanged_for_those_of_another_adapter_are_refused(exported) -> None:
    (folder, digest), (other, other_digest) = exported
    shutil.copy(other / "adapter_model.safetensors", folder)
    with pytest.raises(CoaloraError, match="carries") as error:
        check_binding(folder, digest)
    assert digest in str(error.value)
    assert other_digest in str(error.value)


def test_weights_saved_anew_without_their_digest_are_refused(exported) -> None:
    folder, digest = exported[0]
    write_tensors(folder / "adapter_model.safetensors", load_peft_weights(str(folder)))
    with pytest.raises(CoaloraError, match="carries None"):
        check_binding(folder, digest)


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 600}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}, {"use_rslora": True}],
    ids=str,
)
def test_a_config_that_was_changed_is_refused(exported, change) -> None:
    folder, digest = exported[0]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CoaloraError, match=r"adapter_config\.json of .* has sha256 .* was exported"):
        check_binding(folder, digest)


def test_tensors_that_were_changed_are_refused(exported) -> None:
    folder, digest = exported[0]
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CoaloraError, match=r"adapter_model\.safetensors of .* has sha256"):
        check_binding(folder, digest)


@pytest.mark.parametrize("files", [None, {}, {"adapter_config.json": "0" * 64}, []])
def test_an_adapter_without_digests_of_its_files_is_refused(exported, files) -> None:
    folder, digest = exported[0]
    path = folder / "coalora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    with pytest.raises(CoaloraError, match="carries no sha256"):
        check_binding(folder, digest)
