"""Model FLOPs of training, and the share of the hardware's peak that a run reaches."""

from __future__ import annotations

from typing import Any

# Entries of a config's `layer_types` whose work grows linearly with the length, so that the matrices say it all.
_WITHOUT_SCORES = {"linear_attention", "mamba", "conv", "mlp", "moe"}


def flops_per_token(config: Any, matrix_parameters: int, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 per matrix parameter plus attention's 12 x width x length a layer.

    Source: PaLM, appendix B (arXiv 2204.02311). `matrix_parameters` take part in matrix products: all but the
    input embedding, the output head included. Recomputation is not counted, as usual for MFU; attention counts the
    whole sequence, or a layer's window where it is shorter. Families without attention heads count none.
    """
    return 6.0 * matrix_parameters + sum(12.0 * width * length for width, length in _attention(config, sequence_length))


def mfu(flops_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation in [0, 1]: model FLOP/s over the peak FLOP/s of all ranks together."""
    return flops_per_second / peak_flops


def _attention(config: Any, sequence_length: int) -> list[tuple[float, int]]:
    """(width of all heads, positions that a token attends to) of each layer that has attention scores."""
    # `decoder` chooses between the two text configs that some families have; others ignore it.
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", 0)
    types = getattr(text, "layer_types", None) or ["full_attention"] * count
    found = []
    for index, kind in enumerate(types[:count]):
        # A layer's own view of the config: heads differ between the layers of some families (Gemma 4).
        layer = text.per_layer_config[index]
        heads = getattr(layer, "num_attention_heads", None)
        if heads and kind not in _WITHOUT_SCORES:
            window = getattr(layer, "sliding_window", None) if kind == "sliding_attention" else None
            found.append((_head_width(layer, heads) * heads, min(sequence_length, window or sequence_length)))
    return found


def _head_width(layer: Any, heads: int) -> float:
    """Elements of a head; the mean of keys' and values' where they differ (latent attention, arXiv 2405.04434)."""
    keys, values = getattr(layer, "qk_nope_head_dim", None), getattr(layer, "v_head_dim", None)
    if keys and values:
        return (keys + (getattr(layer, "qk_rope_head_dim", None) or 0) + values) / 2
    return float(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
