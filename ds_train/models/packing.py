"""Does a model keep the documents of a packed window apart? Asked of the model itself before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_train.errors import first_line, user_error


@torch.no_grad()
def check_packing(
    forward: Callable[..., Any],
    vocabulary: int,
    family: str,
    device: torch.device | str = "cpu",
    documents_mask: Callable[[Tensor], Tensor] | None = None,
    first_position: int = 0,
) -> None:
    """Run one window of two documents and compare the second with the same document alone.

    `forward` is the model in evaluation mode. Positions count from `first_position`, and encoders are given
    `documents_mask` of those (B, T) that count from 0. Another first document must leave the second one's logits as
    they are (to 1e-6 of the largest in fp32, exactly in 16 bits), and they must equal those of the document by itself
    up to rounding.

    Raises:
        UserError: the family's code ignores `position_ids`, or lets documents see each other.
    """
    first, second = 5, 7
    # None of the lowest, which may be padding.
    tokens_T = 3 + torch.arange(first + second, device=device) * 37 % (vocabulary - 3)
    positions_T = torch.cat([torch.arange(first, device=device), torch.arange(second, device=device)])
    other_T = tokens_T.clone()
    other_T[:first] = 3 + (other_T[:first] + 8) % (vocabulary - 3)

    def logits(tokens: Tensor, positions: Tensor | None) -> Tensor:
        inputs = {} if positions is None else {"position_ids": first_position + positions[None]}
        if documents_mask is not None and positions is not None:
            inputs["attention_mask"] = documents_mask(positions[None])
        try:
            output = forward(input_ids=tokens[None], **inputs)
        except TypeError as error:  # no such argument
            raise _refused(family, "its forward takes no position ids") from error
        except (RuntimeError, ValueError) as error:  # the code of any family may refuse in its own way
            raise _refused(family, first_line(error)) from error
        return output.logits[0, -second:].float()

    packed = logits(tokens_T, positions_T)
    wide = next_dtype(packed, forward) == torch.float32
    # A mixture's experts see other tokens beside these, and so round otherwise.
    noise = 1e-6 * float(packed.abs().max()) if wide else 0.0
    if not torch.allclose(packed, logits(other_T, positions_T), rtol=0.0, atol=noise):
        raise _refused(family, "its attention crosses from one document into the next")
    # These know best where they aren't told anything.
    untold = documents_mask is not None or first_position > 0
    alone = logits(tokens_T[first:], None if untold else positions_T[first:])
    rounding = 1e-4 if wide else 5e-2
    if not torch.allclose(packed, alone, rtol=rounding, atol=rounding * float(alone.abs().max())):
        raise _refused(family, f"it ignores restarting position ids{' or the mask' if documents_mask else ''}")


def next_dtype(fallback: Tensor, forward: Any) -> torch.dtype:
    """Dtype of the model's weights; of `fallback` where `forward` is a plain function."""
    parameters = getattr(forward, "parameters", None)
    return next(parameters()).dtype if parameters is not None else fallback.dtype


def _refused(family: str, reason: str) -> Exception:
    return user_error(
        "data.packing",
        f"{family} can't train on rows of several documents: {reason}",
        "set data.packing: false and data.padding_free: false",
    )
