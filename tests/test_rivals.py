"""Other ways to one pass: each starts as the identity, is trained by the same code, and costs what is said."""

from __future__ import annotations

from dataclasses import asdict, replace
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
from agd_lib.rivals import (
    Entrant,
    FineTuned,
    Rival,
    ScaledLoRA,
    Sharpener,
    comparison_table,
    entrants,
    equal_steps,
    operations_per_step,
    peak_of_a_step,
    read_comparison,
)
from agd_lib.storage import write_json
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
    optimizer = "adam" if kind is FineTuned else "muon"
    untrained = kind(base, bounds, 8).attach(base)
    assert torch.equal(predicted(base, untrained, 4.0), before)
    base = load_base(name)
    rival = kind(base, bounds, 8)
    for _ in train(base, cast(AdapterSet, rival), store, TrainingSettings(4, 8, 1e-2, optimizer=optimizer)):
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
        one, two = (predicted(base, rival, scale) - before for scale in (1.05, 1.1))
        assert one.abs().max() > 1e-4
        assert (two - 2 * one).abs().max() < 0.2 * one.abs().max()  # proportional to w - 1


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-sd21"])
def test_sizes_and_equal_operations(name: str) -> None:
    competitors = entrants(name)
    base_parameters = load_base(name).num_parameters()
    for entrant in competitors:
        base = load_base(name)
        share = entrant.make(base, 0).attach(base).num_parameters() / base_parameters
        assert share > 1 if entrant.name == "fine-tuned" else 0.04 < share <= 0.05
    steps = equal_steps(competitors, 1_000)
    assert steps["modulated"] == 1_000
    totals = {entrant.name: steps[entrant.name] * entrant.operations for entrant in competitors}
    assert all(0.99 * totals["modulated"] < total <= totals["modulated"] for total in totals.values())
    # all weights' gradients are a third product of matrices beside the two that a frozen model needs
    operations = {entrant.name: entrant.operations for entrant in competitors}
    assert 1.3 < operations["fine-tuned"] / operations["modulated"] < 1.55


def test_operations_are_those_of_a_sample_and_leave_no_gradients() -> None:
    base = load_base("tiny-dit")
    adapters = AdapterSet.create(base, "modulated", 8)
    counted = [operations_per_step(base, adapters, size) for size in (2, 8)]
    assert counted[0] == pytest.approx(counted[1], rel=0.01)
    assert all(weight.grad is None for weight in adapters.parameters())


def test_the_memory_of_a_step_grows_with_what_is_trained_and_with_the_batch() -> None:
    def peak(name: str, size: int, batch_size: int) -> tuple[int, int, int]:
        base = load_base("tiny-dit")
        student = Entrant(name, size, 0).make(base, 0).attach(base)
        frozen = sum(weight.nbytes for weight in base.denoiser.parameters() if not weight.requires_grad)
        return peak_of_a_step(base, student, batch_size), frozen, 4 * student.num_parameters()

    whole, frozen, trained = peak("fine-tuned", 0, 1)
    assert frozen == 0 and 4 * trained < whole < 4.4 * trained  # weights, two moments, gradients; an image is small
    lora, frozen, trained = peak("lora", 4, 1)
    assert frozen + 4 * trained < lora < 1.4 * (frozen + 4 * trained) < whole / 2
    activations = [peak("lora", 4, batch_size)[0] - frozen - 4 * trained for batch_size in (8, 32)]
    assert activations[1] == pytest.approx(4 * activations[0], rel=0.15)


def test_what_was_done_is_read_and_what_it_depends_on_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = load_base("tiny-dit"), Entrant("lora", 2, 1_000)
    collected(base, tmp_path / "trajectories")
    collect(base, CollectionPlan((0, 1), 4, BOUNDS, 3, seed=1), tmp_path / "held-out", progress=False)
    settings = TrainingSettings(2, 8, 1e-3)
    outcome = rivals.compare("tiny-dit", tmp_path, lora, settings, 2.0, 1, 140)
    assert (outcome.row.method, outcome.row.nfe, outcome.row.seed) == ("agd lora", 20, 1)
    assert outcome.operations == 2 * 8 * 1_000 and outcome.base_moved == 0
    assert outcome.row.base_parameters == base.num_parameters()
    assert outcome.row.endpoint_mse_ratio is not None and 0.5 < outcome.row.endpoint_mse_ratio < 1.2
    assert outcome.row.endpoint_mse_ratio != 1
    whole = rivals.compare("tiny-dit", tmp_path, Entrant("fine-tuned", 0, 1_000), settings, 2.0, 1, 140)
    assert whole.base_moved > 0.01
    monkeypatch.setattr(rivals, "train_compiled", lambda *arguments, **options: pytest.fail("trained again"))
    assert whole.peak_bytes > outcome.peak_bytes > 0
    assert rivals.compare("tiny-dit", tmp_path, lora, settings, 2.0, 1, 140) == outcome
    for other in (replace(settings, learning_rate=2e-3), replace(settings, num_steps=3)):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            rivals.compare("tiny-dit", tmp_path, lora, other, 2.0, 1, 140)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        rivals.compare("tiny-dit", tmp_path, replace(lora, size=3), settings, 2.0, 1, 140)
    path = tmp_path / "rivals.json"
    value = {"rows": [asdict(outcome)], "others": [asdict(outcome.row)]}
    write_json(path, value)
    assert read_comparison(path) == ([outcome], [outcome.row])
    assert "| lora |" in comparison_table([outcome], []).splitlines()[2]
    for broken, complaint in (
        ({}, "no list of rows"),
        (value | {"rows": [{"row": 3}]}, "row 0 is not the outcome"),
        (value | {"rows": [asdict(outcome) | {"settings": {"num_steps": -1}}]}, "row 0: its settings"),
        ({"rows": []}, "no list of others"),
    ):
        write_json(path, broken)
        with pytest.raises(AGDError, match=complaint):
            read_comparison(path)


def test_a_rival_is_refused_where_it_cannot_be() -> None:
    base = load_base("tiny-dit")
    with pytest.raises(AdapterError, match="text-to-image"):
        Sharpener(base, BOUNDS, 8).attach(base)
    lora = ScaledLoRA(base, BOUNDS, 2).attach(base)
    with pytest.raises(AdapterError, match="not on this copy"):
        lora.check_attached(load_base("tiny-dit"))
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        lora.set_gradient_checkpointing(True)
