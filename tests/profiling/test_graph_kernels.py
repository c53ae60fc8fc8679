"""Operators of graphs' kernels, told by the kernels around them."""

from __future__ import annotations

import pytest

from minisgl.profiling.graph_kernels import OTHER, name_graph_kernels
from minisgl.profiling.spans import Span, short_name

GRAPH = ("step", "decode 1", "forward")
PRODUCT = "nvjet_sm90_tst_64x16_64x16_1x2_h_bz_TNT"
REDUCE = "void cublasLt::splitKreduce_kernel<32, 16, int, float>"
SAMPLE = ["_sample_blocks", "_best_block"]


def named(names: list[str], path: tuple[str, ...] = GRAPH) -> list[tuple[str, ...]]:
    spans = [Span(name, 10 * i, 10 * i + 8, "gpu", "stream 7", path) for i, name in enumerate(names)]
    return [s.path for s in name_graph_kernels(reversed(spans))]


def in_layers(*layers: list[str]) -> list[tuple[str, ...]]:
    return [(*GRAPH, f"layer {i}", name) for i, layer in enumerate(layers) for name in layer]


def test_products_with_norms_and_activation_between() -> None:
    layer = [
        "rmsnorm",
        PRODUCT,
        "qkv_post",
        "_decode",
        "_combine",
        PRODUCT,
        REDUCE,
        "rmsnorm",
        PRODUCT,
        "silu_mul",
        PRODUCT,
    ]
    found = named(["_prepare", "index_v2", *layer, *layer, "rmsnorm", PRODUCT, *SAMPLE] * 2)
    operators = ["qkv", "rope+store", "attention", "attention", "o", "o", "gate/up", "silu*mul", "down"]
    step = found[: len(found) // 2]
    assert step == found[len(found) // 2 :]
    assert [p for p in step if p[-1] not in (OTHER, "embedding", "rmsnorm", "lm head", "sample")] == in_layers(
        operators, operators
    )
    assert [p[-1] for p in (step[0], step[1], step[-3], step[-2], step[-1])] == [
        OTHER, "embedding", "lm head", "sample", "sample",
    ]  # fmt: skip


def test_fused_products_tell_themselves_by_their_number() -> None:
    layer = ["skinny_gemm", "qkv_post", "_decode", *["skinny_gemm"] * 3]
    found = named(["index_v2", *layer, *layer, "rmsnorm", "skinny_gemm", *SAMPLE])
    operators = ["qkv", "rope+store", "attention", "o", "gate/up", "down"]
    assert found[1:-4] == in_layers(operators, operators)
    assert [p[-1] for p in found[-4:]] == ["rmsnorm", "lm head", "sample", "sample"]


def test_experts() -> None:
    layer = [
        "rmsnorm",
        PRODUCT,
        "qkv_post",
        "_prefill",
        PRODUCT,
        "rmsnorm",
        PRODUCT,
        "_route",
        "_product",
        "_product",
        "_sum",
    ]
    found = named(["index_v2", *layer, *layer, "rmsnorm", PRODUCT])
    operators = ["qkv", "rope+store", "attention", "o", "router", *["experts"] * 4]
    assert [p for p in found if p[-1] not in ("embedding", "rmsnorm", "lm head")] == in_layers(operators, operators)
    assert found[-1][-1] == "lm head"


@pytest.mark.parametrize("operator", ["qkv", "sample", "collect"])
def test_what_an_operator_launched_stays_its_own(operator: str) -> None:
    path = ("step", "prefill 9", operator)
    assert named([PRODUCT, "qkv_post"], path) == [path, path]


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("void at::native::(anonymous namespace)::indexSelect<int, long>(at::cuda::TensorInfo<int>)", "indexSelect"),
        ("void cublasLt::splitKreduce_kernel<32, 16>(cublasLt::cublasSplitKParams<float>)", "splitKreduce_kernel"),
        ("void reduce_kernel<512>(int)", "reduce_kernel"),
        ("nvjet_sm90_tst_64x16_64x16_1x2_h_bz_TNT", "nvjet_sm90_tst_64x16_64x16_1x2_h_bz_TNT"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
    ],
)  # fmt: skip
def test_short_names_of_kernels(kernel: str, short: str) -> None:
    assert short_name(kernel) == short
