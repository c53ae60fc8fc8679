"""The families, and the way from a path to a model that runs.

To add a family: write `models/<family>.py` with a subclass of `CausalLM`, and name it in `FAMILIES`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from minisgl.distributed import TPGroup
from minisgl.gguf_file import read_gguf, read_json
from minisgl.kernels.cpu import choose_kernels
from minisgl.models import gguf, weights
from minisgl.models.build import Build, heads_fit
from minisgl.models.config import ModelConfig, Values, base_fields, check
from minisgl.models.cpu import PackedStack
from minisgl.models.decoder import CausalLM
from minisgl.models.llama import Llama, Mistral
from minisgl.models.qwen2 import Qwen2
from minisgl.models.qwen3 import Qwen3
from minisgl.models.qwen3_moe import Qwen3MoE
from minisgl.models.sharding import check_tp_size
from minisgl.types import ModelError

log = logging.getLogger(__name__)

FAMILIES: dict[str, type[CausalLM]] = {c.family: c for c in (Llama, Mistral, Qwen2, Qwen3, Qwen3MoE)}
GGUF_FAMILIES = {c.gguf_architecture: c for c in FAMILIES.values() if c.gguf_architecture is not None}


def read_config(path: Path) -> ModelConfig:
    """The shape of the model at `path`, a folder with a config.json or a GGUF file.

    Raises:
        ModelError: no configuration, a family or feature that isn't supported, or a value that makes no sense.
    """
    return gguf.read_config(read_gguf(path), GGUF_FAMILIES) if path.is_file() else _read_folder_config(path)


def _read_folder_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} holds no config.json; expected a folder in Hugging Face's layout")
    values = Values(read_json(file), str(file))
    family = values.text("model_type")
    if family not in FAMILIES:
        raise values.error("model_type", f"is {family!r}, which isn't supported; supported: {', '.join(FAMILIES)}")
    fields: dict[str, Any] = base_fields(values)
    num_layers: int = fields["num_layers"]
    fields["windows"] = (None,) * num_layers
    fields |= FAMILIES[family].read_fields(values, num_layers)
    return check(ModelConfig(family=family, **fields), str(file))


def load_model(
    path: Path, dtype: torch.dtype, device: torch.device, tp: TPGroup | None = None, dummy: bool = False,
    seed: int = 0, progress: bool = True, packed: bool = False, fused: bool = False,
) -> CausalLM:  # fmt: skip
    """The model at `path` (a folder or a .gguf file), ready to run, with this rank's share of the weights.

    Args:
        dtype: of the weights and activations, whatever the file holds.
        dummy: random weights, the same for the same `seed` and device, however many ranks share them; only the
            configuration is read.
        fused: on a GPU, the project's CUDA kernels between the matrix products; they need cuda-core.
        packed: keep the weights as the CPU kernels want them, where these serve: the CPU and float32.
        progress: whether to show a bar on standard error while weights load.

    Raises:
        ModelError: what is at `path` can't be read or isn't supported.
        ConfigError: the model can't be split over `tp`'s ranks.
    """
    config, tp = read_config(path), tp or TPGroup()
    check_tp_size(config, tp.size)
    packed = packed and device.type == "cpu" and dtype == torch.float32
    if packed:
        choose_kernels()
    model = FAMILIES[config.family](Build(config, dtype, device, tp, packed, fused))
    if fused and not heads_fit(config.head_dim):
        log.warning("fused kernels are off: heads of %d don't fit; expected a multiple of 8 up to 256", config.head_dim)
    if dummy:
        weights.fill_randomly(model, seed)
    elif path.is_file():
        gguf.load(model, read_gguf(path), progress)
    else:
        weights.load(model, path, progress)
    if packed and config.moe is None and tp.size == 1:
        model.stack = PackedStack(model)
    return model
