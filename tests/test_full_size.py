"""DiT-XL/2 at full size on the meta device: adapter sites and parameter counts, without weights or memory."""

from __future__ import annotations

import pytest
import torch
from full_size_models import dit_xl

from agd_lib import AdapterSet
from agd_lib.adapters import ADAPTERS
from agd_lib.base_models import DiTBase, count_flops
from agd_lib.memory import GIB, MemorySettings, training_memory
from agd_lib.project import ROOT
from agd_lib.reproduce import load_profile

BLOCKS, WIDTH = 28, 1152


@pytest.fixture(scope="module")
def xl() -> DiTBase:
    return dit_xl()


def test_parameters(xl: DiTBase) -> None:
    assert sum(p.numel() for p in xl.denoiser.parameters()) == 749_826_464
    assert xl.num_parameters() == 674_834_720
    assert xl.latent_shape == (4, 32, 32) and xl.num_classes == 1000
    assert xl.fingerprint() == "meta"


def test_operations_of_one_forward_pass(xl: DiTBase) -> None:
    """237 GFLOP, of which the attention's own two products are 8.5."""
    tokens, patch_values, embedder = 256, 16, 256 * WIDTH + WIDTH**2
    per_block = tokens * 12 * WIDTH**2 + 2 * tokens**2 * WIDTH + embedder + 6 * WIDTH**2
    ends = tokens * patch_values * WIDTH + embedder + 2 * WIDTH**2 + tokens * WIDTH * 2 * patch_values
    by_hand = 2 * (BLOCKS * per_block + ends)
    assert by_hand == pytest.approx(237.2e9, rel=1e-3)
    assert count_flops(xl) == by_hand
    assert f"| {by_hand / 1e12:.3g} TFLOP |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_site_in_every_block(xl: DiTBase) -> None:
    sites = xl.attention_sites()
    assert list(sites) == [f"transformer_blocks.{i}.attn1" for i in range(BLOCKS)]
    for name, site in sites.items():
        assert xl.denoiser.get_submodule(name) is site.attention
        assert site.channels == WIDTH == site.attention.to_q.in_features == site.attention.to_out[0].out_features
        block = xl.denoiser.get_submodule(name.removesuffix(".attn1"))
        assert site.feed_forward is block.ff and site.embedding is block.norm1.emb


@pytest.mark.parametrize(
    ("kind", "inputs", "parameters", "share"),
    [
        ("offset", False, 24_933_888, "3.69 %"),  # the authors' default flags
        ("offset", True, 41_463_296, "6.14 %"),  # the adapters see timestep and class as well
    ],
)
def test_the_papers_adapters(xl: DiTBase, kind: str, inputs: bool, parameters: int, share: str) -> None:
    with torch.device("meta"):
        adapters = AdapterSet.create(xl, kind, hidden_size=256, use_timestep=inputs, use_condition=inputs)
    assert len(adapters.config.sites) == BLOCKS
    assert adapters.num_parameters() == parameters
    assert f"{parameters:,} parameters, {share} of the base model's 674,834,720" in adapters.summary(xl)
    assert all(p.device.type == "meta" for p in adapters.parameters())
    adapters.attach(xl)
    adapters.remove()


def test_the_profiles_adapters_stay_within_the_papers_share_and_fit_its_card(xl: DiTBase) -> None:
    """1 to 5 % of the base model, and a training step in 24 GB, with the widths and settings that the notebook is given."""
    given = load_profile("paper", "dit-xl-2-256").parameters_for("03_train_dit_adapters")
    assert given["hidden_sizes"].keys() == ADAPTERS.keys()
    for kind, hidden_size in given["hidden_sizes"].items():
        with torch.device("meta"):
            adapters = AdapterSet.create(
                xl, kind, hidden_size=hidden_size, noise_ranges=2 if kind == "modulated" else 1
            )
        assert 0.01 < adapters.num_parameters() / xl.num_parameters() < 0.05, kind
        settings = MemorySettings(gradient_checkpointing=given["gradient_checkpointing"])
        memory = training_memory(xl, adapters, given["training_batch_size"], settings).memory
        assert memory.fits(24), kind
        if kind == given["adapter_kinds"]:  # as the profile's comments say
            assert adapters.num_parameters() / xl.num_parameters() == pytest.approx(0.0415, abs=1e-4)
            assert memory.total == pytest.approx(6.7 * GIB, rel=0.01)
            without = training_memory(xl, adapters, given["training_batch_size"], MemorySettings()).memory
            assert without.total == pytest.approx(23.5 * GIB, rel=0.01)


def test_the_papers_batch_trains_in_four_gib(xl: DiTBase) -> None:
    """64 states a step: bfloat16 base and gradient checkpointing, at half as many operations again."""
    with torch.device("meta"):
        adapters = AdapterSet.create(xl, "offset", hidden_size=256)
    prediction = training_memory(xl, adapters, 64, MemorySettings(torch.bfloat16, True, offload=True))
    assert prediction.memory.total == pytest.approx(3.51 * GIB, rel=0.01)
    assert prediction.memory.base == pytest.approx(2 * 749_826_464, rel=0.01)
    assert prediction.flops == pytest.approx(1.49 * 30.95e12, rel=0.01)
    assert prediction.flops == pytest.approx(3 * 64 * 0.237e12, rel=0.02)  # three forward passes a state: README
