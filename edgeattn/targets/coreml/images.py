"""Image input: the graph takes raw pixels, and does the recipe's preprocessing itself."""

from __future__ import annotations

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from edgeattn.core.errors import UsageError
from edgeattn.recipe import Preprocess

#: Channels of the layouts that an image can have.
CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}


def pixels_of(preprocess: Preprocess | None, layout: str, value: torch.Tensor) -> tuple[tuple[float, float], ...]:
    """Factor and offset of each channel: the model's input is ``factor * pixel + offset``.

    Args:
        value: the model's first input.

    Raises:
        UsageError: the recipe has no preprocessing, or the first input is no image of that layout.
    """
    asked = f"image={layout}"
    if preprocess is None:
        raise UsageError(
            "an image input needs the recipe's preprocessing",
            value=asked,
            why="the recipe has no [preprocess], so it is not known what the model makes of a pixel",
            fix="write [preprocess] with scale, mean and std into the recipe",
        )
    if value.ndim != 4 or value.shape[:2] != (1, CHANNELS[layout]) or not value.is_floating_point():
        why = f"the model's first input is {tuple(value.shape)}, such an image (1, {CHANNELS[layout]}, H, W)"
        raise UsageError("the first input is no such image", value=asked, why=why)
    count = CHANNELS[layout]
    mean, std = (values * count if len(values) == 1 else values for values in (preprocess.mean, preprocess.std))
    return tuple((preprocess.scale / s, -m / s) for m, s in zip(mean, std, strict=True))


def take_pixels(graph: torch.export.ExportedProgram, pixels: tuple[tuple[float, float], ...]) -> None:
    """Let the first input be raw pixels: multiply and add by channel before anything else reads it."""
    name = str(graph.graph_signature.user_inputs[0])
    (image,) = (node for node in graph.graph.nodes if node.op == "placeholder" and node.name == name)
    first = next(iter(graph.graph.nodes))
    value, readers = image.meta["val"], list(image.users)
    made: fx.Node = image
    after = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    steps = (
        (torch.ops.aten.mul.Tensor, "pixel_factor", [factor for factor, _ in pixels]),
        (torch.ops.aten.add.Tensor, "pixel_offset", [offset for _, offset in pixels]),
    )
    for target, label, numbers in steps:
        held = torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1, 1)
        with graph.graph.inserting_before(first):
            constant = graph.graph.placeholder(label)
        constant.meta["val"] = value.fake_mode.from_tensor(held)
        graph.state_dict[label] = held
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=constant.name), label, persistent=True)
        graph.graph_signature.input_specs.insert(steps.index((target, label, numbers)), spec)
        with graph.graph.inserting_after(after if made is image else made):
            made = graph.graph.call_function(target, (made, constant))
        made.meta["val"] = value
    for reader in readers:
        reader.replace_input_with(image, made)
    graph.graph_module.recompile()
