"""The rival: Hugging Face Trainer on DeepSpeed ZeRO, bf16, started by the deepspeed launcher.

Prints one JSON line: median step time and processor seconds, peak resident memory of rank 0, mean training loss.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class StepClock(TrainerCallback):
    """Notes when each optimizer step ended, and what the process had used of its processor by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.used: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        self.used.append(time.process_time())


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A file's bytes, cut into windows."""

    def __init__(self, path: Path, length: int) -> None:
        self.ids, self.length = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long(), length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.ids[index * self.length : (index + 1) * self.length]
        return {"input_ids": window, "labels": window.clone()}


def median_step(ends: list[float]) -> float:
    """The first two left out."""
    return statistics.median(end - start for start, end in pairwise(ends[1:]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("job", type=Path, help="JSON written by against_hf_trainer.py")
    job = json.loads(parser.parse_args().job.read_text())
    torch.manual_seed(0)
    clock = StepClock()
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(max_position_embeddings=job["length"], **job["model"])),
        train_dataset=Windows(Path(job["corpus"]), job["length"]),
        callbacks=[clock],
        args=TrainingArguments(
            output_dir=job["folder"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro"],
            learning_rate=job["lr"],
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=job["steps"],
            torch_compile=job["rival_compiles"],
            disable_tqdm=True,
            deepspeed={
                "train_micro_batch_size_per_gpu": job["micro"],
                "gradient_accumulation_steps": 1,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": job["stage"]},
                "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": job["lr"]}},
                "zero_allow_untested_optimizer": True,
            },
        ),
    )
    output = trainer.train()
    if int(os.environ.get("RANK", 0)) == 0:
        result = {
            "step_s": median_step(clock.ends),
            "cpu_s": median_step(clock.used),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "loss": output.training_loss,
        }
        print("RESULT " + json.dumps(result), flush=True)
    # An ordinary exit aborts now and then, with and without this.
    torch.distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
