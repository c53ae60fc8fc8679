"""`ModelConfig`: a model's shape, whatever file it was read from, and the typed reader of such files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from minisgl.types import ModelError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training.

    Kinds: `linear` (divide by `factor`), `llama3` and `yarn` (the papers' ramps between high and low frequencies),
    `factors` (divide frequency i by `factors[i]`, as GGUF files have it).
    """

    kind: str
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # on cosine and sine
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture-of-experts layers. A token goes to `num_experts_per_token` of `num_experts` MLPs."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalise: bool  # the chosen experts' weights sum to 1
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # tokens of context
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; None: the whole context
    moe: MoEConfig | None = None


T = TypeVar("T")
Test = Callable[[Any], bool]
_MISSING: Any = object()


class Values:
    """Reads typed values out of a configuration; what is wrong with one is said with the file and the key.

    A null counts as missing. `prefix` goes before keys in messages.
    """

    def __init__(self, source: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self._source = source
        self.where = where
        self._prefix = prefix

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.where}: {self._prefix}{key} {problem}")

    def has(self, key: str) -> bool:
        return self._source.get(key) is not None

    def _get(self, key: str, kind: type[T], default: Any, expected: str, fits: Test = lambda value: True) -> T:
        value: Any = self._source.get(key)
        if value is None and default is _MISSING:
            raise self.error(key, f"is missing; expected {expected}")
        kinds = (int, float) if kind is float else (kind,)  # not isinstance: a bool is no number
        if value is not None and not (type(value) in kinds and fits(value)):
            raise self.error(key, f"is {value!r}; expected {expected}")
        found: T = default if value is None else value
        return found

    def integer(self, key: str, default: Any = _MISSING, low: int = 1) -> int:
        return self._get(key, int, default, f"a whole number from {low}", lambda value: value >= low)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        return float(self._get(key, float, default, "a number above 0", lambda value: 0 < value < math.inf))

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        return self._get(key, bool, default, "true or false")

    def text(self, key: str, default: Any = _MISSING) -> str:
        return self._get(key, str, default, "a text")

    def items(self, key: str, default: Any = _MISSING) -> list[Any]:
        return self._get(key, list, default, "a list")

    def table(self, key: str) -> Values:
        """The object at `key`, empty if missing."""
        return Values(self._get(key, dict, {}, "an object"), self.where, f"{self._prefix}{key}.")

    def nested(self) -> bool:
        """Whether a value is an object itself."""
        return any(isinstance(value, dict) for value in self._source.values())


ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def base_fields(values: Values) -> dict[str, Any]:
    """The fields of ModelConfig that a Hugging Face config.json of every family spells alike."""
    activation = values.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise values.error("hidden_act", f"is {activation!r}; only silu is supported")
    if values.has("quantization_config"):
        raise values.error(
            "quantization_config",
            "is set: checkpoints quantised for safetensors aren't supported; take the unquantised model or a GGUF file",
        )
    hidden, heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    theta, scaling = read_rope(values)
    return {
        "vocab_size": values.integer("vocab_size"), "hidden_size": hidden,
        "intermediate_size": values.integer("intermediate_size"), "num_layers": values.integer("num_hidden_layers"),
        "num_heads": heads, "num_kv_heads": values.integer("num_key_value_heads", heads),
        "head_dim": values.integer("head_dim", max(hidden // heads, 1)),
        "max_position": values.integer("max_position_embeddings"), "norm_eps": values.number("rms_norm_eps", 1e-6),
        "rope_theta": theta, "rope_scaling": scaling, "tie_embeddings": values.flag("tie_word_embeddings", False),
    }  # fmt: skip


def check(config: ModelConfig, where: str) -> ModelConfig:
    """`config`, if its fields go together.

    Raises:
        ModelError: heads that don't divide, an odd head size, more experts a token than there are.
    """
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} attention heads aren't a multiple of {config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise ModelError(f"{where}: the head size is {config.head_dim}; rotary embedding needs an even one")
    factors = config.rope_scaling.factors if config.rope_scaling is not None else ()
    if factors and len(factors) != config.head_dim // 2:
        raise ModelError(f"{where}: {len(factors)} rotary factors; the head size makes it {config.head_dim // 2}")
    if config.moe is not None and config.moe.num_experts_per_token > config.moe.num_experts:
        raise ModelError(
            f"{where}: {config.moe.num_experts_per_token} experts a token, but only {config.moe.num_experts} in all"
        )
    return config


def read_rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters` (transformers 5) or the two older keys."""
    key = "rope_scaling" if values.has("rope_scaling") else "rope_parameters"
    rope = values.table(key)
    if rope.nested():
        raise values.error(key, "differs by kind of layer, which isn't supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    for source in (rope, values):
        if source.has("partial_rotary_factor") and source.number("partial_rotary_factor") != 1:
            raise source.error("partial_rotary_factor", "isn't 1: rotating part of a head isn't supported")
    theta = rope.number("rope_theta", values.number("rope_theta", 10000.0))
    return theta, _scaling(kind, rope, values)


def _scaling(kind: str, rope: Values, values: Values) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", f"is {kind!r}, which isn't supported; supported: {', '.join(ROPE_KINDS)}")
    factor = rope.number("factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    outer = values.integer("original_max_position_embeddings", values.integer("max_position_embeddings"))
    original = rope.integer("original_max_position_embeddings", outer)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"is {high}; expected more than low_freq_factor {low}")
        return RopeScaling(kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopeScaling(
        kind, factor, original, beta_fast=rope.number("beta_fast", 32.0), beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True), attention_factor=_yarn_attention_factor(factor, rope),
    )  # fmt: skip


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cosine and sine: 0.1 m ln(s) + 1 (Peng et al. 2023, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(factor: float, rope: Values) -> float:
    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return yarn_mscale(factor, rope.number("mscale")) / yarn_mscale(factor, rope.number("mscale_all_dim"))
    return yarn_mscale(factor)


def layer_windows(values: Values, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's sliding windows: `use_sliding_window` with `layer_types`, or from layer `max_window_layers` on."""
    if not values.flag("use_sliding_window", False) or not values.has("sliding_window"):
        return (None,) * num_layers
    window = values.integer("sliding_window")
    if not values.has("layer_types"):
        first = values.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    kinds = values.items("layer_types")
    known = {"full_attention": None, "sliding_attention": window}
    if len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise values.error("layer_types", f"is {kinds!r}; expected full_attention or sliding_attention for each layer")
    return tuple(known[kind] for kind in kinds)
