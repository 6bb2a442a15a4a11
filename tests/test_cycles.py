"""The training loop of the small models: its weights, its moving average, its checkpoints."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import randomise
from torch import Tensor, nn

import agd_lib.cycles as cycles
import agd_lib.tiny as tiny
from agd_lib import load_base
from agd_lib.cycles import Checkpoint, check_settings, min_snr_weights, one_cycle
from agd_lib.errors import CheckpointError
from agd_lib.project import DATA
from agd_lib.tiny_text import new_scheduler, train_denoiser

COUNT, BATCH = 20, 8
SETTINGS = {"steps": 6, "cycles": [[6, 0.01]]}


class Stub(nn.Module):
    """A denoiser of a few numbers, which remembers what it was asked; one of them the loss never reaches."""

    def __init__(self, prediction_type: str) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))
        self.unused = nn.Parameter(torch.ones(3))
        self.asked: list[tuple[Tensor, ...]] = []

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, dropped: Tensor, time_ids: Tensor) -> Tensor:
        self.asked.append((noisy, timesteps, ids, dropped, time_ids))
        return self.scale * noisy + self.bias


def data() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    mean, std = torch.randn(COUNT, 4, 8, 8, generator=generator), torch.rand(COUNT, 4, 8, 8, generator=generator)
    return mean, std, torch.arange(COUNT)[:, None], torch.arange(COUNT)[:, None] + 100.0


def train(stub: Stub, steps: int = 6, **changes: Any) -> Stub:
    result: Any = train_denoiser(stub, *data(), 0.5, steps, 0.01, **{"batch_size": BATCH, "seed": 7} | changes)  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_is_what_it_says(prediction_type: str) -> None:
    """Weights, target, dropped captions and moving average, against the same written out."""
    stub = Stub(prediction_type)
    reference = copy.deepcopy(stub)
    average = {name: value.detach().clone() for name, value in reference.named_parameters()}
    trained = train(stub, caption_dropout=0.4)
    generator = torch.Generator().manual_seed(7)
    mean, std, ids, time_ids = data()
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = one_cycle(optimizer, 0.01, 6)
    alphas = new_scheduler(prediction_type).alphas_cumprod
    order: list[int] = []
    for step, (noisy, timesteps, seen_ids, dropped, seen_time_ids) in enumerate(stub.asked, start=1):
        if len(order) < BATCH:
            order += torch.randperm(COUNT, generator=generator).tolist()
        batch, order = torch.tensor(order[:BATCH]), order[BATCH:]
        assert torch.equal(seen_ids, ids[batch]) and torch.equal(seen_time_ids, time_ids[batch])
        latents = (mean[batch] + std[batch] * torch.randn(BATCH, 4, 8, 8, generator=generator)) * 0.5
        noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
        assert torch.equal(timesteps, torch.randint(1000, (BATCH,), generator=generator))
        assert torch.equal(dropped, torch.rand(BATCH, generator=generator) < 0.4)
        a, s = (x[timesteps].sqrt()[:, None, None, None] for x in (alphas, 1 - alphas))
        torch.testing.assert_close(noisy, a * latents + s * noise)
        snr = (alphas / (1 - alphas))[timesteps]
        if prediction_type == "epsilon":
            target, weight = noise, snr.clamp(max=5) / snr
        else:
            target, weight = a * noise - s * latents, (snr + 1).clamp(max=5) / (snr + 1)
        prediction = reference.scale * noisy + reference.bias
        loss = (weight * (prediction - target).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (6 + step))
        for name, value in reference.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
    assert len(stub.asked) == 6 and not trained.training
    assert torch.stack([asked[3] for asked in stub.asked]).any()
    for name, value in trained.named_parameters():
        torch.testing.assert_close(value.detach(), average[name], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(trained.scale, stub.scale, atol=1e-4)  # the weights themselves are not the average


def test_the_average_reaches_its_decay_within_a_cycle() -> None:
    assert (1 + 4_993) / (6 + 4_993) < 0.999 <= (1 + 4_994) / (6 + 4_994)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_are_min_snr_in_terms_of_the_clean_latents(prediction_type: str) -> None:
    """The same error of the clean latents costs min(SNR, 5) times its square for the noise, min(SNR + 1, 5) for v."""
    scheduler = new_scheduler(prediction_type)
    weights = min_snr_weights(scheduler.alphas_cumprod, prediction_type)
    clean, noise, error = torch.randn(3, 1, 4, 8, 8).double()
    for t in (5, 300, 600, 950):
        a, s = scheduler.alphas_cumprod[t].double().sqrt(), (1 - scheduler.alphas_cumprod[t].double()).sqrt()
        noisy, wrong = a * clean + s * noise, clean + error
        wrong_noise = (noisy - a * wrong) / s
        snr = float(a**2 / s**2)
        if prediction_type == "epsilon":
            squared, expected = (wrong_noise - noise).square().mean(), min(snr, 5.0)
        else:
            squared = ((a * wrong_noise - s * wrong) - (a * noise - s * clean)).square().mean()
            expected = min(snr + 1, 5.0)
        assert weights[t] * squared == pytest.approx(float(expected * error.square().mean()), rel=1e-3)


@pytest.mark.parametrize("stop_after", [2, 3, 4])  # epochs of 20 in batches of 8: after each another remainder
def test_an_interrupted_cycle_resumes_to_the_bit(
    stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(Stub("v_prediction"))
    write = Checkpoint.write

    def interrupted(self: Checkpoint, tensors: Any) -> None:
        write(self, tensors)
        if int(tensors["step"]) == stop_after:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "unfinished", SETTINGS, every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "write", interrupted)
        train(Stub("v_prediction"), checkpoint=checkpoint)
    assert {path.name for path in checkpoint.folder.iterdir()} == {"state.safetensors", "training.json"}
    stub = Stub("v_prediction")
    with torch.no_grad():
        stub.scale.fill_(123.0)  # whatever it starts from, the checkpoint has the weights
    resumed = train(stub, checkpoint=checkpoint)
    assert len(stub.asked) == 6 - stop_after
    for one, other in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(one, other)
    stub = Stub("v_prediction")
    again = train(stub, checkpoint=checkpoint)  # of a cycle that was finished, but not kept yet
    assert not stub.asked and all(map(torch.equal, whole.parameters(), again.parameters()))
    checkpoint.remove()
    checkpoint.remove()
    assert not checkpoint.folder.exists()


def test_checkpoints_are_written_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Checkpoint, "write", lambda self, tensors: steps.append(int(tensors["step"])))
    train(Stub("epsilon"), steps=7, checkpoint=Checkpoint(tmp_path / "a", {}, every=3))
    assert steps == [3, 6, 7]
    assert Checkpoint(tmp_path / "a", {}).every == 1_000


def test_strange_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a", SETTINGS, every=2)
    train(Stub("epsilon"), checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"other settings: steps is 6 there, 7 here\. Give the settings"):
        train(Stub("epsilon"), checkpoint=Checkpoint(tmp_path / "a", SETTINGS | {"steps": 7}))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        other = Stub("epsilon")
        other.extra = nn.Parameter(torch.zeros(1))
        train(other, checkpoint=checkpoint)
    state = checkpoint.folder / "state.safetensors"
    assert load_file(state)["step"] == 6
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        train(Stub("epsilon"), checkpoint=checkpoint)
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="no record of a training's settings"):
        check_settings(tmp_path / "b", {})


def test_the_shipped_transformer_is_trained_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what the loop did that ``data/tiny-dit`` came from, over two cycles."""
    generator = torch.Generator().manual_seed(5)
    mean, std = torch.randn(50, 4, 8, 8, generator=generator), 0.1 * torch.rand(50, 4, 8, 8, generator=generator)
    labels = torch.randint(20, (50,), generator=generator)
    first = tiny.train_dit(mean, std, labels, 0.7, steps=3, batch_size=16, seed=0)
    second = tiny.train_dit(mean, std, labels, 0.7, steps=2, batch_size=16, learning_rate=1e-3, seed=1, start=first)
    expected = None
    for steps, rate, seed in ((3, 2e-3, 0), (2, 1e-3, 1)):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        scheduler = tiny.new_scheduler()
        snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        weights = snr.clamp(max=5.0) / snr
        dit = tiny.new_dit().train()
        if expected is not None:
            dit.load_state_dict(expected.state_dict())
        for block in dit.transformer_blocks:
            block.norm1.emb.eval()
        ema = copy.deepcopy(dit).eval()
        optimizer = torch.optim.AdamW(dit.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        schedule = one_cycle(optimizer, rate, steps)
        for step, batch in enumerate(cycles.batches(50, 16, steps, generator), start=1):
            posterior_noise, noise = (torch.randn(16, 4, 8, 8, generator=generator) for _ in range(2))
            latents = (mean[batch] + std[batch] * posterior_noise) * 0.7
            timesteps = torch.randint(1000, (16,), generator=generator)
            dropped = torch.rand(16, generator=generator) < 0.1
            noisy = scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
            prediction = dit(noisy, timesteps, torch.where(dropped, 20, labels[batch])).sample
            loss = (weights[timesteps] * (prediction - noise).square().mean(dim=(1, 2, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                decay = min(0.999, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(dit.parameters()), 1 - decay)
        expected = tiny._untied(ema)
    assert expected is not None
    for (name, one), (_, other) in zip(second.state_dict().items(), expected.state_dict().items()):
        assert torch.equal(one, other), name


def test_a_grown_denoiser_computes_what_the_shallow_one_computes_and_its_new_blocks_learn() -> None:
    tied = tiny.new_dit(2)
    randomise(tied, 3)
    shallow = tiny._untied(tied).eval()
    deep = tiny.grown(shallow, 5).eval()
    assert len(deep.transformer_blocks) == 5 and len({block.norm1.emb for block in deep.transformer_blocks}) == 1
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"timestep": torch.tensor([5, 400, 999]), "class_labels": torch.tensor([0, 7, 20])}
    with torch.no_grad():
        expected = shallow(x, **call).sample
    result = deep(x, **call).sample
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    result.square().sum().backward()
    assert all(block.norm1.linear.weight.grad.abs().max() > 0 for block in deep.transformer_blocks)


def test_the_small_dit_is_built_in_cycles_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished cycles are not repeated, nor mistaken for those of other settings."""
    calls: list[tuple[int, int]] = []

    def train_dit(*args: Any, num_layers: int, seed: int, **kwargs: Any) -> Any:
        calls.append((seed, num_layers))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tiny._untied(tiny.new_dit(num_layers))

    output, work = tmp_path / "out", tmp_path / "work"
    for part in ("vae", "extractor", "reference.safetensors"):
        source = DATA / "tiny-dit" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, _parent(output / part))
    monkeypatch.setattr(tiny, "train_dit", train_dit)
    cycles = [(1, 5, 1e-3), (2, 4, 1e-3)]
    with pytest.raises(KeyboardInterrupt):
        tiny.build_tiny_dit(output, num_images=8, dit_cycles=cycles, work=work)
    with pytest.raises(
        CheckpointError, match=r"cycle-0 was trained with other settings: cycles is \[\[1, 5, 0.001\]\]"
    ):
        tiny.build_tiny_dit(output, num_images=8, dit_cycles=[(1, 6, 1e-3), (2, 4, 1e-3)], work=work)
    tiny.build_tiny_dit(output, num_images=8, dit_cycles=cycles, work=work)
    assert calls == [(0, 1), (1, 2), (1, 2)]
    assert len(load_base(output).attention_sites()) == 2
    assert not any("_name_or_path" in path.read_text() for path in output.rglob("*.json"))


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
