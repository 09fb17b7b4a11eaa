import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgeattn.core.errors import ToolchainMissing, UsageError
from edgeattn.models.build import build
from edgeattn.recipe import resolve

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.l = nn.Linear(3, width)
        self.n = nn.BatchNorm1d(width)
    def forward(self, x):
        return self.n(self.l(x))

def make(width=4):
    return Net(width)

def trained(width=4):
    net = Net(width)
    net.n.running_mean.fill_(3.0)
    return net

def number():
    return 3

def broken(width=4):
    values = {}
    return values["absent"]  # line 26

def inside():
    return nn.Linear("three", 2)  # line 29

instance = nn.Dropout(0.5)
constant = 5
"""


@pytest.fixture
def guest(tmp_path, monkeypatch):
    """A module of the user's in the working folder; gives its name."""
    name = f"guest_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    for key in [key for key in sys.modules if key.endswith(name)]:
        del sys.modules[key]


def make(text, **options):
    return build(resolve(text, inputs=["x=2x3"], **options))


@pytest.mark.parametrize("form", ["{}:make", "{}:Net", "{}.py:make", "./{}.py:Net"])
def test_a_guest_by_module_or_file(guest, form):
    built = make(form.format(guest), args={"width": 5})
    assert built.model.l.weight.shape == (5, 3)
    assert not any(m.training for m in built.model.modules())
    assert not any(p.requires_grad for p in built.model.parameters())
    assert [s.name for s in built.specs] == ["x"]


def test_the_seed_decides_the_weights(guest):
    first, second = (make(f"{guest}:make").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    # Without a checkpoint a batch norm is not the identity that would hide a wrong fusion.
    assert not torch.equal(first["n.weight"], torch.ones(4))
    assert not torch.equal(first["n.running_mean"], torch.zeros(4))


def test_weights_that_a_factory_loads_by_itself_stay(guest):
    state = make(f"{guest}:trained").model.state_dict()
    assert state["n.running_mean"].tolist() == [3.0] * 4
    assert state["n.weight"].tolist() == [1.0] * 4
    assert state["n.running_var"].tolist() == [1.0] * 4


def test_random_inputs_are_by_name_and_seeded(guest):
    built = build(resolve(f"{guest}:make", inputs=["x=2x3", "y=2:int64:0..9"]))
    first, second = built.random_inputs(1), built.random_inputs(1)
    assert {k: (tuple(v.shape), v.dtype) for k, v in first.items()} == {
        "x": ((2, 3), torch.float32),
        "y": ((2,), torch.int64),
    }
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["x"], built.random_inputs(2)["x"])


def test_a_module_instance(guest):
    model = make(f"{guest}:instance").model
    assert isinstance(model, nn.Dropout)
    assert not model.training


def test_a_checkpoint_is_loaded_as_it_is(guest, tmp_path):
    state = {k: torch.full_like(v, 2) for k, v in make(f"{guest}:make").model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = make(f"{guest}:make", checkpoint=tmp_path / "w.safetensors").model.state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_a_checkpoint_of_another_model_is_refused(guest, tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="does not fit") as caught:
        make(f"{guest}:make", checkpoint=tmp_path / "w.safetensors")
    assert "extra: other (1,)" in caught.value.details


@pytest.mark.parametrize("source", ["{}", "{}.py"])
@pytest.mark.parametrize(
    ("attribute", "parts"),
    [
        ("mkae", ["no such factory", "mkae", "did you mean 'make'?"]),
        ("number", ["did not return a torch.nn.Module", "int"]),
        ("constant", ["factory failed", "not callable"]),
        ("broken", ["factory failed", "{}.py:26", "KeyError: 'absent'"]),
        ("inside", ["factory failed", "{}.py:29"]),
    ],
)
def test_what_is_wrong_with_a_factory(guest, source, attribute, parts):
    with pytest.raises(UsageError) as caught:
        make(f"{source.format(guest)}:{attribute}")
    for part in parts:
        assert part.format(guest) in str(caught.value)


def test_wrong_arguments_name_them(guest):
    with pytest.raises(UsageError, match="widht"):
        make(f"{guest}:make", args={"widht": 5})


@pytest.mark.parametrize(
    ("content", "line", "text"),
    [
        ("import torch\n\nraise OSError('no disk')\n", 3, "no disk"),
        ("import torch\nx = (1,\ndef f(): ...\n", None, "SyntaxError"),
        ("x = 1\ny = 2\nimport json as j; j.loads('{')\n", 3, "JSONDecodeError"),
    ],
)
def test_a_module_that_fails_on_import_names_its_line(tmp_path, monkeypatch, content, line, text):
    name = f"failing_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError) as caught:
        make(f"{name}:make")
    assert f"{name}.py:{line or ''}" in str(caught.value.where)
    assert text in str(caught.value.why)


def test_a_module_that_is_not_there():
    with pytest.raises(UsageError) as caught:
        make("no_such_package_at_all.net:make")
    assert "no_such_package_at_all" in str(caught.value)
    assert "importlib" not in str(caught.value.where)


def test_a_folder_named_as_this_package_hides_nothing(tmp_path):
    (tmp_path / "edgeattn").mkdir()
    file = tmp_path / "edgeattn" / "mine.py"
    file.write_text("def make():\n    raise ValueError('here')\n")
    with pytest.raises(UsageError) as caught:
        make(f"{file}:make")
    assert caught.value.where == f"{file}:2"


def test_timm_without_timm_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainMissing) as caught:
        build(resolve("timm:resnet18"))
    assert caught.value.exit_code == 3
    assert "pip install" in str(caught.value.fix)


def test_a_guest_may_import_timm_beside_any_torch(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("import timm\n\ndef make():\n    return timm.create_model('resnet18', num_classes=3)\n")
    code = f"""
from edgeattn.models.build import build
from edgeattn.recipe import resolve
build(resolve({str(file)!r} + ":make", inputs=["x=1x3x64x64"]))
"""  # a process of its own: torchvision may have been imported in this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
