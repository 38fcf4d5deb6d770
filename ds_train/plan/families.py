"""What we know about model families beyond what their transformers configs say: a table.

Most families carry their own plans (`base_model_pp_plan`, `base_model_tp_plan`); a row here gives those that don't.
Names are relative to the base model, `*` stands for a layer's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TENSOR_STYLES = frozenset({
    "colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_split_input", "rowwise_rep",
    "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "replicate", "fused_colwise",
})  # fmt: skip
"""Tensor-plan styles that can be run; `fused_colwise` is ours: query, key and value side by side in one matrix."""

EXPERT_STYLES = frozenset({"packed_colwise", "packed_rowwise", "moe_tp_experts", "moe_identity_expert", "grouped_gemm"})
"""Styles of the experts of a mixture: their entries are left out, each tensor rank holds whole experts."""


@dataclass(frozen=True)
class Family:
    """How a family is cut: modules before the layers, the list of layers, modules after it; styles by module.

    `tuples`: its layers give a tuple that begins with the hidden states, where others give the hidden states.
    """

    before: tuple[str, ...]
    layers: str
    after: tuple[str, ...]
    tensor: Mapping[str, str] = field(default_factory=dict)
    tuples: bool = False


_GPT2_TENSOR = {
    "h.*.attn.c_attn": "fused_colwise", "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise",
}  # fmt: skip
_BERT_TENSOR = {
    "encoder.layer.*.attention.self.query": "colwise", "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise", "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise", "encoder.layer.*.output.dense": "rowwise",
}  # fmt: skip
_BERT = Family((), "encoder.layer", (), _BERT_TENSOR)
_LIKE_LLAMA = Family(("embed_tokens",), "layers", ("norm",))

FAMILIES: dict[str, Family] = {
    "granitemoe": _LIKE_LLAMA,
    "granitemoe_swa": _LIKE_LLAMA,
    "granitemoeshared": _LIKE_LLAMA,
    "jamba": Family(("embed_tokens",), "layers", ("final_layernorm",)),
    "nemotron_h": Family(("embeddings",), "layers", ("norm_f",)),
    "olmoe": _LIKE_LLAMA,
    "phimoe": _LIKE_LLAMA,
    "gpt2": Family(("wte", "wpe"), "h", ("ln_f",), _GPT2_TENSOR),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "opt": Family(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"), "decoder.layers",
        ("decoder.final_layer_norm", "decoder.project_out"),
        {
            "decoder.layers.*.self_attn.q_proj": "colwise", "decoder.layers.*.self_attn.k_proj": "colwise",
            "decoder.layers.*.self_attn.v_proj": "colwise", "decoder.layers.*.self_attn.out_proj": "rowwise",
            "decoder.layers.*.fc1": "colwise", "decoder.layers.*.fc2": "rowwise",
        },
    ),
    "bloom": Family(
        ("word_embeddings", "word_embeddings_layernorm"), "h", ("ln_f",),
        {
            "h.*.mlp.dense_h_to_4h": "colwise", "h.*.mlp.dense_4h_to_h": "rowwise",
        },
        tuples=True,
    ),
    "gpt_neo": Family(
        ("wte", "wpe"), "h", ("ln_f",),
        {
            "h.*.attn.attention.q_proj": "colwise", "h.*.attn.attention.k_proj": "colwise",
            "h.*.attn.attention.v_proj": "colwise", "h.*.attn.attention.out_proj": "rowwise",
            "h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise",
        },
        tuples=True,
    ),
    "gptj": Family(
        ("wte",), "h", ("ln_f",),
        {
            "h.*.attn.q_proj": "colwise", "h.*.attn.k_proj": "colwise", "h.*.attn.v_proj": "colwise",
            "h.*.attn.out_proj": "rowwise", "h.*.mlp.fc_in": "colwise", "h.*.mlp.fc_out": "rowwise",
        },
        tuples=True,
    ),
    "falcon": Family(("word_embeddings",), "h", ("ln_f",), tuples=True),
    "gpt_bigcode": Family(("wte", "wpe"), "h", ("ln_f",), {"h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise"}),
    "mpt": Family(("wte",), "blocks", ("norm_f",), {
        "blocks.*.ffn.up_proj": "colwise", "blocks.*.ffn.down_proj": "rowwise",
    }, tuples=True),
}  # fmt: skip
