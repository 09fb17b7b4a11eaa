import pytest

from edgeattn.core import errors
from edgeattn.core.errors import EdgeAttnError, closest


@pytest.mark.parametrize(
    ("name", "code"),
    [("CheckFailed", 1), ("UsageError", 2), ("ToolchainMissing", 3), ("ConversionFailed", 4), ("DeviceUnreachable", 5)],
)
def test_exit_codes_are_the_documented_ones(name, code):
    assert getattr(errors, name).exit_code == code


def test_the_text_has_the_parts_in_order_and_leaves_out_what_is_not_known():
    error = EdgeAttnError("it failed", value=0, where="a.toml, seed", why="because", fix="do this", details=["x", "y"])
    assert str(error).splitlines() == [
        "it failed",
        "  value: 0",
        "  where: a.toml, seed",
        "  why: because",
        "  fix: do this",
        "    x",
        "    y",
    ]
    assert str(EdgeAttnError("it failed")) == "it failed"


@pytest.mark.parametrize(
    ("given", "found"), [("shpae", "shape"), ("dtpye", "dtype"), ("zzz", None), ("", None), ("shape", "shape")]
)
def test_closest(given, found):
    assert closest(given, ["shape", "dtype", "low", "high"]) == found
