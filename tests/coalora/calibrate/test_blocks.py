"""Models computed part by part: what every layer is fed is what one pass over the whole model feeds it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from coalora.calibrate.blocks import BlockWise, transformer_blocks
from coalora.calibrate.statistics import InputSums, collect_statistics, inputs_of
from coalora.data.benchmark import Split, pad
from coalora.errors import CoaloraError
from coalora.models.targets import find_target_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    return pad(
        [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (3, 11, 7, 1, 5)], 1, [0, 1, 0, 1, 0]
    )


def _walk(model, layers, split: Split, **options) -> BlockWise:
    return BlockWise(model, layers, partial(inputs_of, split, 2, CPU), CPU, **options)


def _by_parts(model, layers, split: Split, walk: BlockWise) -> list:
    found = [None] * len(layers)
    for number, part in enumerate(walk.parts):
        with InputSums(model, [layers[i] for i in part.layers], CPU, hessians=True) as sums:
            walk.run(part, sums.see, keep=number + 1 < len(walk.parts))
        for i, known in zip(part.layers, sums.statistics(), strict=True):
            found[i] = known
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("most", [0, 60_000])
def test_statistics_of_parts_are_those_of_one_pass_over_the_whole_model(tiny_models, split, family: str, most) -> None:
    model = tiny_models[family](**({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}))
    layers = find_target_layers(model, "all-linear")
    walk = _walk(model, layers, split, most=most)
    assert len(walk.parts) >= (4 if most == 0 else 2)
    assert sorted(i for part in walk.parts for i in part.layers) == list(range(len(layers)))
    whole = collect_statistics(model, layers, split, batch_size=2, hessians=True)
    for layer, known, expected in zip(layers, _by_parts(model, layers, split, walk), whole, strict=True):
        assert torch.equal(known.second_moment, expected.second_moment), layer.name
        assert torch.equal(known.hessian, expected.hessian), layer.name


def test_layers_before_and_behind_the_blocks_belong_to_the_first_part_and_to_one_behind_the_last(
    tiny_bert_classifier, tiny_models, split
) -> None:
    model = tiny_bert_classifier()
    layers = find_target_layers(model, ["bert.pooler.dense", "attention.self.query"])
    walk = _walk(model, layers, split, most=0)
    assert [(part.first, part.last, len(part.layers)) for part in walk.parts] == [(0, 1, 1), (1, 2, 1), (2, 2, 1)]
    model = tiny_models["llama"]()
    table = model.model.embed_tokens

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(36, 36, bias=False)

        def forward(self, ids):
            return self.first(table(ids))

    model.model.embed_tokens = Projected()
    layers = find_target_layers(model, ["first", "q_proj"])
    walk = _walk(model, layers, split, most=0)
    assert [[layers[i].kind for i in part.layers] for part in walk.parts] == [["first", "q_proj"], ["q_proj"]]


def test_a_part_holds_as_many_blocks_as_its_hessians_allow_and_all_where_they_are_small(tiny_llama, split) -> None:
    model = tiny_llama(num_hidden_layers=5)
    layers = find_target_layers(model)
    one = sum(4 * layer.shape[1] ** 2 for layer in layers) // 5
    for most, expected in ((0, [1] * 5), (2 * one, [2, 2, 1]), (5 * one, None), (None, None)):
        parts = _walk(model, layers, split, most=most).parts
        spans = [None if part.last is None else part.last - part.first for part in parts]
        assert spans == ([None] if expected is None else expected)
    assert len(_walk(model, layers, split, most=None, single=True).parts) == 5


def test_a_model_without_repeated_blocks_is_one_part(split) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = find_target_layers(model, ["0", "1"])
    assert transformer_blocks(model, layers) == ("", [])
    assert [part.last for part in _walk(model, layers, split, most=0, single=True).parts] == [None]


def test_blocks_are_as_before_afterwards_and_after_an_error(tiny_llama, split) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    walk = _walk(model, layers, split, most=0)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    def fails(batch):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        walk.run(walk.parts[0], fails, keep=True)
    assert not any("forward" in vars(block) for block in model.model.layers)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def _others() -> dict[str, nn.Module]:
    """Blocks that return (hidden states, None), an encoder beside the decoder, blocks that hand on a bias."""
    sizes = {"vocab_size": 320, "pad_token_id": 1, "num_labels": 2}
    deberta = DebertaV2Config(
        **sizes,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        relative_attention=True,
    )
    bart = BartConfig(
        **sizes, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=66, eos_token_id=0,
    )  # fmt: skip
    t5 = T5Config(**sizes, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=2, decoder_start_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "deberta": DebertaV2ForSequenceClassification(deberta).eval(),
            "bart": BartModel(bart).eval(),
            "t5": T5ForSequenceClassification(t5).eval(),
        }


@pytest.mark.parametrize(("family", "n_parts"), [("deberta", 3), ("bart", 3), ("t5", 1)])
def test_other_architectures_are_cut_where_their_blocks_allow_it(split, family: str, n_parts: int) -> None:
    model = _others()[family]
    model.config.use_cache = False  # as of a model that was loaded
    if family == "t5":  # which finds the end of a text by its token
        split = replace(split, input_ids=split.input_ids.where(split.input_ids != 1, 0))
    layers = find_target_layers(model, "all-linear")
    walk = _walk(model, layers, split, most=0)
    assert len(walk.parts) == n_parts
    if n_parts > 1:
        whole = collect_statistics(model, layers, split, batch_size=2, hessians=True)
        for known, expected in zip(_by_parts(model, layers, split, walk), whole, strict=True):
            assert torch.equal(known.hessian, expected.hessian)


@pytest.mark.parametrize("wrong", ["a second tensor", "by name"])
def test_a_model_whose_blocks_hand_on_more_is_one_part_or_refused_where_it_must_be_cut(
    tiny_llama, split, wrong: str, monkeypatch
) -> None:
    model = tiny_llama()
    block = type(model.model.layers[0])
    own = block.forward
    if wrong == "a second tensor":
        monkeypatch.setattr(block, "forward", lambda *args, **kwargs: (own(*args, **kwargs), torch.ones(1)))
    else:
        monkeypatch.setattr(type(model.model), "forward", lambda *_, **k: model.model.layers[0](hidden_states=None))
    layers = find_target_layers(model)
    assert [part.last for part in _walk(model, layers, split, most=0).parts] == [None]
    with pytest.raises(CoaloraError, match=r"model\.layers .*\. Set calibration\.inputs to original"):
        _walk(model, layers, split, most=0, single=True)


def test_a_part_uses_its_blocks_and_what_lies_outside_of_blocks(tiny_llama, split) -> None:
    model = tiny_llama(num_hidden_layers=3)
    walk = _walk(model, find_target_layers(model), split, most=0)
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    used = {names[id(tensor)] for tensor in walk._used(walk.parts[1])}
    assert used == {name for name in names.values() if ".layers." not in name or ".layers.1." in name}
