"""What recipe keys are called elsewhere: in Hugging Face's TrainingArguments and in DeepSpeed's JSON."""

from __future__ import annotations

OTHER_NAMES = {
    "output_dir": "run_root", "run_name": "name", "model_name_or_path": "model.path", "model_type": "model.arch",
    "attn_implementation": "model.attention", "gradient_checkpointing": "model.activation_checkpointing",
    "torch_compile": "model.compile", "dataset_name": "data.path", "train_file": "data.path",
    "dataset_config_name": "data.subset", "max_seq_length": "data.sequence_length",
    "seq_length": "data.sequence_length", "max_length": "data.sequence_length", "block_size": "data.sequence_length",
    "num_workers": "data.workers", "dataloader_num_workers": "data.workers",
    "per_device_train_batch_size": "batch.micro_samples", "per_device_eval_batch_size": "batch.eval_micro_samples",
    "train_micro_batch_size_per_gpu": "batch.micro_samples", "micro_batch_size": "batch.micro_samples",
    "batch_size": "batch.global_samples", "global_batch_size": "batch.global_samples",
    "train_batch_size": "batch.global_samples", "gradient_accumulation_steps": "batch.global_samples",
    "zero_optimization": "parallel.zero_stage", "stage": "parallel.zero_stage", "tensor_parallel": "parallel.tensor",
    "pipeline_parallel": "parallel.pipeline", "bf16": "precision.dtype", "fp16": "precision.dtype",
    "torch_dtype": "precision.dtype", "optim": "optimizer.kind", "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip_norm", "gradient_clipping": "optimizer.clip_norm",
    "adam_epsilon": "optimizer.eps", "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas",
    "max_steps": "schedule.steps", "num_train_epochs": "schedule.epochs", "lr_scheduler_type": "schedule.kind",
    "scheduler": "schedule.kind", "warmup_ratio": "schedule.warmup_fraction",
    "warmup_steps": "schedule.warmup_fraction", "logging_steps": "track.log_every_steps",
    "eval_steps": "track.eval_every_steps", "report_to": "track.wandb", "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last", "resume_from_checkpoint": "checkpoint.resume",
    "push_to_hub": "checkpoint.push_to", "hub_model_id": "checkpoint.push_to",
}  # fmt: skip
"""The recipe key that says what another trainer's key says."""
