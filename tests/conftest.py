"""For all tests: ranks start from a server that has imported what each of them needs."""

from __future__ import annotations

import ranks

ranks.PRELOADED += [
    "pytest", "deepspeed", "ds_train.engine.job", "ds_train.engine.loop", "ds_train.checkpoint.hf",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "ds_train.track.tracker",
    "torch._inductor.compile_fx",  # half of what is left of a rank's start; DeepSpeed's engine imports it
]  # fmt: skip
