"""A realistic finished run: losses fall as bits rise, the adapters are ahead of the bare model."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def distance(a: float, b: float) -> float:
    return abs(a - b)


def make_result(
    *, task: str = "language-modeling", n_blocks: int = 4, n_budgets: int = 6, n_members: int = 24
) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    lm = task == "language-modeling"
    amount = {"none": 1.0, "shared": 0.52, "coa": 0.36}

    def measures(bits: float) -> dict[str, dict[str, float]]:
        noise = rng.normal(0, 0.004, 3)
        excess = {a: amount[a] * 0.62 * 2.3 ** -(bits - 2) + noise[i] + 0.006 * i for i, a in enumerate(amount)}
        loss = {a: (2.61 if lm else 0.34) + x for a, x in excess.items()}
        metric = {a: (1.929 + 0.52 * x) if lm else 0.921 - 0.3 * x for a, x in excess.items()}
        return {"loss": loss, "metric": metric}

    names = [
        f"model.layers.{b}.{'mlp' if k >= 4 else 'self_attn'}.{KINDS[k]}" for b in range(n_blocks) for k in range(7)
    ]
    budgets, rows = [], []
    for asked in np.linspace(2.25, 5.0, n_budgets) if n_budgets > 1 else [3.0]:
        weight = rng.normal(asked, 0.8, len(names))
        row = [float(min((2, 3, 4, 8), key=partial(distance, float(w)))) for w in weight]
        rows.append(row)
        base, adapter = int(850_000 * n_blocks / 4 * asked / 8), 114_688
        budgets.append(
            {
                "budget": float(asked),
                "average_bits": float(asked - 0.03),
                "base_bytes": base,
                "adapter_bytes": adapter,
                "total_bytes": base + adapter,
                "n_layers_by_bits": {f"{b:g}": row.count(b) for b in sorted(set(row))},
                **measures(asked),
            }
        )
    members = [
        {"average_bits": float(b), "nbytes": int(b * 1000), "round": int(rng.integers(0, 4)), **measures(b)}
        for b in np.linspace(2.12, 5.4, n_members)
    ]
    steps = np.arange(0, 1200, 2)
    curves = {
        arm: [
            {
                "step": int(s),
                "loss": float(2.7 + 0.9 * np.exp(-s / 220) + rng.gamma(2, 0.05) + amount[arm] * 0.1),
                "lr": float(1e-3 * min(1, s / 60) * 0.5 * (1 + np.cos(np.pi * s / 1200))),
                "round": int(s // 300),
            }
            for s in steps
        ]
        for arm in ("shared", "coa")
    }
    rounds = []
    for r in range(4):
        front = [[2.62 + (0.42 - 0.07 * r) * 2.3 ** -(b - 2), float(b)] for b in np.linspace(2.15, 5.3, 9 + 2 * r)]
        rounds.append(
            {
                "round": r,
                "n_members": n_members,
                "n_candidates": 16,
                "n_accepted": 9 - 2 * r,
                "front": front,
                "hypervolume_before": 0.58 + 0.035 * r + 0.004 * (r % 2),
                "hypervolume_after": 0.606 + 0.036 * r - 0.004 * r * r,
            }
        )
    return {
        "pipeline": "demo",
        "benchmark": {
            "name": "pydoc-text" if lm else "sst2",
            "task": task,
            "metric": "bits_per_byte" if lm else "accuracy",
            "higher_is_better": not lm,
            "n_validation": 872,
        },
        "model": {
            "name": "demo-llama-4x128",
            "n_layers": len(names),
            "n_weights": 850_000,
            "n_parameters": 1_100_000,
            "digest": "sha256:" + "3f9c" * 16,
        },
        "settings": {
            "seed": 0,
            "training": {"r": 16, "lr": 1e-3, "steps": 1200},
            "search": {"rounds": 4, "segments": 24},
        },
        "full_precision": {"metric": 1.929 if lm else 0.921, "loss": 2.61 if lm else 0.34, "bits": 32},
        "arms": {
            "none": {"label": "no adapter", "n_steps": 0},
            "shared": {"label": "Shared-LoRA", "n_steps": 1200},
            "coa": {"label": "CoA-LoRA", "n_steps": 1200},
        },
        "budgets": budgets,
        "members": members,
        "hypervolume": {
            "ref_point": [3.3, 6.0],
            "ideal": [2.61, 2.0],
            "normalization": "fraction of the box between ideal and reference",
            "values": {"none": 0.512, "shared": 0.631, "coa": 0.667},
        },
        "rounds": rounds,
        "curves": curves,
        "heatmap": {
            "layers": names,
            "kinds": [n.rsplit(".", 1)[1] for n in names],
            "budgets": [b["budget"] for b in budgets],
            "bits": rows,
        },
        "seconds": {
            "calibration": 6.2,
            "training": 84.9,
            "search rounds": 21.4,
            "evaluation": 17.3,
            "export": 0.85,
        },
        "exports": [
            {
                "budget": b["budget"],
                "folder": f"exports/{b['budget']:.2f}",
                "digest": "sha256:" + "ab12" * 16,
                "adapter_bytes": b["adapter_bytes"],
                "base_bytes": b["base_bytes"],
            }
            for b in budgets
        ],
        "notes": ["One seed: differences below 0.01 are within noise."],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return make_result()


@pytest.fixture
def accuracy_result() -> dict[str, Any]:
    return make_result(task="classification")


@pytest.fixture
def small_result() -> dict[str, Any]:
    """For tests that render whole pages many times."""
    return make_result(n_blocks=1, n_budgets=2, n_members=4)
