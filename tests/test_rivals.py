"""Other ways to one pass: each starts as the identity, is trained by the same code, and costs what is said."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from agd_lib import rivals, study
from agd_lib.attach import AdapterSet
from agd_lib.base_models import BaseModel, load_base
from agd_lib.errors import AdapterError, AGDError
from agd_lib.guidance import AGD
from agd_lib.influence import influence_of
from agd_lib.rivals import FineTuned, Rival, ScaledLoRA, Sharpener, entrants, equal_steps, operations_per_step
from agd_lib.study import PLANS, training_conditions
from agd_lib.training import TrainingSettings, train
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect

BOUNDS = (1.0, 6.0)
EVERY = [
    ("tiny-dit", FineTuned),
    ("tiny-dit", ScaledLoRA),
    ("tiny-sd21", FineTuned),
    ("tiny-sd21", ScaledLoRA),
    ("tiny-sd21", Sharpener),
    ("tiny-sdxl", Sharpener),
]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)  # takes longer than all the rest
    monkeypatch.setattr(study, "has_fast_bfloat16", lambda: False)  # a process has one precision, and others set it
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def collected(base: BaseModel, folder: Path) -> TrajectoryStore:
    bounds = PLANS[base.name].guidance_range
    plan = CollectionPlan(training_conditions(base, 24), 24, bounds, num_inference_steps=3)
    store = collect(base, plan, folder, progress=False)
    influence_of(base, store)
    return store


@torch.no_grad()
def predicted(base: BaseModel, rival: Rival | None = None, scale: float = 1.0) -> torch.Tensor:
    latents = torch.randn(4, *base.latent_shape, generator=torch.Generator().manual_seed(1))
    conditions = list(training_conditions(base, 4))[:4]
    if rival is None:
        return base.denoise(latents, 500, base.encode(conditions))
    return AGD(cast(AdapterSet, rival), scale).predict(base, latents, 500, base.encode(conditions))


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_identity_before_training_and_what_is_left_of_the_base_after_it(
    name: str, kind: type[Rival], tmp_path: Path
) -> None:
    base = load_base(name)
    before = predicted(base)
    store = collected(base, tmp_path / "store")
    bounds, start = tuple(store.manifest["guidance_range"]), dict(base.denoiser.named_parameters())
    untrained = kind(base, bounds).attach(base)
    assert torch.equal(predicted(base, untrained, 4.0), before)
    base = load_base(name)
    rival = kind(base, bounds)
    for _ in train(base, cast(AdapterSet, rival), store, TrainingSettings(4, 8, 1e-3)):
        pass
    assert not torch.allclose(predicted(base, rival, 4.0), before, atol=1e-5)
    assert rival.num_parameters() == sum(w.numel() for w in rival.parameters() if w.requires_grad) > 0
    weights = {name.replace(".base_layer", ""): weight for name, weight in base.denoiser.named_parameters()}
    assert set(start) <= set(weights)
    changed = [name for name, weight in start.items() if not torch.equal(weight, weights[name])]
    if kind is FineTuned:
        assert len(changed) > 0.9 * len(start)
        assert not torch.allclose(predicted(base), before, atol=1e-5)
        assert rival.num_parameters() > base.num_parameters()
    else:
        assert not changed
        assert torch.equal(predicted(base), before) and torch.equal(predicted(base, rival, 1.0), before)
        one, two = (predicted(base, rival, scale) - before for scale in (1.001, 1.002))
        torch.testing.assert_close(two, 2 * one, rtol=0.02, atol=2e-5)  # proportional to w - 1


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-sd21"])
def test_sizes_and_equal_operations(name: str) -> None:
    competitors = entrants(name, 1_000)
    base_parameters = load_base(name).num_parameters()
    for label, entrant in competitors.items():
        base = load_base(name)
        student = entrant.make(base, BOUNDS, 0)
        share = student.attach(base).num_parameters() / base_parameters
        assert share > 1 if label == "fine-tuned" else 0.04 < share <= 0.05
    found = equal_steps(name, competitors)
    assert found.keys() == competitors.keys() and found["modulated"][0] == 1_000
    totals = {label: steps * operations for label, (steps, operations) in found.items()}
    assert all(0.99 * totals["modulated"] < total <= totals["modulated"] for total in totals.values())
    # all weights' gradients are a third product of matrices beside the two that a frozen model needs
    assert 1.3 < found["fine-tuned"][1] / found["modulated"][1] < 1.55


def test_operations_are_those_of_a_sample_and_leave_no_gradients() -> None:
    base = load_base("tiny-dit")
    adapters = AdapterSet.create(base, "modulated", 8)
    counted = [operations_per_step(base, adapters, size) for size in (2, 8)]
    assert counted[0] == pytest.approx(counted[1], rel=0.01)
    assert all(weight.grad is None for weight in adapters.parameters())


def test_an_outcome_is_measured_once_and_malformed_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base("tiny-dit")
    collected(base, tmp_path / "trajectories")
    outcome = rivals.compare("tiny-dit", tmp_path, "lora", 2, 1_000, 1, 2.0, 140)
    assert (outcome.row.method, outcome.row.nfe, outcome.row.seed, outcome.steps) == ("agd lora", 20, 1, 2)
    assert outcome.operations == 2 * 64 * 1_000 and outcome.base_moved == 0
    assert outcome.row.endpoint_mse_ratio is not None and 0.3 < outcome.row.endpoint_mse_ratio < 1.2
    monkeypatch.setattr(rivals, "train_compiled", lambda *arguments, **options: pytest.fail("trained again"))
    assert rivals.compare("tiny-dit", tmp_path, "lora", 2, 1_000, 1, 2.0, 140) == outcome
    file = tmp_path / "outcomes" / "lora-2-seed1-2-140.json"
    file.write_text("{}")
    with pytest.raises(AGDError, match="not the outcome"):
        rivals.compare("tiny-dit", tmp_path, "lora", 2, 1_000, 1, 2.0, 140)


def test_a_rival_is_refused_where_it_cannot_be() -> None:
    base = load_base("tiny-dit")
    with pytest.raises(AdapterError, match="text-to-image"):
        Sharpener(base, BOUNDS)
    lora = ScaledLoRA(base, BOUNDS).attach(base)
    with pytest.raises(AdapterError, match="not on this copy"):
        lora.check_attached(load_base("tiny-dit"))
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        lora.set_gradient_checkpointing(True)
