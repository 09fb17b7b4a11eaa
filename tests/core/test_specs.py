import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeattn.core.errors import UsageError
from edgeattn.core.specs import DTYPES, TensorSpec, dynamic_fault, parse_spec, range_fault, shape_words

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,8}", fullmatch=True)
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


ranges = st.lists(st.integers(1, 9), min_size=3, max_size=3).map(sorted).filter(lambda ends: ends[0] < ends[2])
#: A dimension: its size, or (min, opt, max) of one that may vary, or (min, opt, max, step).
dimensions = (
    st.integers(1, 5)
    | ranges
    | st.builds(lambda ends, step: [*(n * step for n in ends), step], ranges, st.integers(2, 7))
)


def spec_of(sizes, name="x", dtype="float32"):
    shape = tuple(size if isinstance(size, int) else size[1] for size in sizes)
    return TensorSpec(name, shape, dtype, dynamic=tuple((i, *s) for i, s in enumerate(sizes) if not isinstance(s, int)))


@given(names, st.lists(dimensions, max_size=4), st.sampled_from(DTYPES))
@example("x", [[1, 8, 8]], "float32")
@example("x", [[1, 1, 8]], "float32")
def test_text_of_a_spec_with_ranges_reads_back_as_the_spec(name, sizes, dtype):
    spec = spec_of(sizes, name, dtype)
    assert parse_spec(str(spec)) == spec
    assert hash(parse_spec(str(spec))) == hash(spec)


@given(st.lists(dimensions, max_size=4))
def test_a_spec_at_an_end_of_its_ranges_is_static(sizes):
    spec = spec_of(sizes)
    for which, end in enumerate(("min", "opt", "max")):
        static = spec.at(end)
        assert static.shape == tuple(size if isinstance(size, int) else size[which] for size in sizes)
        assert not static.dynamic
        assert np.asarray(static.random(0)).shape == static.shape
    assert spec.at("opt").shape == spec.shape
    assert np.array_equal(spec.random(3), spec.at("opt").random(3))


@given(names, shapes, st.sampled_from(DTYPES))
def test_text_of_a_spec_reads_back_as_the_spec(name, shape, dtype):
    spec = TensorSpec(name, shape, dtype)
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x=1x3x224x224", TensorSpec("x", (1, 3, 224, 224))),
        ("x=scalar", TensorSpec("x", ())),
        ("ids=1x16:int64:0..31999", TensorSpec("ids", (1, 16), "int64", 0, 31999)),
        ("x=4:float32:-1..1", TensorSpec("x", (4,), "float32", -1, 1)),
        ("x=4:float32:-1.5e-3..2.5e+1", TensorSpec("x", (4,), "float32", -1.5e-3, 25)),
        ("x=4:float16:.25...5", TensorSpec("x", (4,), "float16", 0.25, 0.5)),
        ("  x=4  ", TensorSpec("x", (4,))),
        ("x=1..4..8x3", TensorSpec("x", (4, 3), dynamic=((0, 1, 4, 8),))),
        ("x=1..8x3", TensorSpec("x", (8, 3), dynamic=((0, 1, 8, 8),))),
        ("x=1x64..128/32", TensorSpec("x", (1, 128), dynamic=((1, 64, 128, 128, 32),))),
        ("x=64..96..128/32x3", TensorSpec("x", (96, 3), dynamic=((0, 64, 96, 128, 32),))),
        ("x=1..4..8/1x3", TensorSpec("x", (4, 3), dynamic=((0, 1, 4, 8),))),
        ("ids=1..2x4..16:int64:0..9", TensorSpec("ids", (2, 16), "int64", 0, 9, ((0, 1, 2, 2), (1, 4, 16, 16)))),
    ],
)
def test_forms(text, spec):
    assert parse_spec(text) == spec


@given(st.text(max_size=20) | st.from_regex(r"x=[0-9x]{1,5}(:[a-z0-9]{1,7})?(:[-+0-9e.]{1,12})?", fullmatch=True))
@example("x=4:float32:e..1")
@example("x=4:float32:--1..1")
@example("x=4:float32:1..1e999")
@example("x=4:int64:1e9.0..3")
@example("x=0x3")
@example("x=1..2..3..4x3")
@example("x=1...2")
@example("x=9..8")
def test_any_text_is_a_spec_or_a_usage_error_that_shows_it(text):
    try:
        spec = parse_spec(text)
    except UsageError as error:
        shown, spec = str(error), None
    if spec is None:
        assert text in shown
    else:
        assert 0 not in spec.shape
        assert spec.dtype in DTYPES


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("x=4:flaot32", "did you mean 'float32'?"),
        ("x=1x0x3", "1x0x3"),
        ("x=4:float32:2..1", "low is above high"),
        ("x=4:uint8:0..256", "uint8 holds 0..255"),
        ("x=4:int8:-129..0", "int8 holds -128..127"),
        ("x=4:int64:0.5..3", "whole numbers"),
        ("x=4:float32:0..1e999", "finite"),
        ("x=4:float32:a..b", "a..b"),
        ("x=0..8", "axis 0: min must be at least 1"),
        ("x=3x8..4", "axis 1: 8, 4, 4 are not in the order min, opt, max"),
        ("x=1..9..8", "axis 0: 1, 9, 8 are not in the order min, opt, max"),
        ("x=8..8x3", "axis 0: min and max are both 8; give the shape alone"),
        ("x=1..2..70000x70000", "elements at max"),
        ("x", "NAME=SHAPE"),
        ("x=1,3", "--input x=1x3x224x224"),
    ],
)
def test_a_bad_spec_says_why(text, word):
    with pytest.raises(UsageError) as caught:
        parse_spec(text)
    assert word in str(caught.value)


def test_ranges_of_dimensions_that_cannot_be():
    assert dynamic_fault((4, 3), {0: (1, 4, 8)}) is None
    assert dynamic_fault((4, 3), {2: (1, 4, 8)}) == "axis 2: the shape has axes 0 to 1"
    assert dynamic_fault((), {0: (1, 4, 8)}) == "axis 0: the shape has no axis"
    assert dynamic_fault((4, 3), {-1: (1, 3, 8)}) == "axis -1: the shape has axes 0 to 1"
    assert dynamic_fault((4, 3), {1: (1, 4, 8)}) == "axis 1: opt 4 is not the 3 of the shape"
    assert dynamic_fault((4, 3), {1: (1, 3)}) == "axis 1: a range is min, opt and max, and a step if it has one"
    assert dynamic_fault((4, 64), {1: (32, 64, 96, 32)}) is None
    assert dynamic_fault((4, 64), {1: (48, 64, 96, 32)}) == "axis 1: 48 is no multiple of the step 32"
    assert dynamic_fault((4, 64), {1: (32, 64, 96, 0)}) == "axis 1: the step must be at least 1"


def test_a_shape_with_ranges_in_words():
    assert shape_words((4, 3), ()) == str((4, 3))
    assert shape_words((4,), ()) == str((4,))
    assert shape_words((), ()) == str(())
    assert shape_words((4, 8), ((0, 1, 4, 8), (1, 2, 8, 8))) == "(1..4..8, 2..8)"
    assert shape_words((4, 8), ((0, 2, 4, 8, 2), (1, 2, 8, 8, 1))) == "(2..4..8/2, 2..8)"


def test_a_range_needs_both_ends():
    assert range_fault("float32", None, None) is None
    assert range_fault("float32", 0.0, None)
    assert range_fault("float32", None, 0.0)
    assert range_fault("float32", float("nan"), 1.0)


@given(shapes, st.sampled_from(DTYPES), st.integers(0, 1000))
def test_random_is_seeded_and_of_the_declared_shape_and_dtype(shape, dtype, seed):
    spec = TensorSpec("x", shape, dtype)
    value = np.asarray(spec.random(seed))
    assert value.shape == shape
    assert str(value.dtype) == dtype
    assert spec.size == value.size
    assert np.array_equal(value, spec.random(seed))


@given(st.integers(-100, 100), st.integers(0, 100), st.sampled_from(["int64", "int32", "int8", "float32"]))
def test_random_stays_in_its_range(low, span, dtype):
    high = min(low + span, 127)
    value = TensorSpec("x", (50,), dtype, low, high).random(3)
    assert value.min() >= low
    assert value.max() <= high


def test_the_ends_of_an_integer_range_are_reached():
    assert set(TensorSpec("x", (500,), "int64", 0, 3).random(0)) == {0, 1, 2, 3}
    assert set(TensorSpec("x", (500,), "int64").random(0)) == {0, 1}


def test_random_bits_are_the_same_everywhere():
    # Golden files and cache keys rest on it. PCG64's raw stream is fixed by NumPy's compatibility policy.
    assert TensorSpec("x", (4,), "int64", 0, 1000).random(7).tolist() == [945, 625, 684, 898]
