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
