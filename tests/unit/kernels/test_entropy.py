"""Cross-entropy in place against float64, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from ds_kernels.entropy import entropy_in_place, entropy_takes
from ds_kernels.library import CpuLibrary, cpu_library
from torch import Tensor

LIBRARY = cpu_library()
pytestmark = pytest.mark.skipif(not isinstance(LIBRARY, CpuLibrary), reason="no compiler on this machine")
ISAS = range(LIBRARY.isa + 1) if isinstance(LIBRARY, CpuLibrary) else ()


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    wide = logits.double().requires_grad_()
    many = labels.view(len(labels), -1)
    loss = sum(
        torch.nn.functional.cross_entropy(wide, many[:, k], ignore_index=-100, reduction="sum")
        for k in range(many.shape[1])
    )
    (gradient,) = torch.autograd.grad(loss, wide)
    return loss.detach(), gradient


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "many"), [(1, 1, 1), (7, 33, 1), (5, 1000, 4), (64, 257, 1)])
def test_loss_and_gradient_are_those_of_float64_rounded_once(
    rows: int, width: int, many: int, dtype: torch.dtype, isa: int
) -> None:
    logits = (20 * torch.randn(rows, width)).to(dtype)
    labels = torch.randint(0, width, (rows, many)) if many > 1 else torch.randint(0, width, (rows,))
    labels[::3] = -100
    if many > 1:
        labels[1, 1] = labels[1, 0]
    assert entropy_takes(logits, labels)
    loss, gradient = exact(logits, labels)
    kept = logits.clone()
    found = entropy_in_place(logits, labels, -100, gradient=False, isa=isa)
    assert torch.equal(logits, kept)
    assert torch.equal(found, entropy_in_place(logits, labels, -100, gradient=True, isa=isa))
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-8 if dtype == torch.bfloat16 else 3e-6, atol=1e-6)


def test_what_is_no_number_makes_none() -> None:
    logits = torch.randn(3, 50)
    logits[1, 7] = torch.nan
    logits[2, 8] = -torch.inf
    loss = entropy_in_place(logits[1:2], torch.tensor([3]), -100, gradient=True)
    assert loss.isnan()
    assert logits[1].isnan().all()
    entropy_in_place(logits[2:], torch.tensor([3]), -100, gradient=True)
    assert logits[2, 8] == 0
    assert logits[2].sum().abs() < 1e-5


def test_threads_change_no_bit() -> None:
    logits, labels = torch.randn(40, 300), torch.randint(0, 300, (40,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            mine = logits.clone()
            results.append([entropy_in_place(mine, labels, -100, gradient=True), mine])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_others_are_left_alone() -> None:
    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    assert not entropy_takes(logits.half(), labels)
    assert not entropy_takes(logits.t(), labels)
    assert not entropy_takes(logits, labels.int())
    assert not entropy_takes(logits, labels[:, None].expand(4, 17))


def test_labels_beyond_the_logits_touch_nothing_else() -> None:
    whole = torch.zeros(4, 8)
    with pytest.raises(IndexError, match="label 17 is beyond the 8 logits"):
        entropy_in_place(whole[:2], torch.tensor([3, 17]), -100, True)
    assert not whole.any()
