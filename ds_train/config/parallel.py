"""`parallel`: how model states and work are spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_train.config.base import Place, Section
from ds_train.config.batch import Auto, Positive


class ParallelSection(Section):
    """ZeRO data parallelism, offload and communication. Data ranks follow from the number of ranks started.

    A field that says `auto` is chosen by the planner, by predicted memory and step time, among all values that the
    recipe's other keys and the ranks allow; `ds-train plan` shows its choice and why everything else was rejected.
    """

    ranks: Positive | Auto = "auto"
    """Ranks that the recipe is made for; a launch with another number is refused. `auto` takes any number."""

    pipeline: Positive | Auto = 1
    """Pipeline stages, each on ranks of its own. For `causal-lm`, with zero_stage 1 (0 runs as 1), not with
    `sequence`."""

    stage_layers: list[Positive] | None = None
    """Layers of each pipeline stage; left out, stages are balanced by their cost."""

    tensor: Positive | Auto = 1
    """Ranks that share every layer's matrices (tensor parallelism)."""

    sequence: Positive | Auto = 1
    """Ranks that share the tokens of each sample (DeepSpeed-Ulysses, arXiv 2309.14509). For `causal-lm`; sequence x
    tensor divides the attention heads."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 1
    """ZeRO stage (arXiv 1910.02054): 1 shards optimizer states, 2 gradients too, 3 parameters too. In 16 bits and in
    pipelines 0 runs as 1, since DeepSpeed's stage 0 computes another step there; the plan says so."""

    offload_optimizer: Literal["none", "cpu", "nvme", "auto"] = "none"
    """Where optimizer states and master weights live if not on the device. Needs zero_stage 1 or more; nvme 3.
    `auto` takes nvme into account where nvme_path is given."""

    offload_params: Literal["none", "cpu", "nvme", "auto"] = "none"
    """Where parameters live between uses. Needs zero_stage 3."""

    nvme_path: Place | None = None
    """Folder on a fast local disk for nvme offload. The run has a folder of its own in it, which goes when it ends.
    DeepSpeed compiles its async_io at first use, which needs the headers of libaio."""

    pin_memory: bool = True
    """Page-lock offloaded memory, for faster copies to the device. Without a device it does nothing."""

    bind_cores: bool = True
    """Keep CPU ranks of a host with several NUMA nodes on cores of their own, near their memory. Ranks that numactl, a
    scheduler or a container has placed stay where they are, and so do those of a host with one node."""

    overlap_communication: bool | Auto = "auto"
    """Reduce gradients while the backward pass goes on. `auto`: on where there is more than one device with streams."""

    bucket_elements: Positive | Auto = "auto"
    """Elements per reduce and all-gather bucket. `auto` follows the size of the model."""

    quantized_weights: bool = False
    """ZeRO++ (arXiv 2306.10209): int8 weights in the all-gather of stage 3."""

    quantized_gradients: bool = False
    """ZeRO++: int4 gradients in the reduce-scatter of stage 3."""

    secondary_partition: int = Field(default=1, ge=1)
    """ZeRO++: ranks that keep a second full copy of the weights among them (the devices of one host)."""

    @property
    def on_disk(self) -> bool:
        """Whether something is offloaded to a disk."""
        return "nvme" in (self.offload_optimizer, self.offload_params)
