"""The adapters against a second implementation, written here in loops from the paper's description."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import randomise
from torch import Tensor

from agd_lib.adapters import ADAPTERS, Adapter, AdapterInputs, AdapterSizes, SharedCode

B, N, C, D, T, K, P, L = (
    3,
    6,
    10,
    8,
    12,
    14,
    9,
    5,
)  # batch, tokens, widths of layer, adapter, time, class, prompt; tokens

INPUT_SETS = [
    pytest.param((), id="scale alone"),
    pytest.param(("timestep",), id="scale, timestep"),
    pytest.param(("timestep", "class"), id="scale, timestep, class"),
    pytest.param(("timestep", "prompt"), id="scale, timestep, prompt"),
]


def make_inputs(seed: int = 0) -> AdapterInputs:
    generator = torch.Generator().manual_seed(seed)
    return AdapterInputs(
        guidance_scale=1 + 5 * torch.rand(B, generator=generator),
        noise_level=torch.tensor([0.2, 0.5, 0.7]),
        timestep_embedding=torch.randn(B, T, generator=generator),
        class_embedding=torch.randn(B, K, generator=generator),
        prompt_embeddings=torch.randn(B, L, P, generator=generator),
    )


def make_adapter(kind: str, seen: tuple[str, ...], scale_multiplier: float = 1.0, noise_ranges: int = 1) -> Adapter:
    sizes = AdapterSizes(
        hidden_size=D,
        timestep_dim=T if "timestep" in seen else None,
        class_dim=K if "class" in seen else None,
        prompt_dim=P if "prompt" in seen else None,
        scale_multiplier=scale_multiplier,
        noise_ranges=noise_ranges,
    )
    adapter = ADAPTERS[kind](C, sizes)
    if adapter.shares_code:
        adapter.shared = SharedCode(sizes)  # as a set of one adapter has it
    randomise(adapter, 3)
    return adapter


def condition_of(adapter: Adapter, inputs: AdapterInputs) -> Any:
    return adapter.condition(adapter.shared(inputs) if adapter.shares_code else inputs)


def run(adapter: Adapter, hidden_states: Tensor, inputs: AdapterInputs) -> Tensor:
    with torch.no_grad():
        return adapter(hidden_states, hidden_states * 0, condition_of(adapter, inputs))


def shift_of(adapter: Adapter, inputs: AdapterInputs) -> Tensor:
    """What a modulated adapter adds to the block's embedding, (B, C), or to the prompt's tokens, (B, L, P)."""
    condition = condition_of(adapter, inputs)
    told = torch.zeros(B, L, P) if adapter.shared.prompt_proj is not None else torch.zeros(B, C)
    shifted: Tensor = adapter.shifted(told, condition)
    return shifted


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed))


# The second implementation: one sample at a time, plain arithmetic on the named weights -----------------------------------


def affine(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    result = torch.einsum("oi,i->o", weights[f"{name}.weight"], x)
    return result + weights[f"{name}.bias"] if f"{name}.bias" in weights else result


def layer_norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + 1e-5) ** 0.5 * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def scale_code(weights: dict[str, Tensor], scale: float, inner_norm: bool) -> Tensor:
    prefix = "guidance_scale_encoding"
    features = torch.tensor(
        [
            math.cos(2 * math.pi * (f * scale + phase))
            for f, phase in zip(weights[f"{prefix}.frequencies"].tolist(), weights[f"{prefix}.phases"].tolist())
        ],
        dtype=torch.float64,
    )
    hidden = affine(weights, f"{prefix}.mlp.0", features).clamp(min=0)
    if inner_norm:
        hidden = affine(weights, f"{prefix}.mlp.3", layer_norm(weights, f"{prefix}.mlp.2", hidden))
    else:
        hidden = affine(weights, f"{prefix}.mlp.2", hidden)
    return layer_norm(weights, f"{prefix}.norm", hidden)


def double(adapter: Adapter) -> dict[str, Tensor]:
    return {name: value.double() for name, value in adapter.state_dict().items()}


def offset_by_hand(adapter: Adapter, seen: tuple[str, ...], inputs: AdapterInputs) -> Tensor:
    w, rows = double(adapter), []
    for i in range(B):
        code = scale_code(w, inputs.guidance_scale[i].item() * adapter.sizes.scale_multiplier, inner_norm=True)
        if "timestep" in seen:
            code = code + affine(w, "timestep_proj", inputs.timestep_embedding[i].double())
        if "class" in seen:
            code = code + affine(w, "class_proj", inputs.class_embedding[i].double())  # type: ignore[index]
        if "prompt" in seen:
            mean = sum(inputs.prompt_embeddings[i, j].double() for j in range(L)) / L  # type: ignore[index]
            code = code + affine(w, "prompt_proj", mean)
        hidden = layer_norm(w, "out_proj.2", affine(w, "out_proj.0", code).clamp(min=0))
        rows.append(affine(w, "out_proj.3", hidden))
    return torch.stack(rows)[:, None].expand(B, N, C)


def cross_attention_by_hand(
    adapter: Adapter, seen: tuple[str, ...], inputs: AdapterInputs, hidden_states: Tensor
) -> Tensor:
    w, result = double(adapter), torch.zeros(B, N, C, dtype=torch.float64)
    for i in range(B):
        sequence = [scale_code(w, inputs.guidance_scale[i].item(), inner_norm=False)]
        if "timestep" in seen:
            sequence.append(affine(w, "timestep_proj", inputs.timestep_embedding[i].double()))
        if "class" in seen:
            sequence.append(affine(w, "class_proj", inputs.class_embedding[i].double()))  # type: ignore[index]
        if "prompt" in seen:
            sequence += [affine(w, "prompt_proj", token.double()) for token in inputs.prompt_embeddings[i]]  # type: ignore[index]
        for position, token in enumerate(sequence):
            rates = [10_000 ** (-2 * j / D) for j in range(D // 2)]
            waves = [math.sin(position * r) for r in rates] + [math.cos(position * r) for r in rates]
            sequence[position] = token + torch.tensor(waves, dtype=torch.float64)
        keys = [affine(w, "k_proj", token) for token in sequence]
        values = [affine(w, "v_proj", token) for token in sequence]
        for n in range(N):
            query = affine(w, "q_proj", hidden_states[i, n].double())
            weights = [math.exp((query @ key).item() / math.sqrt(D)) for key in keys]
            attended = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
            result[i, n] = affine(w, "out_proj", attended)  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("seen", INPUT_SETS)
@pytest.mark.parametrize("scale_multiplier", [1.0, 10.0])
def test_offset_adapter_by_hand(seen: tuple[str, ...], scale_multiplier: float) -> None:
    adapter, inputs, hidden_states = make_adapter("offset", seen, scale_multiplier), make_inputs(), tokens()
    expected = offset_by_hand(adapter, seen, inputs)
    torch.testing.assert_close(run(adapter, hidden_states, inputs).double(), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


@pytest.mark.parametrize("seen", INPUT_SETS)
def test_cross_attention_adapter_by_hand(seen: tuple[str, ...]) -> None:
    adapter, inputs, hidden_states = make_adapter("cross-attention", seen), make_inputs(), tokens()
    expected = cross_attention_by_hand(adapter, seen, inputs, hidden_states)
    torch.testing.assert_close(run(adapter, hidden_states, inputs).double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("seen", INPUT_SETS)
@pytest.mark.parametrize("noise_ranges", [1, 2, 5])
def test_modulated_adapter_by_hand(seen: tuple[str, ...], noise_ranges: int) -> None:
    adapter, inputs, hidden_states = make_adapter("modulated", seen, noise_ranges=noise_ranges), make_inputs(), tokens()
    w = double(adapter)
    output, shifted = run(adapter, hidden_states, inputs), shift_of(adapter, inputs)
    for i in range(B):
        scale = inputs.guidance_scale[i].double()
        code = affine(w, "shared.guidance_scale_proj", torch.stack([scale / 4, (1 + scale).log()]))
        if "timestep" in seen:
            code = code + affine(w, "shared.timestep_proj", inputs.timestep_embedding[i].double())
        if "class" in seen:
            code = code + affine(w, "shared.class_proj", inputs.class_embedding[i].double())  # type: ignore[index]
        shifted_by = code[None]  # one row for the block's embedding, or one for each token of the prompt
        if "prompt" in seen:
            prompt = [inputs.prompt_embeddings[i, j].double() for j in range(L)]  # type: ignore[index]
            shifted_by = torch.stack([code + affine(w, "shared.prompt_proj", token) for token in prompt])
            code = code + affine(w, "shared.prompt_proj", sum(prompt) / L)
        code, shifted_by = code / (1 + torch.exp(-code)), shifted_by / (1 + torch.exp(-shifted_by))
        a, b, g = affine(w, "modulation", code).split(D * noise_ranges)
        own = {1: (0, 0, 0), 2: (0, 1, 1), 5: (1, 2, 3)}[noise_ranges][i]  # of the noise levels 0.2, 0.5, 0.7
        units = slice(own * D, (own + 1) * D)
        shift = torch.stack([(scale - 1) * affine(w, "embedding_proj", row) for row in shifted_by])
        assert shift.shape == ((L, P) if "prompt" in seen else (1, C))
        torch.testing.assert_close(shifted[i].double().reshape(shift.shape), shift, rtol=1e-4, atol=1e-4)
        for n in range(N):
            x = affine(w, "down", hidden_states[i, n].double()) * (1 + a) + b
            gelu = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            expected = w["up.weight"][:, units] @ (gelu * (scale - 1) * (1 + g))[units]
            torch.testing.assert_close(output[i, n].double(), expected, rtol=1e-4, atol=1e-4)


# What the adapters look at ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_input_matters_and_only_to_its_own_sample(kind: str) -> None:
    adapter, hidden_states = make_adapter(kind, ("timestep", "class", "prompt")), tokens()
    before = run(adapter, hidden_states, make_inputs())
    for name in ("guidance_scale", "timestep_embedding", "class_embedding", "prompt_embeddings"):
        values = vars(make_inputs()).copy()
        values[name] = values[name].clone()
        values[name][1] += 0.37
        after = run(adapter, hidden_states, AdapterInputs(**values))
        assert torch.equal(after[[0, 2]], before[[0, 2]]), name
        assert not torch.allclose(after[1], before[1], atol=1e-4), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_inputs_that_an_adapter_does_not_see_do_not_matter(kind: str) -> None:
    adapter, hidden_states = make_adapter(kind, ()), tokens()
    only_the_scale = AdapterInputs(make_inputs().guidance_scale, torch.zeros(B, T), torch.zeros(B))
    assert torch.equal(run(adapter, hidden_states, make_inputs()), run(adapter, hidden_states, only_the_scale))
    assert not any(part in name for name in adapter.state_dict() for part in ("timestep", "class", "prompt"))


def test_offset_is_one_vector_for_all_tokens_and_the_others_differ_by_token() -> None:
    for kind in ADAPTERS:
        output = run(make_adapter(kind, ("timestep",)), tokens(), make_inputs())
        assert torch.equal(output, output[:, :1].expand_as(output)) == (kind == "offset")


def test_modulated_adapter_is_the_identity_at_scale_one() -> None:
    """Guidance adds (w - 1) times something: at w = 1 nothing, whatever the adapter has learned."""
    adapter = make_adapter("modulated", ("timestep", "class"))
    inputs = make_inputs()
    at_one = AdapterInputs(torch.ones(B), inputs.timestep_embedding, inputs.noise_level, inputs.class_embedding)
    assert run(adapter, tokens(), at_one).abs().max() == 0
    assert shift_of(adapter, at_one).abs().max() == 0
    assert run(adapter, tokens(), inputs).abs().max() > 0.1
    assert shift_of(adapter, inputs).abs().max() > 0.1


# The start --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", INPUT_SETS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_new_adapter_adds_exactly_nothing_but_can_learn(kind: str, seen: tuple[str, ...]) -> None:
    adapter = ADAPTERS[kind](C, make_adapter(kind, seen).sizes)
    if adapter.shares_code:
        adapter.shared = SharedCode(adapter.sizes)
    before = tokens(2)
    output = adapter(tokens(), before, condition_of(adapter, make_inputs()))
    assert torch.equal(output, before)
    if kind == "modulated":
        assert shift_of(adapter, make_inputs()).abs().max() == 0
    (output.sum() - output[0, 0, 0]).backward()
    moving = [name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moving  # the zero layer itself gets a gradient


def test_a_noise_level_trains_the_units_of_its_own_range_alone() -> None:
    adapter = make_adapter("modulated", ("timestep",), noise_ranges=2)
    for level, own, other in (
        (0.499, slice(0, D), slice(D, None)),
        (0.5, slice(D, None), slice(0, D)),
        (1.0, slice(D, None), slice(0, D)),
    ):
        adapter.zero_grad()
        inputs = replace(make_inputs(), noise_level=torch.full((B,), level))
        adapter(tokens(), tokens(), condition_of(adapter, inputs)).sum().backward()
        assert adapter.up.weight.grad[:, own].abs().min() > 0 and adapter.down.weight.grad[own].abs().max() > 0
        assert adapter.up.weight.grad[:, other].abs().max() == 0 and adapter.down.weight.grad[other].abs().max() == 0


def test_the_boundary_of_two_ranges_does_not_depend_on_the_dtype() -> None:
    """In bfloat16 a noise level of 0.499 would be 0.5."""
    inputs = replace(make_inputs(), noise_level=torch.tensor([0.499, 0.5, 0.501])).to(torch.bfloat16)
    assert inputs.timestep_embedding.dtype == torch.bfloat16 and inputs.guidance_scale.dtype == torch.float32
    assert (inputs.noise_level * 2).long().tolist() == [0, 1, 1]


def test_initial_weights_follow_the_paper() -> None:
    """Fourier features: f ~ N(0, 1), phases ~ U[0, 1); Xavier weights of gain sqrt(2) in the networks."""
    torch.manual_seed(0)
    encoding = ADAPTERS["offset"](C, AdapterSizes(500)).guidance_scale_encoding
    assert encoding.frequencies.mean().abs() < 0.15 and abs(encoding.frequencies.std() - 1) < 0.15
    assert encoding.phases.min() >= 0 and encoding.phases.max() < 1 and abs(encoding.phases.mean() - 0.5) < 0.05
    first = encoding.mlp[0]
    assert first.weight.shape == (2000, 500) and first.bias.abs().max() == 0
    assert first.weight.std().item() == pytest.approx(math.sqrt(2) * math.sqrt(2 / 2500), rel=0.01)


def test_the_authors_factor_of_1000_turns_nearby_scales_into_strangers() -> None:
    """Codes of 4.000 and 4.001 are alike without the factor, and unrelated with it."""
    torch.manual_seed(0)
    similarity = {}
    for multiplier in (1.0, 1000.0):
        encoding = ADAPTERS["offset"](C, AdapterSizes(256)).guidance_scale_encoding
        codes = encoding(torch.tensor([4.000, 4.001]) * multiplier)
        similarity[multiplier] = torch.cosine_similarity(codes[0], codes[1], dim=0).item()
    assert similarity[1.0] > 0.99
    assert abs(similarity[1000.0]) < 0.3


# Bad sizes --------------------------------------------------------------------------------------------------------------


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="got hidden_size 7, expected an even number"):
        ADAPTERS["cross-attention"](C, AdapterSizes(7))


def test_too_long_a_prompt_is_refused() -> None:
    adapter = make_adapter("cross-attention", ("prompt",))
    prompt = AdapterInputs(torch.ones(1), torch.zeros(1, T), torch.zeros(1), prompt_embeddings=torch.zeros(1, 250, P))
    with pytest.raises(ValueError, match="got 251 condition tokens, expected at most 250"):
        adapter.condition(prompt)
