"""Models that coremltools converted and compressed: they give what their decompressed weights give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from tests.targets.coreml.harness import TARGETS, ct, mb
from tests.targets.coreml.judging import agree, numbers

with quiet():
    import coremltools.optimize.coreml as cto


@pytest.fixture(scope="module")
def models() -> dict[tuple[int, str], Any]:
    """A convolution beside a linear layer by opset and precision, as coremltools converts them."""
    kernel, matrix = numbers(1, (16, 8, 3, 3)), numbers(2, (12, 32))

    def body(x: Any, y: Any) -> Any:
        made = mb.conv(x=x, weight=kernel, pad_type="same"), mb.linear(x=y, weight=matrix)
        return tuple(mb.relu(x=item, name=f"out_{i}") for i, item in enumerate(made))

    def convert(opset: int, precision: str) -> Any:
        with quiet():
            specs = [mb.TensorSpec((1, 8, 5, 5)), mb.TensorSpec((3, 32))]
            return ct.convert(
                mb.program(input_specs=specs, opset_version=TARGETS[opset])(body),
                convert_to="mlprogram",
                minimum_deployment_target=TARGETS[opset],
                compute_precision=ct.precision(precision),
                skip_model_load=True,
            )

    return {(opset, precision): convert(opset, precision) for opset in (16, 18) for precision in ("float32", "float16")}


def linear(dtype: str, **options: Any) -> tuple[Any, Any]:
    return cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(dtype=dtype, weight_threshold=0, **options)


def palette(**options: Any) -> tuple[Any, Any]:
    return cto.palettize_weights, cto.OpPalettizerConfig(mode="uniform", weight_threshold=0, **options)


def vectors(**options: Any) -> tuple[Any, Any]:
    return cto.palettize_weights, cto.OpPalettizerConfig(mode="kmeans", weight_threshold=0, **options)


PRUNE = (cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0))
# What is done to a model one after the other, and the operations that must then be in it.
COMPRESSED: list[tuple[int, list[tuple[Any, Any]], set[str]]] = [
    (16, [linear("int8", mode="linear")], {"constexpr_affine_dequantize"}),
    (16, [linear("uint8")], {"constexpr_affine_dequantize"}),
    (16, [palette(nbits=4)], {"constexpr_lut_to_dense"}),
    (16, [palette(nbits=6)], {"constexpr_lut_to_dense"}),
    (16, [PRUNE], {"constexpr_sparse_to_dense"}),
    (18, [linear("int8", mode="linear")], {"constexpr_blockwise_shift_scale"}),
    (18, [linear("int4", granularity="per_block", block_size=4)], {"constexpr_blockwise_shift_scale"}),
    (18, [linear("uint4", mode="linear", granularity="per_tensor")], {"constexpr_blockwise_shift_scale"}),
    (18, [palette(nbits=4)], {"constexpr_lut_to_dense"}),
    (18, [palette(nbits=3, granularity="per_grouped_channel", group_size=4)], {"constexpr_lut_to_dense"}),
    (18, [vectors(nbits=2, cluster_dim=4)], {"constexpr_lut_to_dense"}),
    (
        18,
        [palette(nbits=4, enable_per_channel_scale=True)],
        {"constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"},
    ),
    (18, [PRUNE], {"constexpr_sparse_to_dense"}),
    (18, [PRUNE, palette(nbits=4)], {"constexpr_lut_to_sparse", "constexpr_sparse_to_dense"}),
    (18, [PRUNE, linear("int4")], {"constexpr_sparse_blockwise_shift_scale", "constexpr_sparse_to_dense"}),
    (
        18,
        [palette(nbits=4), linear("int8", granularity="per_tensor")],
        {"constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"},
    ),
]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("index", range(len(COMPRESSED)))
def test_a_model_that_coremltools_compressed(
    index: int, precision: str, models: dict[tuple[int, str], Any], tmp_path: Path
) -> None:
    opset, steps, operations = COMPRESSED[index]
    model = models[opset, precision]
    with quiet():
        for i, (compress, config) in enumerate(steps):
            joint = {"joint_compression": True} if i else {}
            model = compress(model, cto.OptimizationConfig(global_config=config), **joint)
        plain = cto.decompress_weights(model)
        for name, item in {"small": model, "plain": plain, "first": models[opset, precision]}.items():
            item.save(str(tmp_path / f"{name}.mlpackage"))
    feeds = {"x": numbers(3, (1, 8, 5, 5)), "y": numbers(4, (3, 32))}
    found = {}
    for name in ("small", "plain", "first"):
        package = open_package(tmp_path / f"{name}.mlpackage")
        if name == "small":
            block = next(iter(package.spec.mlProgram.functions["main"].block_specializations.values()))
            assert operations == {o.type for o in block.operations if o.type.startswith("constexpr_")}
        found[name] = Function(package).run(feeds)
    for name, value in found["plain"].items():
        agree([found["small"][name]], [value], precision, 2 if precision == "float16" else 4)
        assert np.abs(value - found["first"][name]).max() > 1e-2
