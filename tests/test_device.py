import pytest

from edgeattn import device
from edgeattn.core import schema
from edgeattn.core.errors import UsageError

GOOD = 'name = "d"\ndescription = "a device"\nkind = "board"\nmachine = "aarch64"\ntargets = ["onnx"]\n'


def load(tmp_path, text):
    (tmp_path / "d.toml").write_text(text)
    return device.resolve(str(tmp_path / "d.toml"))


def test_every_shipped_device_loads_under_its_name():
    known = schema.find("devices")
    assert known
    for name in known:
        assert device.resolve(name).name == name


def test_a_file(tmp_path):
    found = load(tmp_path, GOOD + "cores = 4\nclock_ghz = 2\n")
    assert (found.cores, found.clock_ghz, found.targets, found.memory_gb) == (4, 2.0, ("onnx",), None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD + "core = 4", "core: unknown key; did you mean 'cores'?"),
        (GOOD + "cores = 0", "cores: given 0;"),
        (GOOD + "clock_ghz = -1.0", "clock_ghz: given -1.0;"),
        (GOOD.replace('"board"', '"bord"'), "kind: given 'bord';"),
        (GOOD.replace('["onnx"]', "[]"), "targets: given"),
        (GOOD.replace('machine = "aarch64"\n', ""), "machine: missing"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, text, word):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert word in str(caught.value)
    assert caught.value.where == str(tmp_path / "d.toml")


def test_an_unknown_name_gives_the_closest():
    with pytest.raises(UsageError, match="did you mean 'host'"):
        device.resolve("hots")
