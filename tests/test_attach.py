"""Adapters on a base model: they start as the identity, come off without a trace, and survive the disk."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import build_dit_pipeline, randomise
from torch import Tensor

from agd_lib import AGD, AdapterSet, Unguided, attach, base_from_pipeline, load_base, sample, storage
from agd_lib.adapters import ADAPTERS
from agd_lib.attach import CONFIG_NAME, WEIGHTS_NAME
from agd_lib.base_models import BaseModel, DiTBase
from agd_lib.errors import AdapterError, WriteError
from agd_lib.guidance import Guidance
from agd_lib.sampling import endpoint

KINDS = list(ADAPTERS)


def hooks(base: BaseModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.denoiser.modules())


def new(base: BaseModel, kind: str = "offset", trained: bool = True, **settings: Any) -> AdapterSet:
    """Adapters with random weights, as if trained."""
    adapters = AdapterSet.create(base, kind, **({"hidden_size": 8} | settings))
    if trained:
        randomise(adapters, 7)
    return adapters


@pytest.fixture
def call(dit_base: DiTBase) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Arguments of ``denoise``: three samples, each at a timestep of its own."""
    latents = torch.randn(3, *dit_base.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([10, 400, 999]), dit_base.encode([0, 2, 4])


def weights(base: BaseModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.denoiser.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# On and off -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_adapters_are_the_identity_to_the_bit(dit_base: DiTBase, call: tuple, kind: str) -> None:
    plain = dit_base.denoise(*call)
    with new(dit_base, kind, trained=False).attach(dit_base).guided_by(torch.tensor([0.0, 1.0, 6.0])):
        assert torch.equal(dit_base.denoise(*call), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_active_adapters_guide_and_come_off_without_a_trace(dit_base: DiTBase, call: tuple, kind: str) -> None:
    plain, before, count = dit_base.denoise(*call), weights(dit_base), hooks(dit_base)
    adapters = new(dit_base, kind)
    assert hooks(dit_base) == count
    adapters.attach(dit_base)
    per_block = 2 if kind == "modulated" else 1  # a layer; and the embedding
    assert hooks(dit_base) == count + 2 + 3 * per_block  # two for the denoiser: its call, and its first layer
    assert torch.equal(dit_base.denoise(*call), plain)  # attached, but no guidance asked for
    with adapters.guided_by(4.0):
        guided = dit_base.denoise(*call)
        assert (guided - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-2  # every sample is changed
        with adapters.disabled():
            assert torch.equal(dit_base.denoise(*call), plain)
        assert torch.equal(dit_base.denoise(*call), guided)
        adapters.enabled = False
        assert torch.equal(dit_base.denoise(*call), plain)
        adapters.enabled = True
    assert torch.equal(dit_base.denoise(*call), plain)
    adapters.remove()
    assert torch.equal(dit_base.denoise(*call), plain)
    assert hooks(dit_base) == count
    assert same(weights(dit_base), before)
    adapters.remove()  # harmless
    with pytest.raises(AdapterError, match="on no base model"), adapters.guided_by(4.0):
        pass
    with adapters.attach(dit_base).guided_by(4.0):
        assert torch.equal(dit_base.denoise(*call), guided)


@pytest.mark.parametrize("kind", KINDS)
def test_training_the_adapters_leaves_the_base_alone(dit_base: DiTBase, call: tuple, kind: str) -> None:
    plain, before = dit_base.denoise(*call), weights(dit_base)
    adapters = new(dit_base, kind).attach(dit_base)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.1)
    for _ in range(2):
        with adapters.guided_by(torch.tensor([1.5, 2.0, 6.0])):
            loss = dit_base.denoise(*call).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    assert all(p.grad is None for p in dit_base.denoiser.parameters())
    assert same(weights(dit_base), before)
    assert torch.equal(dit_base.denoise(*call), plain)


def test_outside_the_block_guidance_is_off_also_after_an_error(dit_base: DiTBase, call: tuple) -> None:
    plain = dit_base.denoise(*call)
    adapters = new(dit_base).attach(dit_base)
    with pytest.raises(KeyError), adapters.guided_by(4.0):
        raise KeyError
    assert torch.equal(dit_base.denoise(*call), plain)
    with pytest.raises(KeyError), adapters.disabled():
        raise KeyError
    with adapters.guided_by(4.0):
        assert not torch.allclose(dit_base.denoise(*call), plain, atol=1e-2)


def test_inner_scales_win_and_give_way_again(dit_base: DiTBase, call: tuple) -> None:
    adapters = new(dit_base).attach(dit_base)
    with adapters.guided_by(2.0):
        two = dit_base.denoise(*call)
        with adapters.guided_by(5.0):
            five = dit_base.denoise(*call)
        assert torch.equal(dit_base.denoise(*call), two)
    assert not torch.allclose(two, five, atol=1e-2)


def test_each_sample_is_guided_by_its_own_scale(dit_base: DiTBase, call: tuple) -> None:
    latents, timestep, condition = call
    adapters = new(dit_base, "cross-attention").attach(dit_base)
    scales = torch.tensor([1.0, 2.5, 6.0])
    with adapters.guided_by(scales):
        together = dit_base.denoise(latents, timestep, condition)
    for i in range(3):
        alone = {"class_labels": condition["class_labels"][i : i + 1]}
        with adapters.guided_by(float(scales[i])):
            prediction = dit_base.denoise(latents[i : i + 1], timestep[i : i + 1], alone)
        torch.testing.assert_close(prediction[0], together[i], rtol=1e-4, atol=1e-4)


def test_a_second_set_replaces_the_first_with_a_warning(dit_base: DiTBase, call: tuple) -> None:
    count = hooks(dit_base)
    first, second = new(dit_base), new(dit_base, "modulated")
    first.attach(dit_base)
    with pytest.warns(UserWarning, match="carried adapters already; they were removed"):
        second.attach(dit_base)
    assert hooks(dit_base) == count + 2 + 3 * 2
    with pytest.raises(AdapterError, match="on no base model"), first.guided_by(4.0):
        pass
    with second.guided_by(4.0):
        assert not torch.allclose(dit_base.denoise(*call), dit_base.denoise(*call) * 0)
    second.remove()
    assert hooks(dit_base) == count


COMPILED = {
    "all": lambda pipe, backend: pipe.transformer.compile(backend=backend),
    "block by block": lambda pipe, backend: [
        block.compile(backend=backend) for block in pipe.transformer.transformer_blocks
    ],
    "wrapped": lambda pipe, backend: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend=backend)),
}


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "all") for kind in ADAPTERS), *(("modulated", how) for how in list(COMPILED)[1:])]
)
def test_a_compiled_base_notices_adapters_that_come_and_go(dit_folder: Path, kind: str, how: str) -> None:
    base = load_base(dit_folder)
    adapters, condition = new(base, kind), base.encode([0, 1])

    def images(base: BaseModel, guidance: Guidance, steps: int = 3) -> Tensor:
        return endpoint(sample(base, condition, guidance, steps, seeds=[0, 1]))

    unguided, guided = images(base, Unguided()), images(base, AGD(adapters.attach(base), 3.0))
    assert not torch.allclose(unguided, guided, atol=0.01)
    adapters.remove()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    COMPILED[how](base.pipeline, backend)
    base = base_from_pipeline(base.pipeline)
    try:
        torch.testing.assert_close(images(base, Unguided()), unguided)  # compiled without adapters
        torch.testing.assert_close(images(base, AGD(adapters.attach(base), 3.0)), guided)
        images(base, AGD(adapters, 2.0), steps=30)
        count = len(graphs)
        adapters.attach(base)  # again: nothing to forget
        images(base, AGD(adapters, 4.0), steps=40)
        assert len(graphs) == count < 10  # they serve all timesteps, scales and runs
        adapters.remove()
        torch.testing.assert_close(images(base, Unguided()), unguided)
        with adapters.attached(base):
            count = len(graphs)
            torch.testing.assert_close(images(base, AGD(adapters, 3.0)), guided)
        torch.testing.assert_close(images(base, Unguided()), unguided)
        assert len(graphs) == count
        adapters.attach(base)
        with pytest.warns(UserWarning, match="carried adapters already"):
            others = new(base, kind, trained=False).attach(base)
        torch.testing.assert_close(images(base, AGD(others, 3.0)), unguided)  # untrained ones change nothing
    finally:
        torch.compiler.reset()


def test_attaching_again_changes_nothing(dit_base: DiTBase, recwarn: pytest.WarningsRecorder) -> None:
    adapters = new(dit_base).attach(dit_base)
    count = hooks(dit_base)
    assert adapters.attach(dit_base) is adapters
    assert hooks(dit_base) == count
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_attaching_elsewhere_takes_the_adapters_along(dit_base: DiTBase, dit_folder: Path, call: tuple) -> None:
    other, count = load_base(dit_folder), hooks(dit_base)
    adapters = new(dit_base).attach(dit_base)
    adapters.attach(other)
    assert hooks(dit_base) == count and hooks(other) == count + 2 + 3
    with adapters.guided_by(4.0):
        assert not torch.allclose(other.denoise(*call), dit_base.denoise(*call), atol=1e-2)


def test_adapters_of_one_base_do_not_touch_another(dit_base: DiTBase, dit_folder: Path, call: tuple) -> None:
    other = load_base(dit_folder)
    plain = other.denoise(*call)
    with new(dit_base).attach(dit_base).guided_by(4.0):
        assert torch.equal(other.denoise(*call), plain)


def test_any_caller_is_guided_with_named_or_positional_arguments(dit_base: DiTBase, call: tuple) -> None:
    latents, timestep, condition = call
    labels = condition["class_labels"]
    with new(dit_base, "modulated").attach(dit_base).guided_by(4.0):
        expected = dit_base.denoise(latents, timestep, condition)
        positional = dit_base.denoiser(latents, timestep, labels).sample
        named = dit_base.denoiser(hidden_states=latents, timestep=timestep, class_labels=labels).sample
    assert torch.equal(positional, expected) and torch.equal(named, expected)


def test_adapters_in_lower_precision_work_where_the_base_stays(dit_base: DiTBase, call: tuple) -> None:
    for kind in KINDS:
        adapters = new(dit_base, kind).attach(dit_base)
        with adapters.guided_by(3.0):
            exact = dit_base.denoise(*call)
            adapters.to(torch.bfloat16)
            rough = dit_base.denoise(*call)
        assert rough.dtype == torch.float32
        assert not torch.equal(rough, exact)
        assert (rough - exact).square().mean() < 0.01 * exact.square().mean()
        adapters.remove()


def test_a_base_in_bfloat16_takes_adapters_in_float32(dit_base: DiTBase) -> None:
    dit_base.to(dtype=torch.bfloat16)
    adapters = AdapterSet.create(dit_base, "cross-attention", hidden_size=8)
    randomise(adapters, 7)
    adapters.attach(dit_base)
    *_, last = sample(dit_base, dit_base.encode([0, 1]), AGD(adapters, 3.0), 3, seeds=[0, 1])
    assert last.prediction.dtype == torch.bfloat16 and torch.isfinite(last.next_latents).all()
    *_, plain = sample(dit_base, dit_base.encode([0, 1]), Unguided(), 3, seeds=[0, 1])
    assert not torch.equal(plain.next_latents, last.next_latents)


def test_adapters_see_what_the_base_sees(dit_base: DiTBase) -> None:
    """Their timestep and class inputs are the base model's own embeddings: together, the first block's modulation."""
    embedder = dit_base.denoiser.transformer_blocks[0].norm1.emb
    timestep, labels = torch.tensor([10, 400]), torch.tensor([0, 5])
    inputs = dit_base.adapter_inputs(timestep, {"class_labels": labels}, torch.ones(2))
    assert inputs.class_embedding is not None and inputs.prompt_embeddings is None
    expected = embedder(timestep, labels, hidden_dtype=torch.float32)
    torch.testing.assert_close(inputs.timestep_embedding + inputs.class_embedding, expected)


# Creating ---------------------------------------------------------------------------------------------------------------


def test_create_is_deterministic_and_leaves_the_global_generator_alone(dit_base: DiTBase) -> None:
    torch.manual_seed(0)
    one = AdapterSet.create(dit_base, "cross-attention", hidden_size=8, seed=3)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(()), drawn)
    two = AdapterSet.create(dit_base, "cross-attention", hidden_size=8, seed=3)
    assert same(one.state_dict(), two.state_dict())
    assert not same(
        one.state_dict(), AdapterSet.create(dit_base, "cross-attention", hidden_size=8, seed=4).state_dict()
    )


def test_config_tells_what_the_adapters_are_for(dit_base: DiTBase) -> None:
    config = new(dit_base, guidance_range=(1, 4), guided_channels=3, use_timestep=False).config
    assert config.sites == {f"transformer_blocks.{i}.attn1": 16 for i in range(3)}
    assert (config.timestep_dim, config.class_dim, config.prompt_dim) == (None, 16, None)
    assert config.guidance_range == (1.0, 4.0) and config.guided_channels == 3
    assert config.base_fingerprint == dit_base.fingerprint() and config.prediction_type == "epsilon"
    assert new(dit_base).config.guided_channels == 4
    assert new(dit_base, use_condition=False).config.class_dim is None


def test_summary_counts_by_hand(dit_base: DiTBase) -> None:
    d, width, sites = 8, 16, 3
    encoding = (d * 4 * d + 4 * d) + (4 * d * d + d) + 2 * d
    per_site = encoding + 2 * (width * d + d) + width * d + 2 * d * d + (d * width + width)
    adapters = new(dit_base, "cross-attention")
    assert adapters.num_parameters() == sites * per_site
    share = 100 * sites * per_site / dit_base.num_parameters()
    assert f"{sites * per_site:,} parameters, {share:.2f} %" in adapters.summary(dit_base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora"}, "got adapter kind 'lora', expected one of: offset, cross-attention, modulated"),
        ({"hidden_size": 0}, "got hidden_size 0"),
        ({"hidden_size": 8.0}, "got hidden_size 8.0"),
        ({"kind": "cross-attention", "hidden_size": 7}, "expected an even number"),
        ({"guidance_range": (6.0, 1.0)}, r"got guidance range \(6.0, 1.0\), expected 0 <= w_min <= w_max"),
        ({"guidance_range": (1.0, float("nan"))}, "got guidance range"),
        ({"guidance_range": (1.0, float("inf"))}, "got guidance range"),
        ({"guidance_range": (-1.0, 2.0)}, "got guidance range"),
        ({"noise_ranges": 0}, "got noise_ranges 0, expected a whole number from 1 to 100"),
        ({"noise_ranges": 2}, "got noise_ranges 2 for offset adapters, expected 1"),
    ],
)
def test_bad_settings_are_refused(dit_base: DiTBase, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSet.create(dit_base, **settings)


# Another base -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": 16}, "transformer_blocks.0.attn1 has width 32, the adapter 16.*timestep_dim is 32"),
        ({"num_layers": 2}, "attention layer transformer_blocks.2.attn1 is missing"),
        (
            {"num_layers": 4},
            "it has 4 attention layers, the adapters are for 3 of them: there is none for transformer_blocks.3.attn1",
        ),
        ({"prediction_type": "v_prediction"}, "it predicts v_prediction, the adapters were trained for epsilon"),
    ],
    ids=["other width", "fewer blocks", "more blocks", "other prediction"],
)
def test_a_base_that_does_not_fit_is_named_with_what_differs(
    dit_base: DiTBase, changes: dict[str, Any], message: str
) -> None:
    other = base_from_pipeline(build_dit_pipeline(**changes), "other")
    adapters, count = new(dit_base), hooks(other)
    with pytest.raises(AdapterError, match=f"do not fit other: .*{message}"):
        adapters.attach(other)
    assert hooks(other) == count


def test_many_differences_are_cut_short(dit_base: DiTBase) -> None:
    other = base_from_pipeline(build_dit_pipeline(attention_head_dim=16, num_layers=1, prediction_type="sample"), "x")
    with pytest.raises(AdapterError, match="and 1 more differences"):
        new(dit_base).attach(other)


def test_a_base_of_the_same_name_with_other_weights_is_warned_of(dit_base: DiTBase) -> None:
    other = base_from_pipeline(build_dit_pipeline(seed=5), dit_base.name)
    with pytest.warns(UserWarning, match=f"trained on a {dit_base.name} with other weights"):
        new(dit_base).attach(other)


def test_a_fine_tuned_copy_of_the_base_is_accepted(dit_base: DiTBase) -> None:
    """The paper's adapters transfer to other checkpoints of the same base: weights may differ, sizes may not."""
    other = base_from_pipeline(build_dit_pipeline(seed=5), "fine-tuned")
    adapters = new(dit_base).attach(other)
    assert other.fingerprint() != adapters.config.base_fingerprint
    *_, last = sample(other, other.encode([0]), AGD(adapters, 2.0), 2, seeds=[0])
    assert torch.isfinite(last.next_latents).all()


# Disk -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(dit_base: DiTBase, tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    new(dit_base, "cross-attention").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_adapters_are_equal_to_the_bit(
    dit_base: DiTBase, call: tuple, tmp_path: Path, kind: str
) -> None:
    ranges = {"noise_ranges": 2} if kind == "modulated" else {}
    adapters = new(dit_base, kind, guidance_range=(1, 4), guided_channels=3, scale_multiplier=10.0, **ranges)
    adapters.save_pretrained(tmp_path / "deep" / "folder", card="# measured\n")
    loaded = AdapterSet.from_pretrained(tmp_path / "deep" / "folder")
    assert loaded.config == adapters.config
    assert same(loaded.state_dict(), adapters.state_dict())
    assert all(p.requires_grad for p in loaded.parameters())
    with adapters.attach(dit_base).guided_by(3.0):
        expected = dit_base.denoise(*call)
    adapters.remove()
    with loaded.attach(dit_base).guided_by(3.0):
        assert torch.equal(dit_base.denoise(*call), expected)
    files = {path.name for path in (tmp_path / "deep" / "folder").iterdir()}
    assert files == {"config.json", "adapter_model.safetensors", "README.md"}
    assert (tmp_path / "deep" / "folder" / "README.md").read_text() == "# measured\n"


def test_loaded_adapters_do_not_write_to_their_file(saved: Path) -> None:
    before = (saved / WEIGHTS_NAME).read_bytes()
    loaded = AdapterSet.from_pretrained(saved)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    (saved / WEIGHTS_NAME).unlink()
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
    assert before[:8] != b""


def test_saving_replaces_and_names_itself_in_the_card(dit_base: DiTBase, saved: Path) -> None:
    new(dit_base, "offset").save_pretrained(saved)
    assert AdapterSet.from_pretrained(saved).config.kind == "offset"
    assert "offset" in (saved / "README.md").read_text()
    assert sorted(path.name for path in saved.parent.iterdir()) == ["adapters"]


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    config.update(changes)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lora"}, "kind is 'lora', expected one of: offset"),
        ({"kind": ["offset"]}, "kind is"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a size from 1 to 65,536"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected a size"),
        ({"hidden_size": 8.0}, "hidden_size is 8.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 7}, "hidden_size 7, expected an even number"),
        ({"timestep_dim": 10**9}, "timestep_dim is 1000000000"),
        ({"class_dim": "16"}, "class_dim is '16'"),
        ({"sites": {}}, "sites is {}"),
        ({"sites": ["transformer_blocks.0.attn1"]}, "sites is"),
        ({"sites": {"transformer_blocks.0.attn1": 10**9}}, "sites is"),
        ({"sites": {"": 16}}, "sites is"),
        ({"sites": {"../../etc": 16}}, "sites is"),
        ({"sites": {f"blocks.{i}.attn": 16 for i in range(10_001)}}, "sites is"),
        ({"guidance_range": [1.0, float("nan")]}, "is not valid JSON"),
        ({"guidance_range": [6.0, 1.0]}, "guidance_range is"),
        ({"guidance_range": [1.0]}, "guidance_range is"),
        ({"guidance_range": [1, 10**400]}, "guidance_range is"),
        ({"guidance_range": "16"}, "guidance_range is '16'"),
        ({"guidance_range": None}, "guidance_range is None"),
        ({"scale_multiplier": float("inf")}, "is not valid JSON"),
        ({"scale_multiplier": "big"}, "scale_multiplier is 'big'"),
        ({"base_name": 3}, "base_name is 3, expected a text"),
        ({"prediction_type": None}, "prediction_type is None"),
        ({"guided_channels": -1}, "guided_channels is -1"),
        ({"noise_ranges": 0}, "noise_ranges is 0, expected a whole number from 1 to 100"),
        ({"noise_ranges": 10**9}, "noise_ranges is 1000000000"),
        ({"noise_ranges": 2}, "noise_ranges 2 for cross-attention adapters, expected 1"),
        ({"format_version": 2}, "has adapter format version 2, this library reads 1"),
        ({"format_version": None}, "has adapter format version None"),
        ({"surprise": 1}, r"missing \[\], unknown \['surprise'\]"),
        # well-formed, but not what the weights say
        ({"hidden_size": 16}, r"do not fit its config.json: .*shape \(.*\), expected \(.*\)"),
        ({"hidden_size": 65_536}, r"do not fit its config.json: .*expected \(.*65536"),
        ({"kind": "offset"}, "do not fit its config.json: .*is missing"),
        ({"class_dim": None}, "class_proj.bias is unknown"),
    ],
)
def test_an_edited_config_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(AdapterError, match=message):
        AdapterSet.from_pretrained(saved)


@pytest.mark.parametrize("name", ["guidance_range", "scale_multiplier", "guided_channels", "noise_ranges"])
@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_config_number_that_overflows_is_refused(saved: Path, name: str, number: str) -> None:
    """Valid JSON, but infinite once it is read."""
    text = (saved / CONFIG_NAME).read_text()
    value = f"[1.0, {number}]" if name == "guidance_range" else number
    text = re.sub(rf'"{name}": (\[[^]]*\]|[^,]*)', f'"{name}": {value}', text)
    assert number in text
    (saved / CONFIG_NAME).write_text(text)
    with pytest.raises(AdapterError, match=r"config.json is not valid JSON .*1e999 is larger than any number"):
        AdapterSet.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["kind", "sites", "prediction_type", "scale_multiplier", "noise_ranges", "format_version"]
)
def test_a_config_with_a_gap_is_refused(saved: Path, name: str) -> None:
    config = json.loads((saved / CONFIG_NAME).read_text())
    del config[name]
    (saved / CONFIG_NAME).write_text(json.dumps(config))
    message = "format version None" if name == "format_version" else rf"missing \['{name}'\]"
    with pytest.raises(AdapterError, match=message):
        AdapterSet.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01", '{"kind": ' + "9" * 5000 + "}", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG_NAME).write_text(text)
    with pytest.raises(AdapterError, match="adapter config"):
        AdapterSet.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(saved: Path, keep: int) -> None:
    content = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(content[:keep])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged .* truncated or edited"):
        AdapterSet.from_pretrained(saved)


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterError, match=r"no adapter weights at .*adapter_model.safetensors"):
        AdapterSet.from_pretrained(saved)
    (saved / CONFIG_NAME).unlink()
    with pytest.raises(AdapterError, match=r"no adapter config at .*config.json"):
        AdapterSet.from_pretrained(saved)
    with pytest.raises(AdapterError, match="no such folder, and not a hub id"):
        AdapterSet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="no such folder, and not a hub id"):
        AdapterSet.from_pretrained("nonsense")


def test_adapters_come_from_the_hub_without_pickles(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kw: (asked.append((args, kw)), saved)[1])
    for revision in (None, "abc"):
        found = AdapterSet.from_pretrained("somebody/their-adapters", revision=revision)
        assert found.config.kind == "cross-attention"
        patterns = ["config.json", "adapter_model.safetensors", "README.md"]
        assert asked.pop() == (("somebody/their-adapters",), {"revision": revision, "allow_patterns": patterns})


class Hub:
    """Takes uploads, as ``HfApi`` does, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.repositories[repo_id] = private

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
        assert repo_id in self.repositories and commit_message
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return f"https://hub/{repo_id}/commit/1"


def test_adapters_go_to_the_hub_as_they_go_to_the_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    adapters = AdapterSet.from_pretrained(saved)
    address = adapters.push_to_hub("somebody/their-adapters", card="# Measured", private=True)
    assert address == "https://hub/somebody/their-adapters/commit/1"
    assert hub.repositories == {"somebody/their-adapters": True}
    adapters.save_pretrained(saved, card="# Measured")
    assert hub.files == {path.name: path.read_bytes() for path in saved.iterdir()} and len(hub.files) == 3


def test_the_model_card_goes_where_the_adapters_go(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    AdapterSet.from_pretrained(saved).save_pretrained(tmp_path / "measured", card="# Measured: 1.5")
    AdapterSet.from_pretrained(tmp_path / "measured").push_to_hub("somebody/theirs")
    assert hub.files["README.md"] == b"# Measured: 1.5"
    changed = AdapterSet.from_pretrained(tmp_path / "measured")
    changed.config = replace(changed.config, strength=(1.5,))  # other results
    changed.save_pretrained(tmp_path / "changed")
    assert "1.5" not in (tmp_path / "changed" / "README.md").read_text()
    AdapterSet.from_pretrained(tmp_path / "measured").save_pretrained(tmp_path / "again", card="# Measured: 1.4")
    assert (tmp_path / "again" / "README.md").read_text() == "# Measured: 1.4"
    for unreadable in (b"\xff\xfe", b"x" * (2**20 + 1), None):
        (tmp_path / "again" / "README.md").unlink()
        if unreadable is not None:
            (tmp_path / "again" / "README.md").write_bytes(unreadable)
        assert AdapterSet.from_pretrained(tmp_path / "again").card == ""
        (tmp_path / "again" / "README.md").touch()


def test_a_hub_that_takes_nothing_is_explained(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(PermissionError("401 Unauthorized")))
    with pytest.raises(AdapterError, match=r"could not push .* 'somebody/theirs': 401 Unauthorized. .*hf auth login"):
        AdapterSet.from_pretrained(saved).push_to_hub("somebody/theirs")


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        AdapterError, match=r"could not fetch the adapters 'somebody/their-adapters' .*no route to host"
    ):
        AdapterSet.from_pretrained("somebody/their-adapters")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def test_a_pickle_is_never_opened(saved: Path, tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    pickled = tmp_path / "adapters.pt"
    pickled.write_bytes(pickle.dumps({"model": Bomb(exploded)}))
    with pytest.raises(AdapterError, match=r"pickles can run any code.*convert_authors_checkpoint"):
        AdapterSet.from_pretrained(pickled)
    shutil.copy(pickled, saved / WEIGHTS_NAME)  # under the right name
    with pytest.raises(AdapterError, match="is damaged"):
        AdapterSet.from_pretrained(saved)
    (saved / WEIGHTS_NAME).unlink()
    shutil.copy(pickled, saved / "adapter_model.bin")  # beside a config, as other libraries keep it
    with pytest.raises(AdapterError, match="no adapter weights"):
        AdapterSet.from_pretrained(saved)
    assert not exploded.exists()


def test_a_single_weights_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"is a file, expected the folder that holds config.json"):
        AdapterSet.from_pretrained(saved / WEIGHTS_NAME)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "integers"])
def test_weights_of_other_names_shapes_or_types_are_refused(saved: Path, change: str) -> None:
    tensors = load_file(saved / WEIGHTS_NAME)
    name = "adapters.transformer_blocks/0/attn1.q_proj.weight"
    if change == "unknown":
        tensors["extra"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif change == "integers":
        tensors[name] = tensors[name].to(torch.int64)
    else:
        del tensors[name]
    save_file(tensors, saved / WEIGHTS_NAME)
    expected = {
        "missing": f"{name} is missing",
        "unknown": "extra is unknown",
        "shape": rf"{name}: shape \(8, 15\), expected \(8, 16\)",
        "integers": f"{name} is of torch.int64",
    }[change]
    with pytest.raises(AdapterError, match=expected + r".*\(1 differences\)"):
        AdapterSet.from_pretrained(saved)


# Which adapters to use --------------------------------------------------------------------------------------------------


def test_a_runs_own_adapters_come_before_the_shipped_ones(
    dit_base: DiTBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "DATA", tmp_path / "data")
    dit_base.name = "my-dit"
    own, shipped = tmp_path / "run" / "adapters" / "offset", tmp_path / "data" / "my-dit" / "adapters" / "offset"
    with pytest.raises(
        AdapterError, match=r"found no trained offset adapters for my-dit.*run/adapters/offset.*03_train_dit_adapters"
    ):
        attach.find_adapters(dit_base, tmp_path / "run", "offset")
    new(dit_base).save_pretrained(shipped)
    assert attach.find_adapters(dit_base, tmp_path / "run", "offset") == shipped
    new(dit_base).save_pretrained(own)
    assert attach.find_adapters(dit_base, tmp_path / "run", "offset") == own
    with pytest.raises(ValueError, match="got adapter kind 'lora'"):
        attach.find_adapters(dit_base, tmp_path / "run", "lora")


# A disk that refuses ----------------------------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fails", ["save_file", "write_text", "mkdir", "os.fsync", "os.replace", "last os.replace"])
@pytest.mark.parametrize("occupied", [False, True], ids=["new folder", "older adapters there"])
def test_a_full_disk_leaves_nothing_half_written(
    dit_base: DiTBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, occupied: bool
) -> None:
    folder = tmp_path / "place" / "adapters"
    folder.parent.mkdir()
    if occupied:
        new(dit_base, "offset").save_pretrained(folder)
    before, adapters = listing(folder.parent), new(dit_base, "modulated")
    with monkeypatch.context() as patch:
        if fails == "save_file":
            patch.setattr(storage, "save_file", full)
        elif fails in ("write_text", "mkdir"):
            patch.setattr(Path, fails, full)
        elif fails == "last os.replace":  # after older adapters have been set aside
            replace = os.replace
            patch.setattr(os, "replace", lambda one, other: full() if Path(other) == folder else replace(one, other))
        else:
            patch.setattr(os, fails.removeprefix("os."), full)
        with pytest.raises(WriteError, match=r"could not write .*No space left on device.*Nothing half-written"):
            adapters.save_pretrained(folder)
    assert listing(folder.parent) == before
    assert list(folder.parent.iterdir()) == ([folder] if occupied else [])
    adapters.save_pretrained(folder)  # and once there is room, it works
    assert AdapterSet.from_pretrained(folder).config.kind == "modulated"


def test_a_place_that_cannot_hold_a_folder_is_named(dit_base: DiTBase, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(WriteError, match=r"could not write .*file/adapters"):
        new(dit_base).save_pretrained(tmp_path / "file" / "adapters")
    assert listing(tmp_path) == {"file": b"keep me"}


# On the right base model --------------------------------------------------------------------------------------------


def test_agd_on_another_copy_of_the_base_is_refused(dit_folder: Path, dit_base: DiTBase) -> None:
    """It would run, unguided, and look like AGD."""
    adapters, other = new(dit_base).attach(dit_base), load_base(dit_folder)
    with pytest.raises(AdapterError, match=r"on another copy of a base model .* call attach\(base\) first"):
        next(sample(other, other.encode([1]), AGD(adapters, 4.0), 2, seeds=[0]))
    adapters.remove()
    with pytest.raises(AdapterError, match="on no base model"):
        next(sample(dit_base, dit_base.encode([1]), AGD(adapters, 4.0), 2, seeds=[0]))


def test_a_base_with_adapters_on_can_be_freed(dit_folder: Path) -> None:
    base = load_base(dit_folder)
    denoiser = weakref.ref(base.denoiser)
    new(base).attach(base)
    del base
    gc.collect()
    assert denoiser() is None


def test_the_scale_is_not_rounded_to_the_models_dtype(dit_folder: Path) -> None:
    base = load_base(dit_folder, dtype=torch.bfloat16)
    adapters, seen = new(base, "modulated").attach(base), []
    original = base.adapter_inputs
    base.adapter_inputs = lambda *args: seen.append(args[2]) or original(*args)  # type: ignore[method-assign]
    next(sample(base, base.encode([1]), AGD(adapters, 4.01), 2, seeds=[0]))
    assert seen[0].dtype == torch.float32 and seen[0].flatten().tolist() == pytest.approx([4.01] * 2, rel=1e-6)


def test_blocks_that_share_an_embedder_cannot_be_shifted_one_by_one(dit_folder: Path) -> None:
    base = load_base(dit_folder)
    parameters = base.num_parameters()
    blocks = base.denoiser.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb
    assert base.num_parameters() == parameters
    with pytest.raises(AdapterError, match="share one embedder"):
        new(base, "modulated").attach(base)
    new(base, "offset").attach(base).remove()
