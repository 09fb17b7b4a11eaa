import json

import pytest
import torch
from torch import Tensor, nn

from edgeattn.capture import Program, capture, name_outputs, run_eager
from edgeattn.core.errors import ConversionFailed, UsageError

X = torch.arange(8.0).reshape(2, 4) - 3


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(5, 5)


class Returns(nn.Module):
    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor):
        return self.what(x)


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def yes(y: Tensor) -> Tensor:
            return self.linear(y)

        def no(y: Tensor) -> Tensor:
            return y - 1

        return torch.cond(x.sum() > 0, yes, no, (x * 2,))


def nested(child: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.ModuleDict({"odd": nn.Sequential(child)})["odd"]))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_program_computes_what_the_model_does_and_survives_saving(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    program = capture(model, {"x": X}, ("y",))
    names = program.save(tmp_path)
    assert names == {"main": {"inputs": ["x"], "outputs": ["y"]}}
    for entry in (program.entries["main"], Program.load(tmp_path, names).entries["main"]):
        assert (entry.inputs, entry.outputs) == (("x",), ("y",))
        assert torch.equal(entry.graph.module()(X)[0], model(X))
    assert hooks(model) == 0


@pytest.mark.parametrize(("model", "path"), [(Branches(), "(model)"), (nested(Branches()), "1.1.0")])
def test_what_cannot_be_captured_names_the_module_and_the_line(model, path):
    with pytest.raises(ConversionFailed) as caught:
        capture(model.eval(), {"x": X}, ("y",))
    assert caught.value.exit_code == 4
    assert caught.value.where == f"module {path}"
    assert any("test_capture.py" in line and "forward" in line for line in caught.value.details)
    assert hooks(model) == 0


@pytest.mark.parametrize(("model", "path"), [(Fails(), "(model)"), (nested(Fails()), "1.1.0")])
def test_a_forward_that_fails_names_the_module_and_the_shapes(model, path):
    with pytest.raises(UsageError) as caught:
        run_eager(model, {"x": X}, ())
    assert caught.value.exit_code == 2
    assert caught.value.where == f"module {path}"
    assert caught.value.value == "x=(2, 4)"
    assert "--input" in str(caught.value.fix)
    assert hooks(model) == 0


def test_too_many_inputs_are_a_usage_error():
    with pytest.raises(UsageError, match="TypeError"):
        run_eager(nn.ReLU(), {"x": X, "y": X}, ())


def test_the_users_own_hooks_stay():
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda *_: None)
    run_eager(model, {"x": X}, ())
    capture(model.eval(), {"x": X}, ("y",))
    assert hooks(model) == 1


def test_a_cond_over_a_module_can_be_captured():
    model = Cond().eval()
    program = capture(model, {"x": X}, ("y",))
    for x in (X, X + 9):
        assert torch.equal(program.entries["main"].graph.module()(x)[0], model(x))
    assert hooks(model) == 0


A, B = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("result", "wanted", "names"),
    [
        (A, (), ["output"]),
        (A, ("logits",), ["logits"]),
        ([A], (), ["output"]),
        ((A, B), (), ["output_0", "output_1"]),
        ((A, [B, A]), (), ["output_0", "output_1", "output_2"]),
        ((A, None), (), ["output"]),
        ({"p": A, "q": B}, (), ["p", "q"]),
        ({"p": A, "x": B}, (), ["p", "output_x"]),
        ({"p": A, "q": [B, A]}, (), ["output_0", "output_1", "output_2"]),
        ({"p": A, "q": B}, ("b", "a"), ["b", "a"]),
    ],
)
def test_names_of_outputs(result, wanted, names):
    assert list(name_outputs(result, wanted, ["x"])) == names
    assert list(run_eager(Returns(lambda x: result), {"x": X}, wanted)) == names


@pytest.mark.parametrize("result", [None, 3, {}, [None]])
def test_no_tensor_is_a_usage_error(result):
    with pytest.raises(UsageError, match="no tensor"):
        run_eager(Returns(lambda x: result), {"x": X}, ())


@pytest.mark.parametrize("wanted", [("a",), ("a", "b", "c")])
def test_another_number_of_names_is_a_usage_error(wanted):
    with pytest.raises(UsageError, match="another number") as caught:
        name_outputs((A, B), wanted)
    assert "returns 2" in str(caught.value.why)


def test_no_gradients_are_kept():
    assert not run_eager(nn.Linear(4, 4), {"x": X}, ())["output"].requires_grad


# Dimensions that may vary


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


class Of(nn.Module):
    """Whatever a function makes of its inputs."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.what(*inputs)


BATCH = {0: (1, 4, 8)}
IMAGES = {0: (1, 4, 8), 2: (8, 16, 32), 3: (8, 12, 32)}


def fails_to_vary(model, inputs, dynamic, **options):
    with pytest.raises(ConversionFailed, match="cannot vary") as caught:
        capture(model.eval(), inputs, ("y",), dynamic=dynamic, **options)
    assert caught.value.exit_code == 4
    assert caught.value.fix
    assert "dim_" not in str(caught.value)
    assert hooks(model) == 0
    return caught.value


@pytest.mark.parametrize("model", [Images(), nn.Sequential(Images(), nn.ReLU())])
def test_a_program_takes_every_shape_of_its_ranges(model, tmp_path):
    program = capture(model.eval(), {"x": torch.randn(4, 3, 16, 12)}, ("y",), dynamic={"x": IMAGES})
    names = json.loads(json.dumps(program.save(tmp_path)))
    for entry in (program.entries["main"], Program.load(tmp_path, names).entries["main"]):
        assert entry.dynamic == {"x": IMAGES}
        run = entry.graph.module()
        for shape in [(1, 3, 8, 8), (4, 3, 16, 12), (8, 3, 32, 32), (1, 3, 9, 31)]:
            x = torch.randn(shape)
            assert torch.allclose(run(x)[0], model(x))
        for shape in [(9, 3, 16, 12), (4, 3, 7, 12), (4, 4, 16, 12)]:
            with pytest.raises(Exception, match=r"(?i)guard|shape|expected"):
                run(torch.randn(shape))


class Halves(nn.Module):
    """Of images whose height and width are multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.conv(self.conv(x)).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return x + deep + x.unflatten(2, (-1, 4)).mean(3).repeat_interleave(4, 2)


def test_a_step_is_for_models_that_take_multiples(tmp_path):
    ranges = {0: (1, 2, 4), 2: (8, 16, 32, 4), 3: (8, 12, 32, 4)}
    program = capture(Halves().eval(), {"x": torch.randn(2, 3, 16, 12)}, ("y",), dynamic={"x": ranges})
    names = json.loads(json.dumps(program.save(tmp_path)))
    entry = Program.load(tmp_path, names).entries["main"]
    assert entry.dynamic == {"x": ranges}
    for shape in [(1, 3, 8, 8), (4, 3, 32, 32), (3, 3, 12, 20)]:
        assert entry.graph.module()(torch.randn(shape))[0].shape == shape
    with pytest.raises(Exception, match=r"(?i)guard"):
        entry.graph.module()(torch.randn(1, 3, 10, 8))


def test_a_step_that_several_inputs_share():
    inputs, ranges = {"x": torch.randn(8, 3), "y": torch.randn(8, 3)}, {0: (4, 8, 16, 4)}
    program = capture(Of(torch.add).eval(), inputs, ("z",), dynamic={"x": ranges, "y": ranges})
    feeds = [torch.randn(12, 3), torch.randn(12, 3)]
    assert torch.equal(program.entries["main"].graph.module()(*feeds)[0], sum(feeds))
    error = fails_to_vary(Of(torch.add), inputs, {"x": ranges, "y": {0: (4, 8, 12, 4)}})
    assert error.where == "input x, axis 0"
    assert "takes 4 to 12" in str(error.why)


@pytest.mark.parametrize(
    ("ends", "advice"),
    [
        ((8, 16, 32), "it takes multiples of 4 alone; say so with a step: 8..16..32/4"),
        ((7, 16, 33), "it takes multiples of 4 alone; say so with a step: 8..16..32/4"),
        ((5, 5, 33), "it takes multiples of 4 alone; say so with a step: 8..8..32/4"),
        ((15, 16, 17), "remove the range"),
        ((6, 16, 32, 2), "it takes 8..16..32/4"),
        ((6, 6, 32, 2), "it takes 8..8..32/4"),
        ((12, 24, 48, 3), "it takes 12..24..48/12"),
    ],
)
def test_a_missing_step_is_found(ends, advice):
    unflatten = Of(lambda x: x.unflatten(2, (-1, 4)))
    example = torch.randn(2, 3, max(ends[1], 16), 12)
    error = fails_to_vary(unflatten, {"x": example}, {"x": {2: ends}})
    assert str(error.fix).startswith(advice)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda x: x * 2 if x.shape[2] % 4 == 0 else x, "does not take 10: it assumes (axis 2 of x) % 4 == 0"),
        (lambda x: x * 2 if x.shape[2] > 10 else x, "does not take 8: it assumes (axis 2 of x) > 10"),
        (
            lambda x: x * 2 if x.shape[2] != x.shape[3] else x,
            "does not take 12: it assumes (axis 2 of x) != (axis 3 of x)",
        ),
    ],
)
def test_a_branch_on_sizes_is_found_behind_steps(what, why):
    """torch.export takes these: of multiples it only notes what it assumed, and the graph would be wrong."""
    ranges = {2: (8, 16, 32, 2), 3: (4, 12, 20, 4)}
    error = fails_to_vary(Of(what), {"x": torch.randn(2, 3, 16, 12)}, {"x": ranges})
    assert str(error.where).startswith("input x, axis")
    assert why in str(error.why)


def test_without_ranges_the_program_is_static(tmp_path):
    for dynamic in (None, {}, {"x": {}}):
        program = capture(nn.Linear(4, 3).eval(), {"x": X}, ("y",), dynamic=dynamic)
        assert program.entries["main"].dynamic == {}
        assert not program.entries["main"].graph.range_constraints
        assert program.save(tmp_path) == {"main": {"inputs": ["x"], "outputs": ["y"]}}


def test_a_batch_that_several_inputs_share():
    inputs = {"x.1": torch.randn(4, 3), "mask": torch.randn(4, 3), "bias": torch.randn(4, 3)}
    model = Of(lambda x, mask, bias: x * mask + bias).eval()
    program = capture(model, inputs, ("y",), dynamic=dict.fromkeys(inputs, BATCH))
    for batch in (1, 8):
        feeds = [torch.randn(batch, 3) for _ in inputs]
        assert torch.equal(program.entries["main"].graph.module()(*feeds)[0], model(*feeds))


@pytest.mark.parametrize(
    ("what", "ranges", "where", "why"),
    [
        (lambda x: x.reshape(4, -1), BATCH, "input x, axis 0; module 1", "axis 0 of x is always 4"),
        (lambda x: x * int(x.shape[0]), BATCH, "input x, axis 0; module 1", "axis 0 of x is always 4"),
        (lambda x: x * 2 if x.shape[0] > 2 else x, BATCH, "input x, axis 0; module 1", "not every size satisfies"),
        (lambda x: x.reshape(-1, 3, 16, 12), IMAGES, "input x, axis 2; module 1", "axis 2 of x is always 16"),
        (lambda x: x.unflatten(2, (-1, 4)), {2: (8, 16, 32)}, "input x, axis 2", "not every size satisfies"),
    ],
    ids=["constant", "number", "branch", "size", "multiple"],
)
def test_a_dimension_that_the_model_fixes_is_named_with_the_module(what, ranges, where, why):
    model = nn.Sequential(nn.ReLU(), Of(what), nn.ReLU())
    error = fails_to_vary(model, {"x": torch.randn(4, 3, 16, 12)}, {"x": ranges})
    assert str(error.where).startswith(where)
    assert why in str(error.why)


def test_dimensions_that_must_be_equal_and_are_not_declared_so():
    add = Of(torch.add)
    error = fails_to_vary(add, {"x": X, "y": X}, {"x": {0: (1, 2, 8)}, "y": {0: (2, 2, 8)}})
    assert str(error.where).startswith("input y, axis 0")
    assert "axis 0 of y and axis 0 of x must always be equal" in str(error.why)
    assert error.fix == "give both the same range, or neither"
    error = fails_to_vary(add, {"x": X, "y": X}, {"y": {0: (1, 2, 8)}})
    assert str(error.where).startswith("input y, axis 0")
    square = {"x": {0: (1, 4, 8), 1: (1, 4, 8)}}
    error = fails_to_vary(Of(lambda x: x @ x), {"x": torch.randn(4, 4)}, square)
    assert str(error.where).startswith("input x, axis 1")


def test_a_range_that_the_exporter_drops_in_silence_is_found():
    def forgetful(model, args, dynamic_shapes):
        return torch.export.export(model, args)

    def narrow(model, args, dynamic_shapes):
        return torch.export.export(model, args, dynamic_shapes=({0: torch.export.Dim("n", min=2, max=8)},))

    for exporter, held in ((forgetful, "takes 2"), (narrow, "takes 2 to 8")):
        error = fails_to_vary(nn.ReLU(), {"x": X}, {"x": BATCH}, exporter=exporter)
        assert error.where == "input x, axis 0"
        assert held in str(error.why)


def test_another_error_of_a_dynamic_capture_stays_what_it_was():
    with pytest.raises(ConversionFailed, match="cannot be captured") as caught:
        capture(Branches().eval(), {"x": X}, ("y",), dynamic={"x": {0: (1, 2, 8)}})
    assert caught.value.where == "module (model)"
