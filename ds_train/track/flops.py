"""Model FLOPs of training, and the share of the hardware's peak that a run reaches."""

from __future__ import annotations

from typing import Any


def flops_per_token(config: Any, matrix_parameters: int, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 per matrix parameter plus attention's 12 x layers x width x length.

    Source: PaLM, appendix B (arXiv 2204.02311). `matrix_parameters` take part in matrix products: all but the
    input embedding, the output head included. Recomputation is not counted, as usual for MFU.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return 6.0 * matrix_parameters + 12.0 * text.num_hidden_layers * width * sequence_length


def mfu(tokens_per_second: float, flops_of_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation in [0, 1]: model FLOP/s over the peak FLOP/s of all ranks together."""
    return tokens_per_second * flops_of_token / peak_flops
