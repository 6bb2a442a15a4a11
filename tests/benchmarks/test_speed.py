"""Seconds per image and sampler step, over whole runs, AGD against CFG: ``make bench``. Not tests: machines differ.

Both are timed in turn, round by round, so that a change of the machine's speed hits both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from full_size_models import dit_xl, sd21, sdxl, with_random_weights

from agd_lib import AGD, CFG, AdapterSet
from agd_lib.base_models import BaseModel, count_flops, load_base
from agd_lib.guidance import Guidance
from agd_lib.project import DATA
from agd_lib.sampling import endpoint, sample
from agd_lib.study import RECIPES

SCALE = 4.0
Comparisons = list[dict[str, str]]


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    if not (DATA / "tiny-dit" / "model_index.json").is_file():
        pytest.skip("data/tiny-dit is not there")
    return load_base("tiny-dit")


def compare(
    benchmark: Any,
    comparisons: Comparisons,
    base: BaseModel,
    adapters: AdapterSet,
    batch_size: int,
    rounds: int,
    num_steps: int,
) -> None:
    """Benchmark AGD's run, with CFG's timed before each round; the ratio goes to ``extra_info`` and the last table."""
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
    cfg_seconds: list[float] = []
    agd_seconds: list[float] = []

    def cfg_first() -> None:
        with adapters.disabled():
            cfg_seconds.append(run(CFG(SCALE)))

    try:
        benchmark.pedantic(
            lambda: agd_seconds.append(run(AGD(adapters, SCALE))), setup=cfg_first, rounds=rounds, warmup_rounds=1
        )
    finally:
        adapters.remove()
    cfg, agd = (statistics.median(seconds[1:]) for seconds in (cfg_seconds, agd_seconds))
    fastest_ratio = min(cfg_seconds[1:]) / min(agd_seconds[1:])  # on a busy machine the steadier of the two
    benchmark.group = f"{base.name}, batch {batch_size}"
    benchmark.extra_info.update(
        base=base.name,
        adapter=adapters.config.kind,
        batch_size=batch_size,
        cfg_seconds_per_image=cfg,
        agd_seconds_per_image=agd,
        ratio=cfg / agd,
        ratio_of_fastest=fastest_ratio,
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
            "ratio": f"{cfg / agd:.3f}",
            "of fastest": f"{fastest_ratio:.3f}",
            "limit 2/(1+overhead)": f"{2 / (1 + overhead):.3f}",
            "FLOP overhead": f"{100 * overhead:.2f} %",
        }
    )


@pytest.mark.parametrize("batch_size", [1, 8, 32])
@pytest.mark.parametrize("kind", list(RECIPES))
def test_tiny_dit(benchmark: Any, comparisons: Comparisons, tiny: BaseModel, kind: str, batch_size: int) -> None:
    recipe = RECIPES[kind]
    adapters = AdapterSet.create(tiny, kind, recipe.hidden_size, noise_ranges=recipe.noise_ranges)
    compare(benchmark, comparisons, tiny, adapters, batch_size, rounds=max(5, 20 // batch_size), num_steps=20)


@pytest.mark.parametrize(
    ("base_on_meta", "kind", "hidden_size"),
    [(dit_xl, "offset", 256), (sd21, "cross-attention", 64), (sdxl, "cross-attention", 64)],
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
    compare(benchmark, comparisons, base, adapters, batch_size=1, rounds=3, num_steps=2)
