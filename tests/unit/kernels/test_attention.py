"""The tiles' attention against float64, beside torch's own bf16 attention; and which attention is theirs."""

from __future__ import annotations

import pytest
import torch
from ds_kernels.attention import attention_library, causal_attention, takes
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from unit.models.test_loss import tiny

from ds_train.models import cpu_attention

pytestmark = pytest.mark.skipif(
    isinstance(attention_library(), Exception), reason="no AVX512_BF16, or no compiler, on this machine"
)

SHAPES = [  # samples, heads, heads of the keys, positions, width
    (2, 4, 2, 37, 16), (1, 2, 1, 130, 64), (2, 2, 2, 64, 32), (3, 1, 1, 1, 16), (1, 4, 4, 200, 80), (1, 2, 2, 515, 256),
]  # fmt: skip


def states(samples: int, heads: int, key_heads: int, positions: int, width: int) -> list[Tensor]:
    """Queries, keys, values as a model has them: (B, heads, T, D) of tensors (B, T, heads, D)."""
    shapes = [(samples, positions, count, width) for count in (heads, key_heads, key_heads)]
    return [(2 * torch.randn(shape)).bfloat16().transpose(1, 2).requires_grad_() for shape in shapes]


def document_starts(samples: int, positions: int) -> Tensor:
    starts = torch.rand(samples, positions) < 0.03
    starts[:, 0] = True
    places = torch.arange(positions).expand(samples, -1)
    return places.where(starts, 0).cummax(-1).values.to(torch.int32)


def mask_of(first_BT: Tensor) -> Tensor:
    """(B, 1, T, T): which keys a query sees."""
    place_T = torch.arange(first_BT.shape[1])
    return ((place_T >= first_BT[..., None]) & (place_T <= place_T[:, None]))[:, None]


def by_torch(given: list[Tensor], mask: Tensor, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output (B, T, H, D) and gradients."""
    wide = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
    output = nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output, wide, upstream.to(dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("documents", [False, True])
def test_tiles_are_as_close_to_float64_as_torchs_attention(shape: tuple[int, ...], documents: bool) -> None:
    given = states(*shape)
    samples, heads, _, positions, width = shape
    first = document_starts(samples, positions)
    if not documents:
        first.zero_()
    upstream = torch.randn(samples, positions, heads, width).bfloat16()
    output = causal_attention(given[0], given[1], given[2], first if documents else None, width**-0.5)
    mine = [output.detach(), *torch.autograd.grad(output, given, upstream)]
    exact = by_torch(given, mask_of(first), upstream, torch.float64)
    other = by_torch(given, mask_of(first), upstream, torch.bfloat16)
    for found, wide, rounded in zip(mine, exact, other, strict=True):
        assert found.shape == wide.shape
        last_place = torch.finfo(torch.bfloat16).eps * float(wide.abs().max())
        assert (found - wide).abs().max() <= 1.3 * (rounded - wide).abs().max() + last_place / 2 + 1e-6
        assert (found - wide).square().mean() <= 1.2 * (rounded - wide).square().mean() + last_place**2 / 1e4 + 1e-12


def test_what_a_query_does_not_see_changes_no_bit() -> None:
    given = states(1, 2, 2, 90, 32)
    first = torch.tensor([[0] * 50 + [50] * 40], dtype=torch.int32)
    before = causal_attention(given[0], given[1], given[2], first, 0.2)
    others = [tensor.detach().clone() for tensor in given]
    for tensor in others:
        tensor[:, :, :50] += 1
    after = causal_attention(others[0], others[1], others[2], first, 0.2)
    assert torch.equal(before[:, 50:], after[:, 50:])
    assert not torch.equal(before[:, :50], after[:, :50])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_seen_by_those_that_look_at_it(place: int, value: float) -> None:
    given = [tensor.detach() for tensor in states(1, 1, 1, 90, 32)]
    given[place][0, 0, 70, 3] = value
    given = [tensor.requires_grad_() for tensor in given]
    output = causal_attention(given[0], given[1], given[2], None, 0.2)
    later = slice(70, 71) if place == 0 else slice(70, None)
    finite = output[:, later].isfinite().all(-1)
    # A score of minus infinity is a weight of zero.
    assert not (finite.all() if place == 1 and value == torch.inf else finite.any())
    assert output[:, :70].isfinite().all() or place == 2  # torch's flash attention multiplies zeros by it too
    output.float().sum().backward()
    assert not all(bool(tensor.grad.isfinite().all()) for tensor in given)


def test_threads_change_no_bit() -> None:
    given = states(2, 4, 2, 100, 32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            output = causal_attention(given[0], given[1], given[2], None, 0.2)
            results.append([output, *torch.autograd.grad(output, given, torch.ones_like(output))])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "mistral"])
def test_a_model_of_tiles_is_as_close_to_fp32_as_before(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    reference = tiny(family).eval()
    ids, positions = torch.randint(0, 97, (2, 13)), torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
    exact = reference(input_ids=ids, position_ids=positions).logits
    plain = reference.bfloat16()
    before = (plain(input_ids=ids, position_ids=positions).logits.float() - exact).abs().max()
    cpu_attention.use_tiled_attention(plain)
    taken: list[bool] = []
    monkeypatch.setattr(cpu_attention, "takes", lambda *states: taken.append(takes(*states)) or taken[-1])
    output = plain(input_ids=ids, position_ids=positions).logits
    assert taken == [head_width_fits(plain)] * len(taken)
    assert taken
    assert (output.float() - exact).abs().max() <= 1.5 * before
    output.float().sum().backward()


def head_width_fits(model: nn.Module) -> bool:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width % 16 == 0


class Module(nn.Module):
    is_causal = True


@pytest.mark.parametrize("kind", ["dropout", "padding", "future", "not causal", "fp32", "longer keys"])
def test_other_attention_is_torchs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (tensor.detach() for tensor in states(1, 2, 2, 20, 16))
    mask, options = None, {}
    if kind == "dropout":
        options["dropout"] = 0.5
    if kind == "padding":
        mask = mask_of(torch.zeros(1, 20, dtype=torch.int32)) & (torch.arange(20) >= 4)
    if kind == "future":
        mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    if kind == "not causal":
        options["is_causal"] = False
    if kind == "fp32":
        query, key, value = query.float(), key.float(), value.float()
    if kind == "longer keys":
        query, mask = query[:, :, :7], torch.ones(1, 1, 7, 20, dtype=torch.bool)
    monkeypatch.setattr(cpu_attention, "causal_attention", lambda *_: pytest.fail("it went by tiles"))
    torch.manual_seed(1)
    mine, _ = cpu_attention._attention(Module(), query, key, value, mask, **options)
    torch.manual_seed(1)
    other, _ = sdpa_attention_forward(Module(), query, key, value, mask, **options)
    torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_a_sliding_window_goes_by_tiles() -> None:
    given = states(1, 2, 2, 100, 16)
    first = (torch.arange(100) - 9).clamp(min=0).to(torch.int32)[None]
    output, _ = cpu_attention._attention(Module(), *given, mask_of(first))
    exact = by_torch(given, mask_of(first), torch.zeros_like(output), torch.float64)[0]
    assert (output - exact).abs().max() < 2**-7 * exact.abs().max()
