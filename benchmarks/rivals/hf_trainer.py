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

import numpy as np
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class StepClock(TrainerCallback):
    """Notes when each optimizer step ended, and what the process had used of its processor by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.used: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        self.used.append(time.process_time())


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The windows of a file: labels are shifted already."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.ids, self.labels = (torch.from_numpy(file[key]) for key in ("input_ids", "labels"))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index], "shift_labels": self.labels[index]}


class InOrder(Trainer):
    """Takes the windows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


def median_step(ends: list[float]) -> float:
    """The first two left out."""
    return statistics.median(end - start for start, end in pairwise(ends[1:]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("job", type=Path, help="JSON written by against_hf_trainer.py")
    job = json.loads(parser.parse_args().job.read_text())
    clock = StepClock()
    trainer = InOrder(
        model=LlamaForCausalLM.from_pretrained(job["weights"], dtype=torch.float32),
        train_dataset=Windows(Path(job["windows"])),
        callbacks=[clock],
        args=TrainingArguments(
            output_dir=job["folder"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro"],
            learning_rate=job["lr"],
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            remove_unused_columns=False,
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
