"""Seconds per image and sampler step, over whole runs, AGD against CFG: ``make bench``. Not tests: machines differ.

Both are timed in turn, round by round, so that a change of the machine's speed hits both alike; and beside them the model alone,
unguided. No way to one pass can be faster than that: where half a batch takes more than half the time, CFG over unguided is
below 2, and AGD is to be held against that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from full_size_models import dit_xl, sd21, sdxl, with_random_weights

from agd_lib import AGD, CFG, AdapterSet, Unguided
from agd_lib.adapters import ADAPTERS
from agd_lib.base_models import BaseModel, count_flops, load_base
from agd_lib.guidance import Guidance
from agd_lib.sampling import endpoint, sample
from agd_lib.study import PLANS

SCALE = 4.0
Comparisons = list[dict[str, str]]


def compare(
    benchmark: Any,
    comparisons: Comparisons,
    base: BaseModel,
    adapters: AdapterSet,
    batch_size: int,
    rounds: int,
    num_steps: int,
) -> None:
    """Benchmark AGD's run, with CFG's and the unguided one's before each round; for ``extra_info`` and the last table."""
    condition = base.blank_condition(batch_size)

    def run(guidance: Guidance) -> float:
        """Seconds per image and step."""
        start = time.perf_counter()
        endpoint(sample(base, condition, guidance, num_steps, seeds=range(batch_size)))
        return (time.perf_counter() - start) / (num_steps * batch_size)

    adapters.remove()
    plain_flops = count_flops(base)
    adapters.attach(base)
    with adapters.guided_by(SCALE):
        overhead = count_flops(base) / plain_flops - 1
    seconds: dict[str, list[float]] = {"cfg": [], "unguided": [], "agd": []}

    def others_first() -> None:
        with adapters.disabled():
            seconds["cfg"].append(run(CFG(SCALE)))
            seconds["unguided"].append(run(Unguided()))

    try:
        benchmark.pedantic(
            lambda: seconds["agd"].append(run(AGD(adapters, SCALE))), setup=others_first, rounds=rounds, warmup_rounds=1
        )
    finally:
        adapters.remove()
    cfg, unguided, agd = (statistics.median(each[1:]) for each in seconds.values())
    ratio, unguided_ratio = (
        statistics.median(theirs / ours for theirs, ours in zip(seconds["cfg"][1:], seconds[name][1:]))
        for name in ("agd", "unguided")
    )  # of neighbours in time
    fastest_ratio = min(seconds["cfg"][1:]) / min(seconds["agd"][1:])  # on a busy machine the steadier of the two
    benchmark.group = f"{base.name}, batch {batch_size}"
    benchmark.extra_info.update(
        base=base.name,
        adapter=adapters.config.kind,
        batch_size=batch_size,
        cfg_seconds_per_image=cfg,
        unguided_seconds_per_image=unguided,
        agd_seconds_per_image=agd,
        ratio=ratio,
        ratio_of_fastest=fastest_ratio,
        unguided_ratio=unguided_ratio,
        flop_overhead=overhead,
        ratio_limit=2 / (1 + overhead),
        adapter_share=adapters.num_parameters() / base.num_parameters(),
    )
    comparisons.append(
        {
            "model": base.name,
            "adapter": f"{adapters.config.kind} d={adapters.config.hidden_size}",
            "batch": str(batch_size),
            "CFG ms/image": f"{1000 * cfg:.2f}",
            "AGD ms/image": f"{1000 * agd:.2f}",
            "ratio": f"{ratio:.3f}",
            "of fastest": f"{fastest_ratio:.3f}",
            "CFG/unguided": f"{unguided_ratio:.3f}",
            "limit 2/(1+overhead)": f"{2 / (1 + overhead):.3f}",
            "FLOP overhead": f"{100 * overhead:.2f} %",
        }
    )


SMALL = [("tiny-dit", 1), ("tiny-dit", 8), ("tiny-dit", 32), ("tiny-sd21", 8), ("tiny-sdxl", 8)]


@pytest.mark.parametrize(("name", "batch_size"), SMALL)
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_small(benchmark: Any, comparisons: Comparisons, kind: str, name: str, batch_size: int) -> None:
    """The shipped models, with untrained adapters of the shipped ones' sizes."""
    base, recipe = load_base(name), PLANS[name].recipes[kind]
    adapters = AdapterSet.create(base, kind, recipe.hidden_size, noise_ranges=recipe.noise_ranges)
    compare(benchmark, comparisons, base, adapters, batch_size, rounds=max(5, 20 // batch_size), num_steps=20)


@pytest.mark.parametrize(
    ("base_on_meta", "kind", "hidden_size"),
    [(dit_xl, "offset", 256), (sd21, "cross-attention", 320), (sdxl, "cross-attention", 208)],
    ids=["dit-xl-2-256", "sd21", "sdxl"],
)
def test_two_steps_at_full_size(
    benchmark: Any, comparisons: Comparisons, base_on_meta: Callable[[], BaseModel], kind: str, hidden_size: int
) -> None:
    """The paper's base models in all but their weights, which are random: at most 11 GB. The UNets' images have 512 pixels."""
    base = base_on_meta()
    base.denoiser.register_to_config(sample_size=min(64, base.denoiser.config.sample_size))
    base = with_random_weights(base)
    adapters = AdapterSet.create(base, kind, hidden_size)
    compare(benchmark, comparisons, base, adapters, batch_size=1, rounds=4, num_steps=2)
