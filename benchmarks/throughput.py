"""Evaluation of several configurations in one pass over a text, against plain forward passes of the base.

Both run the same batches in one process, in turn; medians of paired rounds. A configuration costs a switch, its forward
passes, and the losses; where a reference is measured as well, its passes are shared by all configurations. Random
weights in the published shapes.

    python -m benchmarks.throughput [--model SmolLM2-135M] [--tokens 64] [--rounds 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks._models import adapt, build, build_small, seconds
from benchmarks._report import report
from coalora.data.benchmark import Split
from coalora.evaluate.losses import measure_configurations
from coalora.evaluate.reference import Reference
from coalora.models.loading import default_device
from coalora.quant.space import ChoiceSpace

SPACE = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[256])
BUDGETS, LIMIT = 3, 1 / 0.9


def measure(
    name: str, device: torch.device, *, batch_size: int, tokens: int, batches: int, rounds: int, tiny: bool = False
) -> Iterable[dict]:
    """Rows: time of evaluating `BUDGETS` configurations over that of as many passes of the base."""

    def made() -> PreTrainedModel:
        return build_small(name, blocks=1).to(device) if tiny else build(name, device)  # type: ignore[arg-type]

    base = made()
    vocabulary = int(base.config.vocab_size)
    ids = torch.randint(1, vocabulary, (batches * batch_size, tokens), generator=torch.Generator().manual_seed(0))
    split = Split(ids, torch.full((len(ids),), tokens), None)
    base.eval()

    @torch.no_grad()
    def plain() -> None:
        for batch in split.batches(batch_size, device):
            base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    plain()
    alone = [seconds(plain, device)]
    model = adapt(made(), SPACE, "shared", 16, cache_bytes=1 << 29)
    members = np.random.default_rng(0).integers(len(SPACE), size=(BUDGETS, len(model.layers)))
    references = {"losses": None, "losses, KL divergence and agreement": Reference()}
    times: dict[str, list[float]] = {what: [] for what in references}

    def evaluate(reference: Reference | None) -> None:
        measure_configurations(model, split, members, batch_size=batch_size, reference=reference)

    evaluate(None)  # fills the cache
    for _ in range(rounds):
        alone.append(seconds(plain, device))
        for what, reference in references.items():
            times[what].append(seconds(lambda of=reference: evaluate(of), device))  # type: ignore[misc]
    rate = batches * batch_size * tokens / median(alone)
    for what, measured in times.items():
        passes = BUDGETS + (references[what] is not None)
        cost = median(t / b for t, b in zip(measured, alone[1:], strict=True))
        yield {
            "what": f"evaluating {BUDGETS} configurations, {what}, {name}",
            "measured": cost / passes,
            "limit": LIMIT,
            "unit": "x",
            "note": f"{cost:.2f} plain passes for {passes} of its own; plain: {rate:,.0f} tokens a second",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", help="a decoder of benchmarks._models")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rows = measure(given.model, default_device(), batch_size=4, tokens=given.tokens, batches=2, rounds=given.rounds)
    report("throughput", list(rows), notes="Time a pass over that of a plain pass; .9 of its tokens a second is 1.11.")


if __name__ == "__main__":
    main()
