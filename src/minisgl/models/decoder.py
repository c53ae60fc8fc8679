"""The skeleton that all families share. A family says what differs: see `llama.py` for the simplest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from minisgl.attention.base import ForwardBatch
from minisgl.models.build import Build
from minisgl.models.config import ModelConfig, Values
from minisgl.models.layers import MLP, Attention, ColumnLinear, RMSNorm, RowLinear, VocabTable, skinny_product
from minisgl.models.rotary import Rotary, Rotation

if TYPE_CHECKING:
    from minisgl.models.cpu import PackedStack


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then the same with the MLP. The residual sum travels apart and is added in the norms.

    skinny: our matrix products, fused with their neighbours, do what they do faster than cuBLAS (`skinny_product`).
    Those that add to the residual sum, as experts do then, leave nothing to add: `residual` is None, and `x` the sum.
    """

    def __init__(self, build: Build, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(build, build.config.hidden_size)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(build, build.config.hidden_size)
        self.mlp = mlp
        self.skinny = build.fused and isinstance(attention, Attention) and build.tp.size == 1

    def forward(
        self, x: Tensor, residual: Tensor | None, rotation: Rotation | Tensor, batch: ForwardBatch,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """rows: [R] int64, of [T]: those wanted back, as of the last layer; what only the others need is left out."""
        if self.skinny:
            return self._forward_skinny(x, residual, rotation, batch, rows)
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, rotation, batch)
        if rows is not None:
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def _forward_skinny(
        self, x: Tensor, residual: Tensor | None, rotation: Rotation | Tensor, batch: ForwardBatch, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        attention, mlp = self.self_attn, self.mlp
        assert isinstance(attention, Attention)
        qkv, stream = _behind_norm(self.input_layernorm, attention.qkv_proj, x, residual, None)
        x = attention.attend(qkv, rotation, batch)
        if rows is not None:
            x, stream = x.index_select(0, rows), stream.index_select(0, rows)
        x, residual = _onto(stream, attention.o_proj, x)
        norm = self.post_attention_layernorm
        if not isinstance(mlp, MLP):  # experts
            x, stream = norm(x, residual)
            return mlp(x, stream), None
        inner, stream = _behind_norm(norm, mlp.gate_up_proj, x, residual, mlp.activate)
        return _onto(stream, mlp.down_proj, inner)


def _behind_norm(
    norm: RMSNorm, product: ColumnLinear, x: Tensor, residual: Tensor | None,
    activate: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The product of the normed sum, activated, and the sum. Ours can't add to it: that would be one more launch."""
    if residual is None and product.bias is None:
        y = skinny_product(x, product.weight, norm, activate is not None)
        if y is not None:
            return y, x
    x, residual = norm(x, residual)
    y = product(x)
    return (y if activate is None else activate(y)), residual


def _onto(stream: Tensor, product: RowLinear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The product, and the sum that it is still to be added to; or the sum with it."""
    y = skinny_product(x, product.weight, add_to=stream) if product.bias is None else None
    return (product(x), stream) if y is None else (y, None)


class CausalLM(nn.Module):
    """A decoder-only transformer: embedding, layers, norm, head.

    A family is a subclass: it names itself, reads what its configurations add, and chooses its attention and MLP.
    """

    family: ClassVar[str]  # `model_type` in config.json
    capturable: bool = True  # the host needs nothing of what it computes, so that CUDA graphs can hold it
    gguf_architecture: ClassVar[str | None] = None
    gguf_interleaved: ClassVar[bool] = False  # query and key rows lie as rotary pairs (2i, 2i + 1) in GGUF files

    @staticmethod
    def read_fields(values: Values, num_layers: int) -> dict[str, Any]:
        """Fields of ModelConfig beyond `config.base_fields`, from a Hugging Face configuration."""
        return {}

    @staticmethod
    def read_gguf_fields(values: Values) -> dict[str, Any]:
        """Fields of ModelConfig beyond those of every GGUF file."""
        return {}

    def make_attention(self, build: Build, layer: int) -> nn.Module:
        return Attention(build, layer)

    def make_mlp(self, build: Build, layer: int) -> nn.Module:
        return MLP(build)

    def __init__(self, build: Build) -> None:
        """Builds the model on its device, with parameters that hold no values yet."""
        super().__init__()
        config = build.config
        self.config: ModelConfig = config
        self.vocab = build.vocab
        self.num_kv_heads_per_rank = build.kv_heads()[0]
        self.embed_tokens = VocabTable(build)
        self.layers = nn.ModuleList(
            DecoderLayer(build, self.make_attention(build, i), self.make_mlp(build, i))
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(build, config.hidden_size)
        self.lm_head = self.embed_tokens if config.tie_embeddings else VocabTable(build)
        self.rotary = Rotary(config, build.device, build.fused)
        self.stack: PackedStack | None = None  # runs the layers in our place, where it is there
        self.eval()

    def forward(self, batch: ForwardBatch) -> Tensor:
        """One step: writes keys and values of its T tokens into `batch.pool`.

        `batch.attention.prepare(batch)` comes before.

        Returns:
            Logits [R, vocab_size] in the weights' dtype, of the rows `batch.logits_indices`; see `logits`.
        """
        return self.logits(self.hidden(batch))

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """As `forward`, up to the head: final hidden states [R, hidden_size]."""
        if self.stack is not None:
            return self.stack.hidden(batch)
        rotation = self.rotary(batch.positions)
        x = self.embed_tokens.embed(batch.input_ids)
        residual: Tensor | None = None
        *layers, last = self.layers
        for layer in layers:
            x, residual = layer(x, residual, rotation, batch)
        x, residual = last(x, residual, rotation, batch, batch.logits_indices)
        return self.norm(x, residual)[0]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [R, hidden_size] → [R, vocab_size]; where ranks share the vocabulary, those of `vocab`'s rows."""
        return self.lm_head.logits(hidden)
