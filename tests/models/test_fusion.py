from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import shaken

from pipeline.models.blocks import Block, masked_mean
from pipeline.models.fusion import LEVELS, Fusion, Gate, Pyramid, Refiner, SequenceAttention, pyramid_weights
from pipeline.models.geometry import normalise

WIDTHS = {"fine": 12, "coarse": 20}


def fusion(**change: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "embed_dim": 32,
        "token_widths": WIDTHS,
        "width": 32,
        "refiner_layers": 2,
        "gate_hidden": 16,
    }
    return shaken(Fusion(**(arguments | change)).eval(), size=0.1)


def inputs(n: int = 5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    z = normalise(torch.randn(n, 32, generator=generator)).to(dtype)
    tokens = {"fine": torch.randn(n, 16, 12, generator=generator), "coarse": torch.randn(n, 4, 20, generator=generator)}
    return z, {name: value.to(dtype) for name, value in tokens.items()}


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 16, 49])
def test_pyramid_of_a_full_sequence_is_adaptive_average_pooling(length: int) -> None:
    x = torch.randn(2, length, 6, dtype=torch.float64)
    pooled = pyramid_weights(torch.tensor([length]), length).double() @ x
    expected = torch.cat([F.adaptive_avg_pool1d(x.transpose(1, 2), k).transpose(1, 2) for k in LEVELS], 1)
    assert torch.allclose(pooled, expected, atol=1e-6)


def test_masked_pyramid_pools_each_captions_own_tokens_and_no_bin_is_empty() -> None:
    generator = np.random.default_rng(0)
    lengths = [3, 1, 9, 6]
    x = generator.normal(size=(4, 9, 5))
    got = (pyramid_weights(torch.tensor(lengths), 9).double() @ torch.tensor(x)).numpy()
    assert got.shape == (4, 15, 5)
    for row, n in enumerate(lengths):
        expected = []
        for k in LEVELS:
            for i in range(k):
                inside = [j for j in range(n) if math.floor(i * n / k) <= j < math.ceil((i + 1) * n / k)]
                assert inside
                expected.append(x[row, inside].mean(0))
        assert np.allclose(got[row], expected, atol=1e-6)


def test_pyramid_bins_carry_embeddings_of_their_own() -> None:
    pyramid = Pyramid(8)
    constant = torch.ones(1, 10, 8)
    out = pyramid(constant)
    assert torch.allclose(out - pyramid.place, torch.ones(1, 15, 8), atol=1e-6)
    assert out[0].unique(dim=0).shape[0] == 15


def test_sequence_attention_is_cbam_written_out() -> None:
    torch.manual_seed(0)
    attention = shaken(SequenceAttention(16), size=0.3).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    got = attention(x).detach().numpy()
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    w1, b1 = (p.detach().numpy() for p in attention.channel[0].parameters())
    w2, b2 = (p.detach().numpy() for p in attention.channel[2].parameters())
    kernel, bias = (p.detach().numpy() for p in attention.token.parameters())
    for row in range(2):
        a = x[row].numpy()
        mlp = lambda v: np.maximum(v @ w1.T + b1, 0) @ w2.T + b2  # noqa: E731
        a = a * sigmoid(mlp(a.mean(0)) + mlp(a.max(0)))
        seen = np.pad(np.stack([a.mean(1), a.max(1)]), ((0, 0), (3, 3)))
        token = np.array([(kernel[0] * seen[:, j : j + 7]).sum() + bias[0] for j in range(9)])
        assert np.allclose(got[row], a * sigmoid(token)[:, None])


def test_the_token_attention_reaches_the_refiner_although_it_only_scales_tokens() -> None:
    # A norm behind the attention would undo it: then its parameters would never learn.
    module = fusion()
    z, tokens = inputs()
    module.delta(z, tokens).square().sum().backward()
    gradient = module.attention.token.weight.grad
    assert gradient.abs().max() > 1e-6


def test_a_block_asked_for_its_first_row_computes_that_row() -> None:
    torch.manual_seed(0)
    block = shaken(Block(32)).double()
    x, keep = torch.randn(3, 7, 32, dtype=torch.float64), torch.arange(7) < torch.tensor([[7], [4], [2]])
    for mask in (None, keep):
        assert torch.allclose(block(x, mask, rows=1), block(x, mask)[:, :1], atol=1e-12)


def test_a_block_is_torchs_pre_norm_encoder_layer() -> None:
    torch.manual_seed(0)
    block = shaken(Block(64)).double().eval()
    layer = torch.nn.TransformerEncoderLayer(
        64, 1, dim_feedforward=256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    layer = layer.double().eval()
    layer.self_attn.in_proj_weight.data = torch.cat([block.query.weight, block.key_value.weight])
    layer.self_attn.in_proj_bias.data = torch.cat([block.query.bias, block.key_value.bias])
    pairs: list[Any] = [
        (layer.self_attn.out_proj, block.project),
        (layer.linear1, block.mlp[0]),
        (layer.linear2, block.mlp[2]),
    ]
    pairs += [(layer.norm1, block.norm_attention), (layer.norm2, block.norm_mlp)]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    x, keep = torch.randn(2, 6, 64, dtype=torch.float64), torch.arange(6) < torch.tensor([[6], [4]])
    reference = layer(x, src_key_padding_mask=~keep)
    assert torch.allclose(block(x, keep)[keep], reference[keep], atol=1e-10)


def test_the_refiner_is_asked_by_the_trunk_embedding() -> None:
    torch.manual_seed(0)
    refiner = shaken(Refiner(32, 32, 2))
    z, _ = inputs(2)
    x = torch.randn(1, 6, 32).expand(2, -1, -1)
    u = refiner(z, x)
    assert u.shape == (2, 32)
    assert (u[0] - u[1]).abs().max() > 1e-3  # the same tokens, another question


def test_gate_lies_strictly_between_zero_and_one_for_each_sample_and_channel() -> None:
    torch.manual_seed(0)
    gate = shaken(Gate(32, 16), size=0.2)
    z, _ = inputs(50)
    g = gate(z, normalise(torch.randn(50, 32)))
    assert g.min() > 0
    assert g.max() < 1
    assert g.std(0).min() > 1e-4
    assert g.std(1).min() > 1e-4


def test_gate_is_the_mlp_of_z_delta_and_their_product() -> None:
    torch.manual_seed(0)
    gate = Gate(4, 3).double()
    z, d = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    parts = torch.cat([2 * z, 2 * d, 4 * z * d], 1)  # √D = 2, and D for the product
    assert torch.allclose(gate(z, d), torch.sigmoid(gate.mlp(parts)))


def test_output_follows_from_its_own_side() -> None:
    module = fusion()
    with torch.no_grad():
        module.gamma.fill_(0.7)
    z, tokens = inputs()
    v, side = module(z, tokens)
    moved = side.gate * side.delta
    along = moved - (moved * z).sum(1, keepdim=True) * z
    expected = F.normalize(z + 0.7 * along, dim=1)
    assert torch.allclose(side.tangent, along, atol=1e-6)
    assert torch.allclose(v, expected, atol=1e-6)
    assert torch.allclose(v.norm(dim=1), torch.ones(5), atol=1e-6)
    assert (side.tangent * z).sum(1).abs().max() < 1e-6
    assert torch.equal(side.gate, module.gate_on(z, side.delta))


def test_injections_start_with_a_length_of_about_one() -> None:
    torch.manual_seed(0)
    module = Fusion(embed_dim=512, token_widths=WIDTHS, width=192, refiner_layers=1, gate_hidden=16)
    z = normalise(torch.randn(20, 512))
    lengths = module.delta(z, inputs(20)[1]).norm(dim=1)
    assert 0.8 < lengths.mean() < 1.25


def test_padding_changes_nothing_of_a_captions_injection() -> None:
    module = fusion(token_widths={"text": 12})
    with torch.no_grad():
        module.gamma.fill_(0.5)
    z, _ = inputs(3)
    tokens = torch.randn(3, 10, 12)
    keep = torch.arange(10) < torch.tensor([[3], [10], [1]])
    other = torch.where(keep.unsqueeze(-1), tokens, 50 * torch.randn(3, 10, 12))
    v = module(z, {"text": tokens}, keep)[0]
    assert torch.equal(v, module(z, {"text": other}, keep)[0])
    alone = module(z[:1], {"text": tokens[:1, :3]}, keep[:1, :3])[0]
    assert torch.allclose(v[:1], alone, atol=1e-6)


def names(module: Any) -> set[str]:
    return {name.split(".")[0] for name, _ in module.named_parameters()}


@pytest.mark.parametrize("part", ["pyramid", "attention", "refiner", "gate"])
def test_an_ablation_takes_away_its_part_and_no_other(part: str) -> None:
    assert names(fusion()) - names(fusion(**{part: False})) == {part}
    assert names(fusion(**{part: False})) <= names(fusion())


def test_without_refiner_the_sequence_mean_stands_in_and_z_asks_nothing() -> None:
    module = fusion(refiner=False, attention=False, pyramid=False)
    z, tokens = inputs()
    sequence = torch.cat([module.project[name](tokens[name]) for name in WIDTHS], 1)
    u = module.norm_out(module.norm(sequence).mean(1))
    assert torch.allclose(module.delta(z, tokens), u @ module.inject.weight.T, atol=1e-6)
    assert torch.equal(module.delta(z, tokens), module.delta(-z, tokens))


def test_without_pyramid_the_sequence_is_the_tokens_alone() -> None:
    _, tokens = inputs()
    assert fusion(pyramid=False)._sequence(tokens, None)[0].shape == (5, 20, 32)
    assert fusion()._sequence(tokens, None)[0].shape == (5, 20 + 2 * 15, 32)


def test_without_gate_every_channel_is_open() -> None:
    module = fusion(gate=False)
    with torch.no_grad():
        module.gamma.fill_(0.5)
    z, tokens = inputs()
    v, side = module(z, tokens)
    assert torch.equal(side.gate, torch.ones(5, 32))
    assert torch.equal(v, module.opened(z, side.delta))
    assert not torch.equal(v, z)


def test_at_gamma_zero_only_gamma_learns_from_the_output() -> None:
    module = fusion()
    z, tokens = inputs()
    (module(z, tokens)[0] * torch.randn(5, 32)).sum().backward()
    moved = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"gamma"}


@pytest.mark.parametrize("layers", [1, 2])
def test_at_another_gamma_every_parameter_learns(layers: int) -> None:
    module = fusion(refiner_layers=layers).double()
    with torch.no_grad():
        module.gamma.fill_(0.4)
    z, tokens = inputs(dtype=torch.float64)
    (module(z, tokens)[0] * torch.randn(5, 32)).sum().backward()
    still = {name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert still == set()


def test_masked_mean_of_nothing_masked_is_the_mean() -> None:
    x = torch.randn(2, 5, 3)
    assert torch.allclose(masked_mean(x, torch.ones(2, 5, dtype=torch.bool)), masked_mean(x, None), atol=1e-6)
