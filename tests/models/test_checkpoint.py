import os
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from edgeattn.core.errors import UsageError
from edgeattn.models.checkpoint import NESTS, load_state, read_state

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


STATE = small().state_dict()


def same(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in the three formats that are read."""
    folder = tmp_path_factory.mktemp("files")
    save_file(STATE, folder / "a.safetensors")
    torch.save(STATE, folder / "a.pth")
    torch.save(STATE, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder


FORMATS = ["a.safetensors", "a.pth", "old.pth"]


@pytest.mark.parametrize("name", FORMATS)
def test_formats(files, name):
    read = read_state(files / name)
    assert set(read) == set(STATE)
    assert all(torch.equal(read[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_a_usage_error(files, tmp_path, name, share):
    data = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UsageError) as caught:
        read_state(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert "damaged" in caught.value.what


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_usage_error(tmp_path, suffix, data):
    (tmp_path / f"f{suffix}").write_bytes(data)
    with pytest.raises(UsageError):
        read_state(tmp_path / f"f{suffix}")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), byte=st.integers(1, 255))
def test_a_flipped_byte_of_a_pickle_never_crashes(files, tmp_path, position, byte):
    data = bytearray((files / "old.pth").read_bytes())
    data[position % len(data)] ^= byte
    (tmp_path / "f.pth").write_bytes(data)
    try:
        read = read_state(tmp_path / "f.pth")
    except UsageError:
        return
    assert isinstance(read, dict)  # a byte of a weight: what the recipe's SHA-256 is for


class Code:
    """Unpickling it makes the file that it is given."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_not_executed(tmp_path, how, nested):
    effect = tmp_path / "effect"
    data = {"state_dict": STATE, "x": Code(str(effect))} if nested else Code(str(effect))
    path = tmp_path / "evil.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UsageError, match="not executed") as caught:
        read_state(path)
    assert not effect.exists()
    assert "mkdir" in str(caught.value.why)
    assert "state_dict()" in str(caught.value.fix)
    # The file does hold what it is said to hold: read without care it acts.
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert effect.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(small(), tmp_path / "m.pth")
    with pytest.raises(UsageError, match="holds code") as caught:
        read_state(tmp_path / "m.pth")
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("nest", NESTS)
def test_nested_under_any_usual_key(tmp_path, nest):
    torch.save({"epoch": 3, nest: OrderedDict(STATE), "optimizer": {"lr": 0.1}}, tmp_path / "n.pth")
    assert same(read_state(tmp_path / "n.pth"), STATE)


def test_the_averaged_weights_come_first_and_nests_nest(tmp_path):
    ema = {k: v + 1 for k, v in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": {"model": ema}}, tmp_path / "n.pth")
    assert same(read_state(tmp_path / "n.pth"), ema)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_prefix_of_data_parallel_training_is_taken_off(tmp_path, suffix):
    def write(state):
        path = tmp_path / f"p{suffix}"
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        return read_state(path)

    assert set(write({f"module.{k}": v for k, v in STATE.items()})) == set(STATE)
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert set(write(mixed)) == {"module.a", "b"}


@pytest.mark.parametrize("data", [{"epoch": 3, "lr": 0.1}, [1, 2], {}, torch.zeros(3), {"state_dict": {}}, 7])
def test_no_state_dict(tmp_path, data):
    torch.save(data, tmp_path / "n.pth")
    with pytest.raises(UsageError, match="holds no state dict"):
        read_state(tmp_path / "n.pth")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        read_state(tmp_path / name)
    assert "No such file" in str(caught.value)


def test_every_mismatch_is_listed_and_the_model_is_untouched():
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["2.wieght"] = state.pop("2.weight")
    state["head.zzzzzzzz"] = torch.zeros(7)
    state["0.weight"] = torch.zeros(4, 5)
    state["1.bias"] = torch.zeros(())
    with pytest.raises(UsageError) as caught:
        load_state(model, state, "w.pth")
    assert caught.value.where == "w.pth"
    assert caught.value.why == "1 missing, 2 extra, 2 of another shape, 0 of another kind"
    assert sorted(caught.value.details) == [
        "extra: 2.wieght (2, 4) (is it 2.weight?)",
        "extra: head.zzzzzzzz (7,)",
        "missing: 2.weight (2, 4)",
        "shape: 0.weight is (4, 5), the model has (4, 3)",
        "shape: 1.bias is (), the model has (4,)",
    ]
    assert same(model.state_dict(), before)


def test_a_fitting_state_is_loaded_with_or_without_step_counters():
    state = {k: torch.full_like(v, 3) for k, v in STATE.items() if "num_batches" not in k}
    model = small()
    load_state(model, state, "w.pth")
    assert all(torch.all(v == 3) for k, v in model.state_dict().items() if "num_batches" not in k)
    load_state(model, {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}, "half.pth")
    assert model[0].weight.dtype == torch.float32
