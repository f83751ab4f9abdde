"""Figures that only a GPU can give, in one command of a few minutes: kernels, steps, switches, memory, evaluation, and
a 7B in 24 GB.

    python -m benchmarks.gpu [--only kernels,step] [--models SmolLM2-135M,RoBERTa-large] [--seconds 330]
    python -m benchmarks.gpu --recover MODEL TRAIN TEST    SmolLM2's recovery in its size for a GPU, alone
    python -m benchmarks.gpu --tiny       a rehearsal in tiny widths, on any machine; its times mean nothing

It needs torch, transformers and peft, and no package of the pipeline, no hub and no data: weights are random, in the
published shapes. Parts follow each other within `--seconds`; one that fails loses no other. What was measured so far
is in `gpu.json` ($OUT, or benchmarks/results) after each. Bandwidth limits are of this card's own copy rate, measured
first. The table comes last.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import recovery, throughput
from benchmarks._models import SHAPES, adapt, batch, build, build_small, layers_of, seconds
from benchmarks._report import RESULTS, machine, table
from benchmarks.memory import measure_all
from benchmarks.switch import training_set
from coalora.adapt.adapted import AdaptedModel
from coalora.adapt.lora import lora_config
from coalora.adapt.theta import ConfigurationAwareModel
from coalora.calibrate.calibrate import calibrate
from coalora.data.benchmark import Split
from coalora.models.targets import find_target_layers
from coalora.quant.gguf.blocks import TYPES, decode_rows
from coalora.quant.scheme import Scheme
from coalora.quant.space import ChoiceSpace
from coalora.recipes import CalibrationRecipe, TrainingRecipe
from coalora.train.graph import Ask, GraphedGradients, GraphedTeacher, eager_gradients, eager_teacher
from coalora.train.loop import train
from coalora.train.objective import Objective

MODELS = ["SmolLM2-135M", "RoBERTa-large", "Qwen2.5-1.5B", "Llama-2-7B"]
# Steps with theta and optimizer, over the base's own forward and backward passes.
RATIO_LIMITS = {"RoBERTa-large": 1.4, "Qwen2.5-1.5B": 1.3, "Llama-2-7B": 1.2}
SMOLLM_LIMIT, SMOLLM_TEACHER_LIMIT = 40.0, 60.0  # ms
# One choice for each bit-width: a step's cost does not depend on the choice.
FEW = ChoiceSpace("nf", bits=[2, 3, 4, 8], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Run:
    """Rows and failures so far, and the time that is left."""

    def __init__(self, models: list[str], limit: float, *, tiny: bool, steps: int) -> None:
        self.models, self.limit, self.tiny, self.steps = models, limit, tiny, steps
        self.r = 4 if tiny else 64
        self.rows: list[dict] = []
        self.failures: dict[str, str] = {}
        self.started = time.monotonic()
        self.bytes_per_second = 1e10

    def add(self, what: str, measured: float, unit: str, limit: float | None = None, note: str = "") -> None:
        over = measured / limit if limit else None
        row = {
            "what": what,
            "measured": measured,
            "unit": unit,
            "reach for": limit,
            "measured / it": over,
            "note": note,
        }
        self.rows.append(row)
        print(f"{self.clock()} {what}: {measured:.4g} {unit} {note}", flush=True)

    def attempt(self, name: str, part: Callable[[], None], needs: float = 5.0) -> None:
        """Run a part where `needs` seconds are left; a failure is noted and passes."""
        left = self.limit - (time.monotonic() - self.started)
        if left < needs:
            self.failures[name] = f"left out: {left:.0f} of {needs:.0f} seconds left"
        else:
            print(f"{self.clock()} {name}", flush=True)
            try:
                part()
            except Exception:
                self.failures[name] = traceback.format_exc(limit=-6)
        if name in self.failures:
            print(f"{self.clock()} {name} FAILED: {self.failures[name]}", flush=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        self.save()

    def clock(self) -> str:
        return f"[{time.monotonic() - self.started:4.0f} s]"

    def save(self) -> None:
        folder = Path(os.environ.get("OUT") or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"name": "gpu", "machine": machine(), "rows": self.rows, "failures": self.failures}
        (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")

    def model(self, name: str) -> PreTrainedModel:
        return build(name, DEVICE) if not self.tiny else build_small(name, blocks=1).to(DEVICE)  # type: ignore[arg-type]

    def batch(self, name: str) -> dict[str, Tensor]:
        """Without a mask: every token counts, and attention takes its fastest kernel with and without a graph."""
        inputs = batch(name, DEVICE)
        if self.tiny:
            inputs = {k: v[:2, :8] % 60 if v.dim() > 1 else v[:2] for k, v in inputs.items()}
        return {k: v for k, v in inputs.items() if k != "attention_mask"}


# ---------------------------------------------------------------------------------------------------------- the card


def card(run: Run) -> None:
    """Rates of the card: a large copy, a large product."""
    n = 1 << (16 if run.tiny else 30)
    source, target = (torch.zeros(n, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    source.random_()
    cost = median(_timed(lambda: target.copy_(source), 5) for _ in range(5))
    run.bytes_per_second = 2 * n / cost
    run.add("copy rate", run.bytes_per_second / 1e12, "TB/s", note="read and written bytes")
    m = 64 if run.tiny else 8192
    a, b = (torch.randn(m, m, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    cost = median(_timed(lambda: a @ b, 5) for _ in range(5))
    run.add("bf16 product rate", 2 * m**3 / cost / 1e12, "TFLOP/s", note=f"{m} x {m} x {m}")


def _timed(function: Callable[[], object], times: int) -> float:
    """Seconds of one of `times` calls that are queued together."""
    return seconds(lambda: [function() for _ in range(times)], DEVICE) / times


# ------------------------------------------------------------------------------------------------------- the kernels


def kernels(run: Run) -> None:
    """Layers of all kinds in one launch against the plain path on this device, bit for bit."""
    for name in ("nf", "int"):
        space = ChoiceSpace(name)
        scheme = space.scheme
        picks = np.random.default_rng(0).choice(len(space), 12, replace=False)
        shapes = [(64, 576), (13, 37), (128, 1536), (70, 48)]
        checked = wrong = 0
        jobs, expected = [], []
        for i, (shape, k) in enumerate((s, int(k)) for s in shapes for k in picks):
            choice = space.choices[k]
            dtype = (torch.bfloat16, torch.float32, torch.float16)[i % 3]
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(DEVICE, dtype)
            state = scheme.quantize(weight, choice)
            plain = scheme.pack(state, choice, shape)
            made = scheme.quantize_packed(weight, choice)
            wrong += sum(not torch.equal(made[part], plain[part]) for part in plain)
            checked += len(plain)
            jobs.append((made, choice, torch.full_like(weight, 9.0)))
            out = torch.empty_like(weight)
            Scheme.dequantize_packed(scheme, plain, choice, shape, out)
            expected.append(out)
        scheme.dequantize_packed_many(jobs)
        wrong += sum(not torch.equal(out, plain) for (_, _, out), plain in zip(jobs, expected, strict=True))
        run.add(f"{name} kernels: tensors unlike the plain path", wrong, "", note=f"of {checked + len(jobs)}")


def decoding(run: Run) -> None:
    """Weights of every type of GGUF against the CPU's, bit for bit, and their time against the memory's own."""
    rows, columns = (16, 512) if run.tiny else (4096, 4096)
    draw, wrong = torch.Generator().manual_seed(0), 0
    for name, kind in TYPES.items():
        blocks = torch.randint(0, 256, (rows, columns // kind.n_weights * kind.nbytes), generator=draw).byte()
        few = decode_rows(blocks[:16], kind, torch.empty(16, columns))
        blocks = blocks.to(DEVICE)
        found = decode_rows(blocks[:16], kind, torch.empty(16, columns, device=DEVICE)).cpu()
        # Random scales are NaN and infinite now and then, which makes NaN of unknown bits.
        wrong += not torch.equal(found.nan_to_num(nan=7.0), few.nan_to_num(nan=7.0))
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
        cost = median(_timed(partial(decode_rows, blocks, kind, out), 3) for _ in range(3))
        limit = (blocks.nbytes + out.nbytes) / run.bytes_per_second
        what = f"decoding {name}, {rows * columns / 1e6:.1f} M weights"
        run.add(what, cost * 1e3, "ms", note=f"{cost / limit:.1f} x its bandwidth limit {limit * 1e3:.3f} ms")
    run.add("types of GGUF unlike the CPU's weights", wrong, "", note=f"of {len(TYPES)}")


# ---------------------------------------------------------------------------------------------------------- the step


def steps(run: Run, name: str) -> None:
    """A step of every kind against the base's own forward and backward passes."""
    inputs = run.batch(name)
    per_round = max(1, run.steps // {"Llama-2-7B": 6, "Qwen2.5-1.5B": 2}.get(name, 1))
    base = _base_step(run, name, inputs, per_round)
    gc.collect()
    run.attempt(f"step {name}: stock PEFT", partial(_stock, run, name, inputs, per_round, base))
    adapted = adapt(run.model(name), FEW, "coa", run.r, cache_bytes=0)
    adapted.switch(np.arange(len(adapted.layers)) % len(FEW))
    adapted.peft_model.train()
    start = adapted.state_dict()
    objective = Objective()
    eager = eager_gradients(adapted, objective)
    kinds = {kind: _step(adapted, inputs, eager, theta=kind != "Shared-LoRA") for kind in ("Shared-LoRA", "with theta")}
    _measure(run, name, kinds, base, per_round)
    run.attempt(f"step {name}: graph", partial(_graphed, run, name, adapted, start, inputs, kinds, base, per_round))
    if name == "SmolLM2-135M":
        run.attempt(f"step {name}: teacher", partial(_teacher, run, name, adapted, inputs, per_round))


def _base_step(run: Run, name: str, inputs: dict[str, Tensor], per_round: int) -> float:
    model = run.model(name)
    # Every layer but the first sees an input that needs a gradient; frozen, the first would not.
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())

    def step() -> None:
        model(**inputs).loss.backward()

    cost = _median(step, per_round)
    run.add(f"base forward and backward, {name}", cost * 1e3, "ms")
    if CUDA and name == "SmolLM2-135M":
        run.attempt(f"step {name}: base in a graph", partial(_graphed_base, run, name, step, per_round))
    return cost


def _graphed_base(run: Run, name: str, step: Callable[[], None], per_round: int) -> None:
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    run.add(f"base forward and backward in a graph, {name}", _median(graph.replay, per_round) * 1e3, "ms")


def _stock(run: Run, name: str, inputs: dict[str, Tensor], per_round: int, base: float) -> None:
    model = run.model(name)
    layers = find_target_layers(model)
    task = "classification" if hasattr(model, "classifier") else "language-modeling"
    peft_model = get_peft_model(model, lora_config(layers, task, ranks=[run.r] * len(layers), scale=1.0)).train()  # type: ignore[arg-type]
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        peft_model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    cost = _median(step, per_round)
    run.add(f"step of stock PEFT, {name}", cost * 1e3, "ms", note=f"{cost / base:.2f} x the base")


def _step(
    adapted: AdaptedModel,
    inputs: dict[str, Tensor],
    gradients: Callable[..., tuple[Tensor, Tensor]],
    teach: Ask | None = None,
    *,
    theta: bool = True,
) -> Callable[[], None]:
    """As `coalora.train.loop` does it: teacher where one is given, theta, forward, backward, clipping, AdamW; without
    waiting for the device. A step with a teacher has another configuration than the step before it."""
    own, C = adapted.theta, adapted.base.configuration.copy()
    turns = itertools.cycle([C] if teach is None else [C, (C + 1) % len(FEW)])
    parameters = [p for n, p in adapted.named_parameters().items() if theta or not n.startswith("theta.")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        adapted.theta = own if theta else None
        teacher = None if teach is None else teach(inputs)
        adapted.switch(next(turns))
        loss, _ = gradients(inputs, teacher)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.found_inf = (~torch.isfinite(norm + loss.detach())).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        adapted.theta = own

    return step


def _median(step: Callable[[], object], per_round: int, rounds: int = 4) -> float:
    step(), step()
    return median(_timed(step, per_round) for _ in range(rounds))


def _measure(run: Run, name: str, kinds: dict[str, Callable[[], None]], base: float, per_round: int) -> None:
    """Steps of all kinds in turn, round by round."""
    for step in kinds.values():
        step(), step()
    times = [[_timed(step, per_round) for step in kinds.values()] for _ in range(4)]
    costs = dict(zip(kinds, map(median, zip(*times, strict=True)), strict=True))
    for kind, cost in costs.items():
        limit = SMOLLM_LIMIT if name == "SmolLM2-135M" else None
        run.add(f"step {kind}, {name}", cost * 1e3, "ms", limit)
        if name in RATIO_LIMITS:
            run.add(f"step {kind} / base, {name}", cost / base, "x", RATIO_LIMITS[name])
    shared, theta = (next(costs[k] for k in costs if k.startswith(start)) for start in ("Shared", "with"))
    how = ", graph" if any("graph" in kind for kind in kinds) else ""
    run.add(f"theta / Shared-LoRA{how}, {name}", theta / shared, "x", 1.03)


def _graphed(
    run: Run, name: str, adapted: AdaptedModel, start: dict[str, Tensor], inputs: dict[str, Tensor],
    eager: dict[str, Callable[[], None]], base: float, per_round: int,
) -> None:  # fmt: skip
    gradients = GraphedGradients(adapted, Objective(), capture=CUDA)
    _agree(run, name, adapted, start, inputs, gradients)
    kinds = {f"{kind}, graph": _step(adapted, inputs, gradients, theta=kind != "Shared-LoRA") for kind in eager}
    _measure(run, name, kinds, base, per_round)


def _agree(
    run: Run, name: str, adapted: AdaptedModel, start: dict[str, Tensor], inputs: dict[str, Tensor],
    gradients: Callable[..., tuple[Tensor, Tensor]],
) -> None:  # fmt: skip
    """Losses of ten steps with and without a graph, from one state and with the same seeds; the first gradient.

    Args:
        start: parameters before any step: trained on one batch, a model's loss is at 0, where nothing can be compared.
    """
    noise = torch.Generator().manual_seed(0)  # in place of zeros, behind which half of the gradients would be 0
    fresh = {key: value + 0.01 * torch.randn(value.shape, generator=noise) for key, value in start.items()}
    trained, C = adapted.state_dict(), adapted.base.configuration.copy()
    other = (C + 1) % len(FEW)  # weights and theta's input change between steps, in place
    losses, first = [], []
    for take in (eager_gradients(adapted, Objective()), gradients):
        adapted.load_state_dict(fresh)
        parameters = list(adapted.named_parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        seen = []
        for i in range(10):
            torch.manual_seed(i)
            adapted.switch(other if i % 2 else C)
            loss, _ = take(inputs, None)
            seen.append(loss.detach().clone())
            if i == 0:  # later ones are of two trajectories, which part in half precision
                first.append(
                    torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(torch.stack(seen).float().cpu())
    adapted.load_state_dict(trained)
    adapted.switch(C)
    eager, graphed = losses
    difference = float(((graphed - eager).abs() / eager.abs().clamp_min(1e-3 * float(eager[0].abs()))).max())
    moved = float((eager[0] - eager[-2]).abs())
    note = "agree" if difference < 2e-2 else "DIFFER"
    run.add(
        f"losses of 10 steps, graph against eager, {name}", difference, "", note=f"{note}; eager moved by {moved:.3g}"
    )
    distance = float((first[1] - first[0]).norm() / first[0].norm())
    run.add(f"gradient of the first step, graph against eager, {name}", distance, "", note="relative distance")


def _teacher(run: Run, name: str, adapted: AdaptedModel, inputs: dict[str, Tensor], per_round: int) -> None:
    objective = Objective(distillation=0.5)
    adapted.base.cache.limit = 1 << 30
    for how in ("", ", graph"):
        gradients: Callable[..., tuple[Tensor, Tensor]] = eager_gradients(adapted, objective)
        teach: Ask = eager_teacher(adapted, objective)
        if how:
            gradients = GraphedGradients(adapted, objective, capture=CUDA)
            teach = GraphedTeacher(adapted, objective, capture=CUDA)
        cost = _median(_step(adapted, inputs, gradients, teach), per_round)
        note = "teacher on the masters, switching all layers, step"
        run.add(f"step with theta and a teacher{how}, {name}", cost * 1e3, "ms", SMOLLM_TEACHER_LIMIT, note)


# -------------------------------------------------------------------------------------------------------- the switch


def switches(run: Run, name: str, scheme: str) -> None:
    """Switches among 50 members, nothing kept and all kept, against the memory's own time."""
    space = ChoiceSpace(scheme)
    model = adapt(run.model(name), space, "shared", 4, cache_bytes=0)
    members = training_set(space, len(model.layers), size=12)
    weights = sum(layer.n_weights for layer in model.layers)
    bits = float(np.mean([space.nominal_bits[m].mean() for m in members]))
    width = model.base.masters[0].element_size()
    limits = {
        "re-quantized from the master": (0, weights * 3 * width / run.bytes_per_second, 3),
        "all in the cache": (1 << 34, weights * (bits / 8 + width) / run.bytes_per_second, 2),
    }
    for what, (cache, limit, within) in limits.items():
        model.base.cache.limit = cache
        for member in members:
            model.base.switch(member)
        costs = [
            seconds(partial(model.base.switch, members[k % len(members)]), DEVICE) for k in range(2 * len(members))
        ]
        cost = median(costs)
        start = time.perf_counter()
        model.base.switch(members[0])
        host = time.perf_counter() - start
        note = f"{cost / limit:.2f} x its bandwidth limit {limit * 1e3:.3f} ms; the host's part {host * 1e3:.3f} ms"
        run.add(f"switch {scheme}, {what}, {name}", cost * 1e3, "ms", within * limit * 1e3, note)
    _right(run, model, members[0], name, scheme)


def _right(run: Run, model: AdaptedModel, member: np.ndarray, name: str, scheme: str) -> None:
    """The weights after a switch from the cache are those of the plain path."""
    model.base.switch(member)
    wrong = 0
    picked = range(0, len(model.layers), max(1, len(model.layers) // 8))
    for index in picked:
        choice = model.base.space.choices[int(member[index])]
        weight, plain = model.base.masters[index], model.base.space.scheme
        wanted = plain.dequantize(plain.quantize(weight, choice), choice, weight.shape, weight.dtype)
        wrong += not torch.equal(model.base.weight(index), wanted)
    run.add(f"layers unlike the plain path after switches, {scheme}, {name}", wrong, "", note=f"of {len(picked)}")


def adjustments(run: Run, name: str) -> None:
    """All U of a model in one call."""
    layers = layers_of(name)
    theta = ConfigurationAwareModel(ChoiceSpace("nf"), layers, run.r).to(DEVICE)
    C = torch.zeros(len(layers), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        theta(C)
        queued = median(_timed(lambda: theta(C), 20) for _ in range(10))
        alone = median(seconds(lambda: theta(C), DEVICE) for _ in range(20))
    note = f"{alone * 1e6:.0f} us from an idle device to an idle device"
    run.add(f"all {len(layers)} U of {name}, r={run.r}", queued * 1e6, "us", 50, note)


def memory(run: Run) -> None:
    for row in measure_all(hidden=256 if run.tiny else 1024):
        note = f"{row['held MB']:.0f} MB held, limit {row['limit MB']:.0f} MB"
        what = f"memory held / limit, weights {row['weights']}, master {row['master']}"
        run.add(what, row["held / limit"], "x", 1.0, note)


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluation(run: Run, name: str) -> None:
    """Configurations in one pass over a text, against plain forward passes."""
    size, tokens = (2, 8) if run.tiny else (8, 512)
    for row in throughput.measure(name, DEVICE, batch_size=size, tokens=tokens, batches=4, rounds=3, tiny=run.tiny):
        run.add(row["what"], row["measured"], row["unit"], row["limit"], row["note"])


# ------------------------------------------------------------------------------------------------- a 7B in 24 GB


def _beside(run: Run, blocks: int | None = None) -> PreTrainedModel:
    """Llama-2-7B's shape in RAM, made on the device."""
    model = build("Llama-2-7B", DEVICE, blocks=blocks) if not run.tiny else build_small("Llama-2-7B", blocks=2)
    return model.to("cpu")  # type: ignore[arg-type]


def _text(run: Run, n: int) -> Split:
    tokens = 16 if run.tiny else 1024
    ids = torch.randint(1, 60 if run.tiny else 32_000, (n, tokens), generator=torch.Generator().manual_seed(0))
    return Split(ids, torch.full((n,), tokens), None)


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def calibration(run: Run) -> None:
    """Two blocks of Llama-2-7B's shape from RAM, each brought to the device: the peak is that of any number of them."""
    model = _beside(run, blocks=2).eval()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    recipe = CalibrationRecipe(n_samples=4 if run.tiny else 64, batch_size=4, hessians_mb=0)
    layers = find_target_layers(model)
    space = ChoiceSpace("int", bits=[2, 4], group_size=[64], mode=["asym"])
    start = time.perf_counter()
    calibrate(model, layers, _text(run, recipe.n_samples), space, recipe, base_digest="0" * 64, device=DEVICE)
    cost = (time.perf_counter() - start) / 2
    note = f"{recipe.n_samples} x 1024 tokens, {len(space)} choices; {32 * cost / 60:.1f} minutes for 32 blocks"
    run.add("calibrating a block of Llama-2-7B", cost, "s", note=note)
    run.add("peak of calibrating Llama-2-7B block by block", _peak(), "GB", 24)


def training(run: Run) -> None:
    """Two steps of Llama-2-7B on packed layers, master in RAM, activations computed again."""
    model = _beside(run)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    adapted = adapt(model, FEW, "coa", run.r, cache_bytes=0, weights="packed", master="cpu", device=DEVICE)
    recipe = TrainingRecipe(batch_size=4, warmup_steps=0, gradient_checkpointing=True)
    members = np.stack([(np.arange(len(adapted.layers)) + shift) % 3 for shift in range(2)])
    started = time.perf_counter()
    _, records = train(adapted, _text(run, 8), members, np.array([3.0, 3.0]), recipe, steps=2, total_steps=2, seed=0)
    cost = (time.perf_counter() - started) / len(records)
    run.add("peak of training Llama-2-7B, 4 x 1024 tokens", _peak(), "GB", 24, "packed, master in RAM")
    run.add("such a step, switch included", cost, "s", note="every layer quantized anew from RAM")


SECTIONS = ("kernels", "step", "switch", "memory", "evaluate", "large")
NEEDS = {"SmolLM2-135M": 20.0, "RoBERTa-large": 20.0, "Qwen2.5-1.5B": 30.0, "Llama-2-7B": 60.0, "MiniLM-L6": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--seconds", type=float, default=330, help="parts that would begin too late are left out")
    parser.add_argument("--steps", type=int, default=6, help="steps that are queued together and timed")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal in tiny widths")
    parser.add_argument(
        "--recover",
        nargs=3,
        metavar=("MODEL", "TRAIN", "TEST"),
        help="SmolLM2's folder and two texts: only `benchmarks.recovery smollm2 --size gpu`, of about four minutes",
    )
    given = parser.parse_args()
    if given.recover:
        model, train_on, test_on = given.recover
        recovery.main(
            ["smollm2", "--model", model, "--train", train_on, "--test", test_on, "--size", "gpu", "--seeds", "1"]
        )
        return
    wanted = given.only.split(",")
    run = Run(given.models.split(","), given.seconds, tiny=given.tiny, steps=1 if given.tiny else given.steps)
    run.attempt("card", partial(card, run))
    if "kernels" in wanted:
        run.attempt("kernels", partial(kernels, run))
        run.attempt("decoding of GGUF", partial(decoding, run))
    if "step" in wanted:
        for name in run.models:
            run.attempt(f"step {name}", partial(steps, run, name), NEEDS[name])
    if "switch" in wanted:
        for name in run.models:
            if name != "Llama-2-7B":  # its layers are Qwen's, five times over
                for scheme in ("nf", "int"):
                    run.attempt(f"switch {scheme} {name}", partial(switches, run, name, scheme), NEEDS[name] / 2)
        for name in run.models:
            run.attempt(f"all U {name}", partial(adjustments, run, name))
    if "memory" in wanted:
        run.attempt("memory", partial(memory, run), 20)
    if "evaluate" in wanted:
        for name in run.models:
            if "llama" in SHAPES[name]["kind"] and name != "Llama-2-7B":
                run.attempt(f"evaluation {name}", partial(evaluation, run, name), NEEDS[name])
    if "large" in wanted and "Llama-2-7B" in run.models:
        run.attempt("calibration of Llama-2-7B", partial(calibration, run), 45)
        run.attempt("training of Llama-2-7B", partial(training, run), 60)
    run.save()
    for name, failure in run.failures.items():
        print(f"\n{name}: {failure}")
    print(f"\ngpu, {machine()['device']}, torch {torch.__version__}, {time.monotonic() - run.started:.0f} s")
    print(table(run.rows))


if __name__ == "__main__":
    main()
