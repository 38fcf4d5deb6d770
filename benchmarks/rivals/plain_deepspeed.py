"""The rival of a start: a DeepSpeed script as tutorials write them, with plain imports; says when a step is done."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("job", type=Path, help="JSON written by benchmarks/start.py")
    job = json.loads(parser.parse_args().job.read_text())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**job["model"]))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": job["micro"],
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        },
    )
    text = torch.frombuffer(bytearray(Path(job["corpus"]).read_bytes()), dtype=torch.uint8).long()
    windows = text[: job["micro"] * job["length"]].view(job["micro"], job["length"])
    engine.backward(engine(input_ids=windows, labels=windows).loss)
    engine.step()
    if engine.global_rank == 0:
        print("FIRST STEP", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
