"""The adapters: plain modules that add a correction to a layer's output. They know nothing of diffusers.

An adapter works in two halves. :meth:`Adapter.condition` turns what a whole forward pass shares (guidance scale,
timestep, class or prompt) into whatever the layer needs; :meth:`Adapter.forward` applies it to the layer's tokens. The
first half does not depend on the latents, so it can be computed ahead, for many steps of a sampler in one go: that is
the dimension T that the shapes below may have in front. Every adapter starts as the identity: its last projection is
zero, so an untrained adapter changes nothing, to the bit.

:class:`OffsetAdapter` and :class:`CrossAttentionAdapter` are the paper's (section 4), tensor-compatible with the
authors' code; :class:`ModulatedAdapter` is an extension of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterInputs:
    """What an adapter may look at, besides the tokens of its layer: of one forward pass, or of the passes of T steps.

    Attributes:
        guidance_scale: (B,), or (T, B).
        timestep_embedding: (B, timestep_dim), or (T, 1, timestep_dim); the base model's own.
        class_embedding: (B, class_dim), the base model's own label embedding; None without classes.
        noise_level: (B,), or (T, 1): the timestep as a share of the training timesteps, from 0 (clean) to 1.
        prompt_embeddings: (B, L, prompt_dim), the text encoder's tokens; None without prompts.
        negative_embeddings: (B, L, negative_dim), those of the negative prompts; None without.
        code: (B, d), or (T, B, d): the :class:`SharedCode` z of the above; None for kinds that make their own.
        shift_code: (w - 1) z, in the shape of ``code``.
        token_shift_code: (w - 1) z of each prompt token, (B, L, d), or (T, B, L, d); None without prompts.
    """

    guidance_scale: Tensor
    timestep_embedding: Tensor
    noise_level: Tensor
    class_embedding: Tensor | None = None
    prompt_embeddings: Tensor | None = None
    negative_embeddings: Tensor | None = None
    code: Tensor | None = None
    shift_code: Tensor | None = None
    token_shift_code: Tensor | None = None

    def to(self, dtype: torch.dtype) -> AdapterInputs:
        """With embeddings of another dtype; scale and noise level keep theirs (bfloat16 would round 4.01 to 4)."""
        given = {
            name: value
            for name, value in vars(self).items()
            if name not in ("guidance_scale", "noise_level") and value is not None
        }
        return replace(self, **{name: value.to(dtype) for name, value in given.items()})


@dataclass(frozen=True)
class AdapterSizes:
    """Sizes shared by all adapters of a set.

    Attributes:
        hidden_size: d, the adapter's inner width.
        timestep_dim, class_dim, prompt_dim, negative_dim: widths of the base model's embeddings, the last of those of
            negative prompts (not in the paper); None leaves that input out.
        scale_multiplier: factor on the guidance scale before its Fourier features. 1 keeps nearby scales alike; the
            authors' offset adapter uses 1,000, which turns the features into a hash of the scale.
        noise_ranges: equal ranges of noise levels for which a :class:`ModulatedAdapter` has hidden units of their own.
    """

    hidden_size: int
    timestep_dim: int | None = None
    class_dim: int | None = None
    prompt_dim: int | None = None
    scale_multiplier: float = 1.0
    noise_ranges: int = 1
    negative_dim: int | None = None


class ScalarEncoding(nn.Module):
    """Random Fourier features of a scalar, a two-layer network and a layer norm: (..., B) -> (..., B, d).

    ``cos(2 pi (f s + phi))`` with f ~ N(0, 1) and phi ~ U[0, 1) fixed at the start. (...) are none or some dimensions in front.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, size: int, inner_norm: bool) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(size))
        self.register_buffer("phases", torch.rand(size))
        self.mlp = _mlp(size, 4 * size, size, inner_norm)
        self.norm = nn.LayerNorm(size)

    def forward(self, scalar: Tensor) -> Tensor:
        angles = 2 * math.pi * (self.frequencies * scalar[..., None].float() + self.phases)  # (..., B, d)
        return self.norm(self.mlp(torch.cos(angles).to(self.norm.weight.dtype)))


def _mlp(inputs: int, hidden: int, outputs: int, inner_norm: bool) -> nn.Sequential:
    """Linear, ReLU, (LayerNorm,) Linear, with Xavier weights of gain sqrt(2) and zero biases."""
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ReLU()]
    if inner_norm:
        layers.append(nn.LayerNorm(hidden))
    layers.append(nn.Linear(hidden, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Adapter(nn.Module):
    """Base class of the adapters.

    Args:
        channels: C, the width of the attention layer (and of the block) that it is added to.
        sizes: see :class:`AdapterSizes`.

    Attributes:
        layer: what it is added to: the output of ``"attention"`` (the paper) or of ``"feed_forward"`` of the same block; or
            ``"timestep"``, what a residual block is told of it.
        shares_code: whether the adapters of a set share one :class:`SharedCode`.
    """

    layer = "attention"
    shares_code = False

    def __init__(self, channels: int, sizes: AdapterSizes) -> None:
        super().__init__()
        self.channels = channels
        self.sizes = sizes

    def condition(self, inputs: AdapterInputs, constant: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """The half that depends on (guidance scale, timestep, class or prompt) alone.

        Args:
            constant: :meth:`constant` of another step of the same samples with the same weights: not computed again.

        Returns:
            Tensors with the batch as first dimension; if ``inputs`` are of T steps, with (T, B) as the first two.
        """
        raise NotImplementedError

    def constant(self, condition: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What of a :meth:`condition`, of one forward pass, is the same at every step and scale: tensors (B, L, ...) of what
        comes from the prompt, or nothing."""
        return ()

    def forward(self, hidden_states: Tensor, output: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        """
        Args:
            hidden_states: (B, N, C), the layer's input tokens. output: (B, N, C), the layer's output.
            condition: what :meth:`condition` returned, of one forward pass.

        Returns:
            (B, N, C), the output with the correction added, in the output's dtype.
        """
        raise NotImplementedError


class OffsetAdapter(Adapter):
    """The paper's offset adapter (DiT default): one vector per sample, added to every token.

    Sum of the encodings of scale, timestep and class (or the mean prompt token) -> Linear, ReLU, LayerNorm, Linear.
    """

    def __init__(self, channels: int, sizes: AdapterSizes) -> None:
        super().__init__(channels, sizes)
        d = sizes.hidden_size
        self.guidance_scale_encoding = ScalarEncoding(d, inner_norm=True)
        self.timestep_proj = nn.Linear(sizes.timestep_dim, d) if sizes.timestep_dim else None
        self.class_proj = nn.Linear(sizes.class_dim, d) if sizes.class_dim else None
        self.prompt_proj = nn.Linear(sizes.prompt_dim, d) if sizes.prompt_dim else None
        self.negative_proj = nn.Linear(sizes.negative_dim, d) if sizes.negative_dim else None
        self.out_proj = _mlp(d, d, channels, inner_norm=True)
        nn.init.zeros_(self.out_proj[-1].weight)  # type: ignore[arg-type]

    def condition(self, inputs: AdapterInputs, constant: tuple[Tensor, ...] = ()) -> tuple[Tensor]:
        code = self.guidance_scale_encoding(inputs.guidance_scale * self.sizes.scale_multiplier)  # (..., B, d)
        if self.timestep_proj is not None:
            code = code + self.timestep_proj(inputs.timestep_embedding)
        if self.class_proj is not None and inputs.class_embedding is not None:
            code = code + self.class_proj(inputs.class_embedding)
        if self.prompt_proj is not None and inputs.prompt_embeddings is not None:
            code = code + self.prompt_proj(inputs.prompt_embeddings.mean(dim=1))
        if self.negative_proj is not None and inputs.negative_embeddings is not None:
            code = code + self.negative_proj(inputs.negative_embeddings.mean(dim=1))
        return (self.out_proj(code)[..., None, :],)  # (..., B, 1, C)

    def forward(self, hidden_states: Tensor, output: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        (offset,) = condition
        return output + offset.to(output.dtype)


class CrossAttentionAdapter(Adapter):
    """The paper's cross-attention adapter (UNet default): the tokens attend to [scale, timestep, class | prompt].

    One head, no bias on queries, keys and values, scale d^-0.5, sinusoidal positions on the condition tokens.

    Raises:
        ValueError: if ``hidden_size`` is odd.
    """

    MAX_TOKENS = 250
    positions: Tensor

    def __init__(self, channels: int, sizes: AdapterSizes) -> None:
        super().__init__(channels, sizes)
        d = sizes.hidden_size
        if d % 2:
            raise ValueError(f"got hidden_size {d}, expected an even number (half sines, half cosines)")
        self.guidance_scale_encoding = ScalarEncoding(d, inner_norm=False)
        self.timestep_proj = nn.Linear(sizes.timestep_dim, d) if sizes.timestep_dim else None
        self.class_proj = nn.Linear(sizes.class_dim, d) if sizes.class_dim else None
        self.prompt_proj = nn.Linear(sizes.prompt_dim, d) if sizes.prompt_dim else None
        self.negative_proj = nn.Linear(sizes.negative_dim, d) if sizes.negative_dim else None
        self.q_proj = nn.Linear(channels, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, channels)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        wavelengths = torch.exp(-math.log(10_000) * torch.arange(0, d, 2).float() / d)  # (d / 2,)
        angles = torch.arange(self.MAX_TOKENS)[:, None] * wavelengths  # (250, d / 2)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=-1))  # (250, d)

    def condition(self, inputs: AdapterInputs, constant: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Keys beside values, (..., B, tokens, 2 d): of scale, timestep and class; and of the prompts, if they see any.

        The prompts' do not depend on the step: those of T steps are one and the same.
        """
        scale = self.guidance_scale_encoding(inputs.guidance_scale * self.sizes.scale_multiplier)  # (..., B, d)
        tokens = [scale]
        if self.timestep_proj is not None:
            tokens.append(self.timestep_proj(inputs.timestep_embedding).expand_as(scale))
        if self.class_proj is not None and inputs.class_embedding is not None:
            tokens.append(self.class_proj(inputs.class_embedding).expand_as(scale))
        own = self._keys_and_values(torch.stack(tokens, dim=-2), first=0)
        if constant:
            return own, constant[0].expand(*own.shape[:-2], *constant[0].shape[-2:])
        seen = []  # each (B, L, d)
        if self.prompt_proj is not None and inputs.prompt_embeddings is not None:
            seen.append(self.prompt_proj(inputs.prompt_embeddings))
        if self.negative_proj is not None and inputs.negative_embeddings is not None:
            seen.append(self.negative_proj(inputs.negative_embeddings))
        if not seen:
            return (own,)
        prompts = self._keys_and_values(torch.cat(seen, dim=1), first=len(tokens))  # (B, L or 2 L, 2 d)
        return own, prompts.expand(*own.shape[:-2], *prompts.shape[-2:])

    def constant(self, condition: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The prompts' keys and values, (B, L or 2 L, 2 d), if there are any."""
        return condition[1:]

    def _keys_and_values(self, tokens: Tensor, first: int) -> Tensor:
        """Of tokens (..., S, d) at the positions from ``first`` on: (..., S, 2 d)."""
        end = first + tokens.shape[-2]
        if end > self.MAX_TOKENS:
            raise ValueError(f"got {end} condition tokens, expected at most {self.MAX_TOKENS}")
        tokens = tokens + self.positions[first:end]
        return torch.cat([self.k_proj(tokens), self.v_proj(tokens)], dim=-1)

    def forward(self, hidden_states: Tensor, output: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        sequence = torch.cat(condition, dim=-2) if len(condition) > 1 else condition[0]
        keys, values = sequence.chunk(2, dim=-1)  # each (B, S, d)
        queries = self.q_proj(hidden_states.to(keys.dtype))
        attended = F.scaled_dot_product_attention(queries, keys, values)  # (B, N, d)
        return output + self.out_proj(attended).to(output.dtype)


class SharedCode(nn.Module):
    """One code of (scale, timestep, class or prompt) for all adapters of a set: z, (..., B, d).

    The code of a whole prompt sees the mean of its tokens, the code of a token sees that token; both see the mean of the
    negative prompt's tokens, in sets that are told one. The paper's adapters each have a network of their own for this,
    with most of their parameters; the inputs are the same everywhere, so an extension's adapters share one.
    """

    def __init__(self, sizes: AdapterSizes) -> None:
        super().__init__()
        d = sizes.hidden_size
        self.guidance_scale_proj = nn.Linear(2, d)
        self.timestep_proj = nn.Linear(sizes.timestep_dim, d) if sizes.timestep_dim else None
        self.class_proj = nn.Linear(sizes.class_dim, d) if sizes.class_dim else None
        self.prompt_proj = nn.Linear(sizes.prompt_dim, d) if sizes.prompt_dim else None
        self.negative_proj = nn.Linear(sizes.negative_dim, d) if sizes.negative_dim else None

    def forward(self, inputs: AdapterInputs) -> AdapterInputs:
        """The inputs with their codes: of the whole condition; and, times w - 1, those that shifts are linear in."""
        w = inputs.guidance_scale
        features = torch.stack([w / 4, torch.log1p(w)], dim=-1)  # (..., B, 2)
        code = self.guidance_scale_proj(features.to(self.guidance_scale_proj.weight.dtype))
        if self.timestep_proj is not None:
            code = code + self.timestep_proj(inputs.timestep_embedding)
        if self.class_proj is not None and inputs.class_embedding is not None:
            code = code + self.class_proj(inputs.class_embedding)
        if self.negative_proj is not None and inputs.negative_embeddings is not None:
            code = code + self.negative_proj(inputs.negative_embeddings.mean(dim=1))
        beyond_one = (w - 1).to(code.dtype)[..., None]  # (..., B, 1)
        token_shift_code = None
        if self.prompt_proj is not None and inputs.prompt_embeddings is not None:
            tokens = self.prompt_proj(inputs.prompt_embeddings)  # (B, L, d)
            token_shift_code = beyond_one[..., None] * F.silu(code[..., None, :] + tokens)  # (..., B, L, d)
            code = code + tokens.mean(dim=1)
        code = F.silu(code)
        return replace(inputs, code=code, shift_code=beyond_one * code, token_shift_code=token_shift_code)


class Modulation(NamedTuple):
    """What a :class:`ModulatedAdapter` needs of a forward pass (of T passes: with T in front).

    Attributes:
        gain, shift: (B, 1, R d), of the hidden units. strength: (B, 1, R d), of what they add; zero at scale 1, and
            zero for the units of other noise levels.
        shift_code: (B, d), what the shift of the block's own embedding is linear in, or (B, L, d), what the shifts of
            the prompt tokens are; zero at scale 1.
    """

    gain: Tensor
    shift: Tensor
    strength: Tensor
    shift_code: Tensor


class ModulatedAdapter(Adapter):
    """Extension (not the paper's): moves the embedding that modulates a block, and corrects the block's tokens.

    1. A transformer block is told the timestep and the class by an embedding (adaLN). The unconditional pass of CFG
       differs from the conditional one in this embedding alone, so the adapter shifts it, by S (w - 1) z. The blocks of
       a text-to-image UNet are told the prompt by its tokens: there every token is shifted, by S (w - 1) z of its own.
       (The same shift for all tokens would move all attention scores alike, which softmax does not notice.) A UNet has
       residual blocks besides, which are told the timestep: a :class:`TimestepShift` moves that.
    2. A low-rank network on every token, beside the block's feed-forward layer: ``U (gelu(D h * (1 + a) + b) * (w - 1)
       (1 + g))``. Its hidden units may be divided among R ranges of noise levels: those of other ranges are silent.
       What guidance adds where noise is high (the composition) and where it is low (the details) would otherwise be
       learned by the same units, and the training of each undoes the other.

    z is the set's :class:`SharedCode` and (a, b, g) are linear in it. Guidance adds ``(w - 1) (cond - uncond)`` to the
    conditional prediction, so the factor w - 1 is built in: at scale 1 the adapter is the identity whatever it has
    learned.
    """

    layer = "feed_forward"
    shares_code = True

    def __init__(self, channels: int, sizes: AdapterSizes) -> None:
        super().__init__(channels, sizes)
        d, units = sizes.hidden_size, sizes.noise_ranges * sizes.hidden_size
        self.modulation = nn.Linear(d, 3 * units)
        self.embedding_proj = nn.Linear(d, sizes.prompt_dim or channels, bias=False)
        self.down = nn.Linear(channels, units)
        self.up = nn.Linear(units, channels, bias=False)
        for last in (self.up, self.embedding_proj, self.modulation):
            nn.init.zeros_(last.weight)
        nn.init.zeros_(self.modulation.bias)

    def condition(self, inputs: AdapterInputs, constant: tuple[Tensor, ...] = ()) -> Modulation:
        assert inputs.code is not None
        shift_code = inputs.shift_code if self.sizes.prompt_dim is None else inputs.token_shift_code
        assert shift_code is not None
        gain, shift, gate = self.modulation(inputs.code)[..., None, :].chunk(3, dim=-1)
        beyond_one = (inputs.guidance_scale - 1).to(gate.dtype)[..., None, None]  # (..., B, 1, 1)
        strength = beyond_one * (1 + gate)
        if self.sizes.noise_ranges > 1:
            strength = strength * self._in_range(inputs.noise_level)[..., None, :]
        return Modulation(1 + gain, shift, strength, shift_code)

    def _in_range(self, noise_level: Tensor) -> Tensor:
        """1 for the hidden units of each noise level's own range, 0 for the others: (..., B) -> (..., B, R d)."""
        ranges = self.sizes.noise_ranges
        own = (noise_level * ranges).long().clamp(0, ranges - 1)
        return F.one_hot(own, ranges).repeat_interleave(self.sizes.hidden_size, dim=-1)

    def shifted(self, embedding: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        """The block's embedding (B, C), or its prompt tokens (B, L, prompt_dim), shifted: S (w - 1) z is added."""
        return _plus_linear(embedding, Modulation(*condition).shift_code, self.embedding_proj.weight)

    def forward(self, hidden_states: Tensor, output: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        gain, shift, strength, _ = condition
        features = torch.addcmul(shift, self.down(hidden_states.to(gain.dtype)), gain)
        return _plus_linear(output, F.gelu(features) * strength, self.up.weight)


class TimestepShift(Adapter):
    """Extension, beside a :class:`ModulatedAdapter`: shifts what a residual block of a UNet is told of the timestep.

    A residual block adds a projection of the timestep's embedding to each of its channels. Here S (w - 1) z is added to
    it, with the set's :class:`SharedCode` z: one vector a step and image, and as with the others none at scale 1.

    Args:
        channels: C, the width of the projection.
    """

    layer = "timestep"
    shares_code = True

    def __init__(self, channels: int, sizes: AdapterSizes) -> None:
        super().__init__(channels, sizes)
        self.projection = nn.Linear(sizes.hidden_size, channels, bias=False)
        nn.init.zeros_(self.projection.weight)

    def condition(self, inputs: AdapterInputs, constant: tuple[Tensor, ...] = ()) -> tuple[Tensor]:
        assert inputs.shift_code is not None
        return (self.projection(inputs.shift_code),)  # (..., B, C)

    def forward(self, hidden_states: Tensor, output: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        """``output`` (B, C) is the projection of the timestep's embedding; ``hidden_states``, the embedding, is not read."""
        (shift,) = condition
        return output + shift.to(output.dtype)


def _plus_linear(output: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """``output + inputs @ weight.T`` in one operation, computed in the weight's dtype, in the dtype of ``output``."""
    rows = output.to(weight.dtype).flatten(0, -2)
    return torch.addmm(rows, inputs.flatten(0, -2), weight.t()).view(output.shape).to(output.dtype)


ADAPTERS: dict[str, type[Adapter]] = {
    "offset": OffsetAdapter,
    "cross-attention": CrossAttentionAdapter,
    "modulated": ModulatedAdapter,
}
"""The adapter kinds by name. ``modulated`` is an extension; the other two are the paper's."""
