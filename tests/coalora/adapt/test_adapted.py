"""One model for three methods: what is trained, what a configuration does to it, and what the methods share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.models.switching.quantized import FULL_PRECISION

IDS = torch.arange(2 * 7).view(2, 7)


def groups(adapted) -> set[str]:
    return {name.split(".", 1)[0] for name in adapted.named_parameters()}


def lora_only(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("theta.")}


def test_methods_train_what_they_say(tiny_llama, tiny_bert_classifier, make_adapted) -> None:
    assert groups(make_adapted(tiny_llama(), "coa")) == {"lora", "theta"}
    assert groups(make_adapted(tiny_llama(), "coa", theta="none", expert_bits=3)) == {"lora", "experts"}
    assert groups(make_adapted(tiny_llama(), "paper", theta="none")) == {"lora", "theta"}
    assert groups(make_adapted(tiny_llama(), "shared")) == {"lora"}
    assert groups(make_adapted(tiny_llama(), "none")) == set()
    assert groups(make_adapted(tiny_bert_classifier(), "coa")) == {"lora", "theta", "head"}
    none = make_adapted(tiny_bert_classifier(), "none").named_parameters()
    assert set(none) == {"head.classifier.weight", "head.classifier.bias"}


def test_coa_and_shared_start_from_the_same_pair_and_head(tiny_bert_classifier, make_adapted) -> None:
    coa = make_adapted(tiny_bert_classifier(), "coa", seed=5).state_dict()
    shared = make_adapted(tiny_bert_classifier(), "shared", seed=5).state_dict()
    assert shared.keys() == lora_only(coa).keys()
    assert all(torch.equal(shared[k], coa[k]) for k in shared)
    assert any(bool(v.any()) for k, v in shared.items() if ".lora_A." in k)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_untrained_theta_gives_exactly_the_shared_adapter(
    tiny_models, make_adapted, random_configurations, tables_for, family
) -> None:
    logits = []
    for method in ("coa", "shared"):
        adapted = make_adapted(tiny_models[family](), method)
        for name, parameter in adapted.named_parameters().items():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        adapted.switch(random_configurations(tables_for(tiny_models[family]()), 1)[0])
        logits.append(adapted.peft_model.eval()(IDS).logits)
    assert torch.equal(*logits)
    assert logits[0].isfinite().all()


def test_switch_quantizes_the_base_and_sets_each_layer_its_own_adjustment(
    tiny_llama, make_adapted, tables_for, random_configurations
) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.1)
    tables = tables_for(tiny_llama())
    for configuration in random_configurations(tables, 2):
        adapted.switch(configuration)
        U = adapted.adjustments(configuration)
        for index, layer in enumerate(adapted.layers):
            assert torch.equal(adapted.terms.U[index], U[index])
            module = adapted.peft_model.get_base_model().get_submodule(layer.name)
            master = tiny_llama().get_submodule(layer.name).weight
            choice = tables.space.choices[configuration[index]]
            assert torch.equal(module.base_layer.weight, tables.space.scheme.fake_quantize(master, choice))


def test_theta_is_called_once_for_all_layers(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama())
    calls = []
    adapted.theta.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    adapted.switch(np.zeros(14, dtype=np.int64))
    adapted.peft_model(IDS)
    assert calls == [(14, 4, 4)]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert"])
def test_gradient_reaches_theta_both_matrices_and_the_head_but_not_the_base(
    tiny_models, make_adapted, class_split, text_split, family
) -> None:
    adapted = make_adapted(tiny_models[family](), perturb=0.05)
    adapted.switch(np.arange(len(adapted.layers)) % 8)
    split = class_split if family == "bert" else text_split
    adapted.peft_model(**split.batch(torch.arange(4))).loss.backward()
    trained = adapted.named_parameters()
    assert {n.split(".")[0] for n in trained} >= {"lora", "theta"}
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    own = {id(p) for p in trained.values()}
    assert all(p.grad is None for p in adapted.peft_model.parameters() if id(p) not in own)


def test_without_lora_the_quantized_base_answers_alone(tiny_bert_classifier, make_adapted, tables_for) -> None:
    adapted = make_adapted(tiny_bert_classifier(), "none", perturb=0.0)
    configuration = np.full(12, 1)
    adapted.switch(configuration)
    model, tables = tiny_bert_classifier(), tables_for(tiny_bert_classifier())
    for layer in tables.layers:
        weight = model.get_submodule(layer.name).weight
        weight.copy_(tables.space.scheme.fake_quantize(weight, tables.space.choices[1]))
    assert torch.equal(adapted.peft_model.eval()(IDS).logits, model(IDS).logits)


def test_linear_biases_stay_and_matter(tiny_qwen2, make_adapted) -> None:
    adapted = make_adapted(tiny_qwen2(), "shared")
    fresh = tiny_qwen2()
    adapted.switch(np.zeros(14, dtype=np.int64))
    base = adapted.peft_model.get_base_model()
    biased = [layer for layer in adapted.layers if fresh.get_submodule(layer.name).bias is not None]
    assert len(biased) == 6
    for layer in biased:
        module = base.get_submodule(layer.name)
        bias = fresh.get_submodule(layer.name).bias
        assert bool(bias.any())
        assert torch.equal(module.base_layer.bias, bias)
        torch.testing.assert_close(module(torch.zeros(1, layer.shape[1]))[0], bias)


def test_full_precision_gives_back_the_base_bit_for_bit(tiny_gpt2, make_adapted) -> None:
    adapted = make_adapted(tiny_gpt2())
    expected = tiny_gpt2()(IDS).logits
    adapted.switch(np.zeros(8, dtype=np.int64))
    assert not torch.allclose(adapted.peft_model(IDS).logits, expected, atol=1e-2)
    adapted.full_precision()
    assert torch.equal(adapted.peft_model.eval()(IDS).logits, expected)
    assert adapted.terms.U is None


def test_state_round_trips_into_another_model(tiny_bert_classifier, make_adapted) -> None:
    first = make_adapted(tiny_bert_classifier(), perturb=0.1)
    second = make_adapted(tiny_bert_classifier(), seed=8)
    configuration = np.arange(12) % 8
    # Switched before it loads: the adjustments must follow theta.
    second.switch(configuration)
    second.load_state_dict(first.state_dict())
    first.switch(configuration)
    assert torch.equal(first.peft_model.eval()(IDS).logits, second.peft_model.eval()(IDS).logits)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_state_is_a_copy(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama())
    state = adapted.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    for parameter in adapted.named_parameters().values():
        parameter.data += 1
    assert all(torch.equal(state[k], before[k]) for k in before)


def test_loading_leaves_the_base_in_full_precision(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama())
    adapted.load_state_dict(adapted.state_dict())
    assert (adapted.base.configuration == FULL_PRECISION).all()
    assert adapted.terms.U is None


def test_state_of_another_method_is_refused_and_nothing_is_copied(tiny_llama, make_adapted) -> None:
    coa, shared = make_adapted(tiny_llama(), "coa", perturb=0.1), make_adapted(tiny_llama(), "shared")
    before = shared.state_dict()
    with pytest.raises(CoaloraError, match=r"theta\.") as error:
        shared.load_state_dict(coa.state_dict())
    assert "'shared'" in str(error.value)
    assert error.value.remedy
    with pytest.raises(CoaloraError, match="have no counterpart"):
        coa.load_state_dict(before)
    assert all(torch.equal(v, before[k]) for k, v in shared.state_dict().items())


def test_state_of_another_shape_is_refused_even_where_it_would_broadcast(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama())
    state = adapted.state_dict()
    before = adapted.state_dict()
    last = list(state)[-1]
    state = {k: v + 1 for k, v in state.items()} | {last: torch.zeros(1)}
    with pytest.raises(CoaloraError, match=r"has shape \(1,\)") as error:
        adapted.load_state_dict(state)
    assert last in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_a_wrong_configuration_is_refused(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama())
    with pytest.raises(CoaloraError, match=r"\(14,\)"):
        adapted.switch(np.zeros(13, dtype=np.int64))
    with pytest.raises(CoaloraError, match="0 to 7"):
        adapted.switch(np.full(14, 8))
