import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn import recipe
from edgeattn.core import schema
from edgeattn.core.errors import UsageError
from edgeattn.core.specs import DTYPES, TensorSpec
from edgeattn.recipe import Recipe, Resolved, resolve

GOOD = {
    "name": "r",
    "model": {"factory": "pkg.mod:make", "args": {"width": 8}},
    "inputs": {"x": {"shape": [1, 3, 8, 8]}},
    "outputs": ["logits"],
    "preprocess": {"scale": 0.5},
    "heldout": {"file": "h.npz"},
}
words = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,6}", fullmatch=True)
floats = st.floats(allow_nan=False, allow_infinity=False)
plain = (
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | floats | st.text(max_size=5) | st.lists(st.integers())
)
inputs = st.fixed_dictionaries(
    {"shape": st.lists(st.integers(1, 9), max_size=4)}, optional={"dtype": st.sampled_from(DTYPES)}
)
recipes = st.fixed_dictionaries(
    {
        "name": words,
        "model": st.fixed_dictionaries(
            {"factory": st.tuples(words, words).map(":".join)},
            optional={"args": st.dictionaries(words, plain, max_size=3), "checkpoint": words},
        ),
        "inputs": st.dictionaries(words.map(lambda w: "in_" + w), inputs, min_size=1, max_size=3),
    },
    optional={
        "description": st.text(max_size=9),
        "outputs": st.lists(words.map(lambda w: "out_" + w), unique=True, max_size=3),
        "seed": st.integers(0, 2**40),
        "preprocess": st.fixed_dictionaries({}, optional={"scale": floats, "mean": st.lists(floats)}),
        "heldout": st.fixed_dictionaries({"file": words}, optional={"golden": st.integers(1, 64)}),
    },
)


def validate(data) -> Recipe:
    return schema.validate(Recipe, data, "r.toml")


def mistake(data) -> str:
    with pytest.raises(UsageError) as caught:
        validate(data)
    return "\n".join([str(caught.value.why), *caught.value.details])


@given(recipes)
def test_a_recipe_goes_to_plain_data_and_back(data):
    first = validate(data)
    dumped = json.loads(json.dumps(first.model_dump(mode="json")))
    assert validate(dumped) == first
    assert [s.name for s in first.specs()] == list(data["inputs"])
    assert Resolved.model_validate({"recipe": dumped, "folder": "."}).recipe == first


def places(data, path=()):
    """Every table of a recipe whose keys the schema fixes."""
    if path not in [("inputs",), ("model", "args")]:
        yield path
    for key, value in data.items():
        if isinstance(value, dict):
            yield from places(value, (*path, key))


KEYS = [
    (path, key)
    for path in places(GOOD)
    for key in {
        (): ("description", "outputs", "preprocess", "heldout", "inputs", "model", "seed", "name"),
        ("model",): ("factory", "checkpoint", "args"),
        ("inputs", "x"): ("shape", "dtype", "low", "high", "dynamic"),
        ("preprocess",): ("scale", "mean", "std"),
        ("heldout",): ("file", "golden"),
    }[path]
]


@pytest.mark.parametrize(("path", "key"), KEYS)
def test_a_misspelt_key_anywhere_names_the_one_that_was_meant(path, key):
    data = json.loads(json.dumps(GOOD))
    table = data
    for step in path:
        table = table[step]
    wrong = key[:-1] + "q" + key[-1]
    table[wrong] = 1
    assert f"{'.'.join((*path, wrong))}: unknown key; did you mean {key!r}?" in mistake(data)


def dynamic(ranges):
    return {"inputs": {"x": {"shape": [1, 3], "dynamic": ranges}}}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "a/b"}, "name: given 'a/b'; may hold letters"),
        ({"name": ".hidden"}, "name: given '.hidden'"),
        ({"name": "a\n"}, "name: given 'a\\n'"),
        ({"name": ""}, "name: given ''"),
        ({"model": {"factory": "no_colon"}}, "model.factory: given 'no_colon'; must be package.module:callable"),
        ({"model": {}}, "model.factory: missing"),
        ({"inputs": {"x": {"shape": [1, 0]}}}, "inputs.x.shape: given"),
        ({"inputs": {"x": {"shape": [1, -1]}}}, "every dimension must be at least 1"),
        ({"inputs": {"x": {"shape": ["1"]}}}, "inputs.x.shape.0: given '1'"),
        ({"inputs": {"x": {"shape": 3}}}, "inputs.x.shape: given 3"),
        (
            {"inputs": {"x": {"shape": [1], "dtype": "float31"}}},
            "inputs.x.dtype: given 'float31'; must be one of float32",
        ),
        ({"inputs": {"x": {"shape": [1], "low": 1.0}}}, "a range needs both low and high"),
        ({"inputs": {"x": {"shape": [1], "low": 2.0, "high": 1.0}}}, "low is above high"),
        ({"inputs": {"x": {"shape": [1], "dtype": "uint8", "low": 0, "high": 256}}}, "uint8 holds 0..255"),
        (
            dynamic({"0": [1, 2, 8]}),
            "inputs.x.dynamic: given {'0': [1, 2, 8]}; axis 0: opt 2 is not the 1 of the shape",
        ),
        (dynamic({"0": [2, 1, 8]}), "axis 0: 2, 1, 8 are not in the order min, opt, max"),
        (dynamic({"0": [1, 1]}), "axis 0: a range is min, opt and max"),
        (dynamic({"0": [1, 1, 8, 2]}), "axis 0: 1 is no multiple of the step 2"),
        (dynamic({"0": [1, 1, 1]}), "axis 0: min and max are both 1"),
        (dynamic({"2": [1, 1, 8]}), "axis 2: the shape has axes 0 to 1"),
        (dynamic({"-1": [1, 1, 8]}), "axis '-1': an axis is a number from 0"),
        (dynamic({"batch": [1, 1, 8]}), "axis 'batch': an axis is a number from 0"),
        (dynamic({"01": [1, 1, 8]}), "axis '01': an axis is a number from 0"),
        (dynamic({"0": ["1", 1, 8]}), "inputs.x.dynamic.0.0: given '1'"),
        (dynamic({"0": 8}), "inputs.x.dynamic.0: given 8"),
        (dynamic([1, 1, 8]), "inputs.x.dynamic: given [1, 1, 8]"),
        ({"inputs": {}}, "needs at least one input"),
        ({"outputs": "logits"}, "outputs: given 'logits'"),
        ({"outputs": ["a", "a"]}, "every output needs a name of its own"),
        ({"outputs": ["x"]}, "x is the name of an input already"),
        ({"seed": -1}, "seed: given -1"),
        ({"seed": "0"}, "seed: given '0'"),
        ({"seed": True}, "seed: given True"),
        ({"heldout": {"file": "f", "golden": 65}}, "heldout.golden: given 65"),
        ({"heldout": {}}, "heldout.file: missing"),
        ({"preprocess": {"mean": ["0"]}}, "preprocess.mean.0: given '0'"),
    ],
)
def test_a_bad_value_names_its_key(change, text):
    assert text in mistake({**GOOD, **change})


def test_every_shipped_recipe_resolves_and_names_itself():
    for name, path in schema.find("recipes").items():
        assert recipe.load(path).name == name
        assert resolve(name).random_weights == (schema.read_toml(path)["model"].get("checkpoint") is None)


def test_dimensions_that_may_vary():
    data = {**GOOD, **dynamic({"1": [3, 3, 9, 3], "0": [1, 1, 8]})}
    found = validate(data)
    assert found.specs() == [TensorSpec("x", (1, 3), dynamic=((0, 1, 1, 8), (1, 3, 3, 9, 3)))]
    dumped = json.loads(json.dumps(found.model_dump(mode="json")))
    assert dumped["inputs"]["x"]["dynamic"] == {"1": [3, 3, 9, 3], "0": [1, 1, 8]}
    assert validate(dumped) == found


def test_a_static_recipe_is_the_plain_data_that_it_was():
    # Cache keys and bundles' digests rest on it.
    assert validate(GOOD).model_dump(mode="json")["inputs"] == {
        "x": {"shape": [1, 3, 8, 8], "dtype": "float32", "low": None, "high": None}
    }
    assert validate({**GOOD, **dynamic({})}) == validate({**GOOD, "inputs": {"x": {"shape": [1, 3]}}})


def test_ranges_from_the_command_line_take_the_place_of_the_recipes(tmp_path):
    (tmp_path / "r.toml").write_text(
        'name = "r"\n[model]\nfactory = "m.py:make"\n[inputs.x]\nshape = [1, 4]\ndynamic = {"0" = [1, 1, 2]}\n'
    )
    path = str(tmp_path / "r.toml")
    assert resolve(path).recipe.specs()[0].dynamic == ((0, 1, 1, 2),)
    assert resolve(path, inputs=["x=1..2..8x4"]).recipe.specs() == [TensorSpec("x", (2, 4), dynamic=((0, 1, 2, 8),))]
    assert resolve(path, inputs=["x=1x4"]).recipe.specs() == [TensorSpec("x", (1, 4))]
    assert resolve("pkg.mod:make", inputs=["x=1..8x3"]).recipe.specs()[0].shape == (8, 3)
    assert len({resolve(path, inputs=given).sha256 for given in ([], ["x=1x4"], ["x=1..2x4"])}) == 3


# Resolving: files, overrides, guests


@pytest.fixture
def written(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"weights")
    np.savez(tmp_path / "h.npz", x=np.zeros(3), y=np.zeros(3))
    (tmp_path / "r.toml").write_text(
        'name = "r"\n[model]\nfactory = "m.py:make"\ncheckpoint = "c.safetensors"\n'
        '[model.args]\nwidth = 8\n[inputs.x]\nshape = [1, 4]\n[heldout]\nfile = "h.npz"\n'
    )
    return tmp_path


def test_files_are_found_beside_the_recipe(written):
    found = resolve(str(written / "r.toml"))
    assert (found.checkpoint, found.heldout) == (str(written / "c.safetensors"), str(written / "h.npz"))
    assert found.folder == str(written)
    assert found.title == "r"


def test_the_digest_counts_bytes_and_not_paths(written, tmp_path_factory):
    first = resolve(str(written / "r.toml"))
    other = tmp_path_factory.mktemp("elsewhere")
    for path in written.iterdir():
        (other / path.name.replace("c.safe", "d.safe")).write_bytes(path.read_bytes())
    text = (other / "r.toml").read_text().replace("c.safe", "d.safe")
    (other / "r.toml").write_text(text)
    assert resolve(str(other / "r.toml")).sha256 == first.sha256
    (other / "d.safetensors").write_bytes(b"Weights")
    assert resolve(str(other / "r.toml")).sha256 != first.sha256
    assert resolve(str(written / "r.toml"), args={"width": 9}).sha256 != first.sha256


@pytest.mark.parametrize(("name", "key"), [("c.safetensors", "model.checkpoint"), ("h.npz", "heldout.file")])
def test_a_missing_file_names_the_key(written, name, key):
    (written / name).unlink()
    with pytest.raises(UsageError) as caught:
        resolve(str(written / "r.toml"))
    assert key in str(caught.value.where)
    assert str(written / name) in str(caught.value)


def test_overrides(written, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"o")
    found = resolve(
        str(written / "r.toml"), inputs=["x=2x4:float16"], checkpoint=tmp_path / "other.pth", args={"depth": 2}
    )
    assert found.recipe.specs() == [TensorSpec("x", (2, 4), "float16")]
    assert found.recipe.model.args == {"width": 8, "depth": 2}
    assert found.checkpoint == str(tmp_path / "other.pth")
    with pytest.raises(UsageError, match="no such input") as caught:
        resolve(str(written / "r.toml"), inputs=["y=2x4"])
    assert "r has x" in str(caught.value)
    with pytest.raises(UsageError, match="--checkpoint"):
        resolve(str(written / "r.toml"), checkpoint=tmp_path / "none.pth")


def test_an_unknown_recipe_gives_the_closest():
    with pytest.raises(UsageError, match="did you mean 'fmvit-s'") as caught:
        resolve("fmvti-s")
    assert "file.py:factory" in str(caught.value.fix)


def test_a_module_and_a_file_as_guests(tmp_path, monkeypatch):
    found = resolve("pkg.mod:make", inputs=["x=1x3"], args={"width": 8})
    assert (found.recipe.name, found.recipe.model.factory) == ("mod-make", "pkg.mod:make")
    assert found.title == "mod-make-random"
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("def helper(): ...\ndef build_model(): ...\nX = 1\n")
    found = resolve("net.py", inputs=["x=1x3"])
    assert found.recipe.model.factory == f"{tmp_path / 'net.py'}:build_model"
    assert resolve("net.py:helper", inputs=["x=1x3"]).recipe.name == "net-helper"


@pytest.mark.parametrize("stem", ["_private", "-x", "näme", "a b", "..."])
def test_any_file_name_gives_a_usable_name(tmp_path, stem):
    (tmp_path / f"{stem}.py").write_text("def model(): ...")
    name = resolve(str(tmp_path / f"{stem}.py"), inputs=["x=1"]).recipe.name
    assert recipe.schema._NAME.fullmatch(name)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("def a(): ...\ndef b(): ...", "the file holds a, b"),
        ("x = 1", "no function or class"),
        ("def a(:", "cannot be read"),
        ("def _a(): ...", "no function or class"),
    ],
)
def test_a_file_whose_factory_is_not_clear_is_never_run(tmp_path, content, text):
    (tmp_path / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{content}")
    with pytest.raises(UsageError, match=text):
        resolve(str(tmp_path / "m.py"), inputs=["x=1"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["a:", ":b", "timm:", "a:b:c", ":"])
def test_half_a_guest_is_a_usage_error(text):
    with pytest.raises(UsageError) as caught:
        resolve(text, inputs=["x=1"])
    assert "package.module:callable" in str(caught.value)


def test_a_guest_needs_its_inputs():
    with pytest.raises(UsageError, match="--input x=1x3x224x224"):
        resolve("pkg.mod:make")
    assert resolve("timm:resnet18").recipe.inputs == {}
