"""SD 2.1 and SDXL at full size on the meta device: adapter sites, parameters and operations, without weights."""

from __future__ import annotations

import functools

import full_size_models
import pytest
import torch

from agd_lib import AdapterSet, memory
from agd_lib.adapters import ADAPTERS
from agd_lib.base_models import BaseModel, StableDiffusionBase, StableDiffusionXLBase, count_flops
from agd_lib.memory import GIB, MemorySettings, training_memory
from agd_lib.project import ROOT
from agd_lib.reproduce import load_profile

# profiles ask the same of one model again and again
collection_memory, encoding_memory, decoding_memory = map(
    functools.cache, (memory.collection_memory, memory.encoding_memory, memory.decoding_memory)
)


@pytest.fixture(scope="module")
def sd21() -> StableDiffusionBase:
    return full_size_models.sd21()


@pytest.fixture(scope="module")
def sdxl() -> StableDiffusionXLBase:
    return full_size_models.sdxl()


@pytest.mark.parametrize(
    ("name", "parameters", "latent_shape", "sites", "authors_sites"),
    [("sd21", 865_910_724, (4, 96, 96), 16, 13), ("sdxl", 2_567_463_684, (4, 128, 128), 70, 58)],
)
def test_parameters_and_sites(
    request: pytest.FixtureRequest,
    name: str,
    parameters: int,
    latent_shape: tuple[int, ...],
    sites: int,
    authors_sites: int,
) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    assert base.num_parameters() == parameters
    assert base.latent_shape == latent_shape
    assert base.fingerprint() == "meta"
    assert len(base.attention_sites()) == sites
    assert len(base.attention_sites(all_sites=False)) == authors_sites


@pytest.mark.parametrize(
    ("name", "inputs", "parameters", "share"),
    [
        ("sd21", False, 19_904_960, "2.30 %"),  # the authors' default flags: the adapters see the scale alone
        ("sd21", True, 29_497_920, "3.41 %"),  # they see timestep and prompt as well
        ("sdxl", False, 103_827_840, "4.04 %"),
        ("sdxl", True, 165_632_640, "6.45 %"),
    ],
)
def test_the_papers_adapters(
    request: pytest.FixtureRequest, name: str, inputs: bool, parameters: int, share: str
) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    with torch.device("meta"):
        adapters = AdapterSet.create(
            base,
            "cross-attention",
            hidden_size=320,
            guidance_range=(1.0, 12.0),
            use_timestep=inputs,
            use_condition=inputs,
            all_sites=False,
        )
    assert adapters.num_parameters() == parameters
    assert f"{parameters:,} parameters, {share} of the base model's" in adapters.summary(base)
    adapters.attach(base)
    adapters.remove()


@pytest.mark.parametrize(("name", "operations"), [("sd21", 2_149e9), ("sdxl", 6_761e9)])
def test_operations_of_one_forward_pass(request: pytest.FixtureRequest, name: str, operations: float) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    assert count_flops(base) == pytest.approx(operations, rel=1e-3)
    assert f"| {operations / 1e12:.3g} TFLOP |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_kind_stays_within_the_papers_share(sd21: StableDiffusionBase) -> None:
    """1 to 5 % of the base model, at a width that each kind would be given."""
    for kind, hidden_size in (("offset", 256), ("cross-attention", 256), ("modulated", 256)):
        with torch.device("meta"):
            adapters = AdapterSet.create(sd21, kind, hidden_size=hidden_size)
        assert 0.01 < adapters.num_parameters() / sd21.num_parameters() < 0.05, kind


@pytest.mark.parametrize(
    ("name", "kind", "hidden_size", "batch_size", "limit", "row"),
    [
        ("dit_xl", "offset", 256, 64, 4, "DiT-XL/2 256, offset d = 256, 64 states"),
        ("sd21", "cross-attention", 320, 8, 6, "SD 2.1 768, cross-attention d = 320, 8 states"),
        ("sdxl", "cross-attention", 320, 1, 8, "SDXL 1024, cross-attention d = 320, 1 state"),
        ("sdxl", "cross-attention", 320, 4, 10, "SDXL 1024, cross-attention d = 320, 4 states"),
    ],
)
def test_training_fits_small_cards_as_the_readme_says(
    name: str, kind: str, hidden_size: int, batch_size: int, limit: float, row: str
) -> None:
    """Adapters at all sites with all inputs. Our own figures; the authors', in brackets, were predicted with their code."""
    base: BaseModel = getattr(full_size_models, name)()
    with torch.device("meta"):
        adapters = AdapterSet.create(base, kind, hidden_size=hidden_size)
    predictions = [
        training_memory(base, adapters, batch_size, MemorySettings(dtype, checkpointing, offload=True))
        for dtype in (torch.float32, torch.bfloat16)
        for checkpointing in (False, True)
    ]
    assert predictions[-1].memory.total < limit * GIB
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (cells,) = (line.split("|")[2:7] for line in readme.splitlines() if line.startswith(f"| {row} |"))
    assert [cell.split()[0] for cell in cells[:4]] == [f"{each.memory.total / GIB:.1f}" for each in predictions]
    assert cells[4].strip() == ", ".join(f"{each.flops / batch_size / 1e12:.2f}" for each in predictions[:2])


CARDS = [
    ("sd21", "04_train_sd21_adapters", "paper", 24),
    ("sd21", "04_train_sd21_adapters", "thrifty", 24),
    ("sd21", "04_train_sd21_adapters", "small-gpu", 8),
    ("sdxl", "05_train_sdxl_adapters", "paper", 24),
    ("sdxl", "05_train_sdxl_adapters", "thrifty", 24),
    ("sdxl", "05_train_sdxl_adapters", "small-gpu", 12),
]


@pytest.mark.parametrize(("name", "notebook", "profile", "card"), CARDS)
def test_everything_that_a_profiles_notebooks_do_fits_its_card(
    request: pytest.FixtureRequest, name: str, notebook: str, profile: str, card: float
) -> None:
    """Beside training: prompts are encoded, images are sampled by CFG, and decoded."""
    base: StableDiffusionBase = request.getfixturevalue(name)
    parameters = load_profile(profile, name).parameters_for
    measuring = parameters("06_evaluate_fid")
    at_once = {
        notebook: [base.images_at_once],
        "06_evaluate_fid": [base.images_at_once, measuring["batch_size"], measuring["timing_batch_size"]],
    }
    if name == "sd21":
        at_once["08_use_and_combine"] = [base.images_at_once]
    for each, batch_sizes in at_once.items():
        settings = MemorySettings(offload=parameters(each).get("offload", False))
        assert encoding_memory(base, settings).fits(card) and decoding_memory(base, settings).fits(card), each
        for batch_size in batch_sizes:
            assert collection_memory(base, batch_size, settings).memory.fits(card), (each, batch_size)


@pytest.mark.parametrize(("name", "notebook", "profile", "card"), CARDS)
def test_the_profiles_fit_their_cards_with_adapters_of_the_papers_share(
    request: pytest.FixtureRequest, name: str, notebook: str, profile: str, card: float
) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    given = load_profile(profile, name).parameters_for(notebook)
    assert given["hidden_sizes"].keys() == ADAPTERS.keys()
    for kind, hidden_size in given["hidden_sizes"].items():
        with torch.device("meta"):
            adapters = AdapterSet.create(base, kind, hidden_size, noise_ranges=2 if kind == "modulated" else 1)
        assert 0.01 < adapters.num_parameters() / base.num_parameters() < 0.05, kind
        if kind == given["adapter_kinds"]:
            dtype = torch.bfloat16 if given.get("training_dtype") == "bfloat16" else torch.float32
            settings = MemorySettings(dtype, given["gradient_checkpointing"], given["offload"])
            training = training_memory(base, adapters, given["training_batch_size"], settings).memory
            path = ROOT / "notebooks" / "profiles" / f"{name}.{profile}.yaml"
            assert f"# {training.total / GIB:.1f} GiB" in path.read_text(encoding="utf-8")
            collection = collection_memory(
                base, given["collection_batch_size"], MemorySettings(offload=given["offload"])
            ).memory
            assert training.fits(card) and collection.fits(card)
