"""Every command-line option that is a field of a configuration, declared once."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from typing import Any, TypeVar

from minisgl.config import (
    DEVICES,
    DTYPES,
    FUSED,
    KV_CACHE_DTYPES,
    POLICIES,
    SAMPLING_DEFAULTS,
    EngineConfig,
    ServerConfig,
)

Config = TypeVar("Config", EngineConfig, ServerConfig)


@dataclass(frozen=True, slots=True)
class Option:
    """How a field of a configuration is written on the command line. A `switch` sets its field: --no-… to False."""

    flag: str
    help: str
    kind: type[str] | type[int] | type[float] = str
    choices: tuple[str, ...] | None = None
    switch: bool = False
    metavar: str | None = None

    @property
    def switched(self) -> bool:
        """What a switch sets."""
        return not self.flag.startswith("--no-")


ENGINE_OPTIONS = {
    "model": Option("--model", "alias (smollm2), folder, .gguf file, Hugging Face hub id or modelscope:ORG/NAME"),
    "device": Option("--device", "where to run; auto takes a GPU if there is one", choices=("auto", *DEVICES)),
    "dtype": Option("--dtype", "of weights and KV cache; auto suits the device", choices=("auto", *DTYPES)),
    "dummy_weights": Option("--dummy-weights", "random weights; the model's folder needs a config.json", switch=True),
    "tp_size": Option("--tp", "ranks to split the model over: GPUs, or processes on a CPU", int, metavar="N"),
    "seed": Option("--seed", "for requests that bring no seed, and for dummy weights", int, metavar="N"),
    "page_size": Option("--page-size", "tokens in a page of the KV cache", int, metavar="N"),
    "kv_cache_dtype": Option(
        "--kv-cache-dtype", "of keys and values; auto: as --dtype, fp8: half of 16 bits", choices=KV_CACHE_DTYPES
    ),
    "num_pages": Option("--num-pages", "pages in the KV cache; default: what memory allows", int, metavar="N"),
    "mem_fraction": Option("--mem-fraction", "of free memory that the engine may take", float, metavar="F"),
    "max_model_len": Option(
        "--max-model-len",
        "prompt and output tokens of a request, at most; default: the model's context",
        int,
        metavar="N",
    ),
    "max_running": Option("--max-running", "requests computed at the same time; default: by device", int, metavar="N"),
    "max_batched_tokens": Option(
        "--max-batched-tokens", "tokens computed in one step; default: by device", int, metavar="N"
    ),
    "policy": Option("--policy", "who goes first: first come, or longest cached prefix", choices=POLICIES),
    "prefix_cache": Option("--no-prefix-cache", "compute every prompt from its start", switch=True),
    "overlap": Option("--no-overlap", "schedule a step only once the one before has ended", switch=True),
    "fused_kernels": Option("--fused-kernels", "the project's CUDA kernels inside a layer", choices=FUSED),
    "cuda_graph": Option("--no-cuda-graph", "launch every kernel of a step by itself", switch=True),
    "cuda_graph_max_batch": Option(
        "--cuda-graph-max-batch", "requests in the largest CUDA graph; default: --max-running", int, metavar="N"
    ),
    "attention": Option("--attention", "name of the attention implementation"),
}
SERVER_OPTIONS = {
    "host": Option("--host", "address to listen on; 0.0.0.0 for all"),
    "port": Option("--port", "port to listen on; 0: any free one", int, metavar="N"),
    "served_model_name": Option("--served-model-name", "the model's name over HTTP; default: as given to --model"),
    "max_queue": Option("--max-queue", "requests waiting or running, at most; beyond it: 503", int, metavar="N"),
    "api_key": Option("--api-key", "asked of every request but /health; default: MINISGL_API_KEY, if it is set"),
    "cors": Option("--cors", "origins, by commas, whose web pages may call; * for any", metavar="ORIGINS"),
    "client_timeout": Option(
        "--client-timeout", "seconds to send a request in, and to leave an answer unread", float, metavar="S"
    ),
    "drain_timeout": Option("--drain-timeout", "seconds for answers under way after SIGTERM", float, metavar="S"),
    "sampling_defaults": Option(
        "--sampling-defaults", "for what a request doesn't say: the model's, or neutral", choices=SAMPLING_DEFAULTS
    ),
    "profile": Option(
        "--profile", "allow POST /profile/start and /profile/stop, whose traces go there", metavar="FOLDER"
    ),
}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("model and engine"), EngineConfig, ENGINE_OPTIONS)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("server"), ServerConfig, SERVER_OPTIONS)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """
    Raises:
        ConfigError: a value out of range.
    """
    return EngineConfig(**{name: getattr(args, name) for name in ENGINE_OPTIONS})


def server_config(args: argparse.Namespace) -> ServerConfig:
    """`engine_config` for the server. The key may come from the environment, where `ps` doesn't show it."""
    given = {name: getattr(args, name) for name in SERVER_OPTIONS}
    if args.api_key is None:
        given["api_key"] = os.environ.get("MINISGL_API_KEY")
    return ServerConfig(**given)


def _add(group: Any, config: type[Config], options: dict[str, Option]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, option in options.items():
        default = defaults[name]
        if option.switch:
            group.add_argument(
                option.flag, dest=name, action="store_const", const=option.switched, default=default, help=option.help
            )
            continue
        told = "" if default in (None, "auto") else f" (default: {default})"
        group.add_argument(
            option.flag,
            dest=name,
            type=option.kind,
            choices=option.choices,
            default=default,
            metavar=option.metavar,
            help=option.help + told,
        )
