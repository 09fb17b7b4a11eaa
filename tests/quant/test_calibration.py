"""Calibration samples from every source, what is refused, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edgeattn import recipe
from edgeattn.core.errors import CheckFailed, ToolchainMissing, UsageError
from edgeattn.core.specs import TensorSpec
from edgeattn.quant.calibration import CalibrationStream, open_source
from edgeattn.quant.sources import MOST, Form, Yielded
from edgeattn.recipe import Preprocess, preprocessed
from tests.quant.streams import IMAGE, TEXT, stream, text_arrays, yielded

ROOT = Path(__file__).resolve().parents[2]
PREPROCESS = Preprocess(scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
RNG = np.random.default_rng(0)
RAW = RNG.integers(0, 256, (20, 3, 8, 12), dtype=np.uint8)


def all_of(feeds, name="x"):
    return np.concatenate([feed[name] for feed in feeds])


def write_images(folder, images, kind="png"):
    from PIL import Image

    folder.mkdir(exist_ok=True, parents=True)
    for i, image in enumerate(images):
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{i:03}.{kind}")
    return folder


# Sources


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed", "folder"])
def test_raw_samples_of_every_file_are_preprocessed(kind, tmp_path):
    if kind == "npy":
        np.save(path := tmp_path / "x.npy", RAW)
    elif kind == "folder":
        path = write_images(tmp_path / "images", RAW)
    else:
        (np.savez if kind == "stored" else np.savez_compressed)(path := tmp_path / "x.npz", x=RAW, y=np.arange(20))
    feeds = list(stream(path, preprocess=PREPROCESS))
    assert {feed["x"].shape for feed in feeds} == {(1, 3, 8, 12)}
    assert {feed["x"].dtype for feed in feeds} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(all_of(feeds), preprocessed(RAW, PREPROCESS))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4", "int32"])
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_of_any_dtype_and_some_of_them(dtype, compressed, tmp_path):
    values = RAW.astype(dtype)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", other=np.ones(7), x=values)
    some = stream(tmp_path / "x.npz", samples=7, seed=3)
    assert len(some) == 7
    np.testing.assert_array_equal(all_of(some), RAW[some.chosen].astype(np.float32))


def test_heldout_files_are_read_as_the_reference_reads_them():
    from edgeattn.pipeline.stages.reference import heldout_samples

    resolved = recipe.resolve("fmvit-digits")
    spec = resolved.recipe.specs()[0]
    feeds = stream(resolved.heldout, spec, preprocess=resolved.recipe.preprocess)
    x, _ = heldout_samples(resolved, spec.shape)
    np.testing.assert_array_equal(all_of(feeds), x)


def test_images_are_sorted_nested_and_other_files_left_out(tmp_path):
    write_images(tmp_path / "b", RAW[:2])
    write_images(tmp_path / "a" / "deep", RAW[2:4], "bmp")
    write_images(tmp_path / ".hidden", RAW[4:5])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._000.png").write_bytes(b"a resource fork")
    found = stream(tmp_path)
    assert [Path(found.label(i)).relative_to(tmp_path).as_posix() for i in range(4)] == [
        "a/deep/000.bmp",
        "a/deep/001.bmp",
        "b/000.png",
        "b/001.png",
    ]
    np.testing.assert_array_equal(all_of(found), RAW[[2, 3, 0, 1]].astype(np.float32))


def test_images_are_resized_by_their_shorter_side_and_cropped_in_the_middle(tmp_path):
    wide = np.zeros((2, 1, 16, 64), np.uint8)  # 8 x 12 shows the middle 24 columns
    wide[:, :, :, 18:46] = 200
    wide[1, :, :, 32:] = 10
    spec = TensorSpec("x", (1, 1, 8, 12))
    first, second = all_of(stream(write_images(tmp_path, wide), spec))
    assert (first == 200).all()
    assert (second[0, :, :5] == 200).all()
    assert (second[0, :, 7:] == 10).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_have_the_models_channels(channels, tmp_path):
    write_images(tmp_path, RAW[:3])
    write_images(tmp_path / "grey", RAW[3:5, :1])
    feeds = list(stream(tmp_path, TensorSpec("x", (1, channels, 8, 12))))
    assert {feed["x"].shape for feed in feeds} == {(1, channels, 8, 12)}
    if channels == 4:
        assert (all_of(feeds)[:, 3] == 255).all()


def module(folder, text, name="samples"):
    (folder / f"{name}.py").write_text(text)
    return f"{name}.py:make"


FUNCTION = """
import numpy as np, torch
import neighbour

def make():
    x = np.arange(6 * 12, dtype=np.float32).reshape(6, 3, 4)
    {body}
"""


@pytest.mark.parametrize(
    "body",
    [
        "return x",
        "return list(x)",
        "yield from x",
        "yield x[:4]; yield x[4:]",
        "yield from ((row, 7) for row in x)",
        "yield [torch.from_numpy(x), torch.zeros(6)]",
        "yield from ({'x': row, 'label': 3} for row in x)",
        "return torch.from_numpy(x)",
    ],
)
def test_a_functions_samples_are_taken_as_they_are(body, tmp_path):
    (tmp_path / "neighbour.py").write_text("")
    text = module(tmp_path, FUNCTION.format(body=body))
    found = stream(text, TensorSpec("x", (1, 3, 4)), preprocess=PREPROCESS, folder=tmp_path)
    np.testing.assert_array_equal(all_of(found), np.arange(72, dtype=np.float32).reshape(6, 3, 4))


def test_a_function_of_an_installed_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module(tmp_path, "def make():\n    return [[1.0, 2.0], [3.0, 4.0]]\n", "calibration_data_here")
    with pytest.raises(UsageError, match="do not fit"):  # a list is a tuple of inputs
        stream("calibration_data_here:make", TensorSpec("x", (1, 2)))
    module(tmp_path, "def make():\n    yield {'x': [1.0, 2.0]}\n    yield {'x': [3.0, 4.0]}\n", "more_data_here")
    assert all_of(stream("more_data_here:make", TensorSpec("x", (1, 2)))).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", ["npz", "compressed", "dicts", "tuples"])
def test_several_inputs_keep_their_dtypes(kind, tmp_path):
    arrays = text_arrays(5)
    if kind in ("npz", "compressed"):
        (np.savez if kind == "npz" else np.savez_compressed)(tmp_path / "t.npz", **arrays)
        found = stream(tmp_path / "t.npz", *TEXT)
    elif kind == "dicts":
        found = yielded([{k: v[i] for k, v in arrays.items()} for i in range(5)], *TEXT)
    else:
        found = yielded(list(zip(*arrays.values(), strict=True)), *TEXT)
    feeds = list(found)
    assert len(feeds) == len(found) == 3
    for spec in TEXT:
        values = all_of(feeds, spec.name)
        assert values.dtype == spec.dtype
        np.testing.assert_array_equal(values[:5], arrays[spec.name].astype(spec.dtype))
        # The last feed is filled up with its own last sample.
        np.testing.assert_array_equal(values[5], values[4])


def test_inputs_without_a_batch_in_common_come_as_whole_feeds(tmp_path):
    specs = (TensorSpec("x", (1, 4)), TensorSpec("table", (3, 2)), TensorSpec("t", ()))
    arrays = {"x": RNG.random((4, 1, 4)), "table": RNG.random((4, 3, 2)), "t": np.arange(4.0)}
    np.savez(tmp_path / "x.npz", **arrays)
    feeds = list(stream(tmp_path / "x.npz", *specs))
    assert [tuple(feed[s.name].shape for s in specs) for feed in feeds] == [((1, 4), (3, 2), ())] * 4
    assert [float(feed["t"]) for feed in feeds] == [0, 1, 2, 3]
    feeds[0]["x"] += 1  # a feed is the reader's own


def test_golden_feeds_are_a_stream_too():
    feeds = [{"x": RNG.random((2, 4), np.float32)} for _ in range(3)]
    found = CalibrationStream.of_feeds(feeds, [TensorSpec("x", (2, 4))], "golden samples")
    np.testing.assert_array_equal(all_of(found), all_of(feeds))
    assert found.describe()["source"] == "golden samples"


# Subsets and digests


def test_a_subset_is_seeded_and_in_order(tmp_path):
    np.save(tmp_path / "x.npy", RAW)
    chosen = [stream(tmp_path / "x.npy", samples=8, seed=seed).chosen.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] == sorted(set(chosen[0]))
    assert chosen[0] != chosen[2]
    assert len(chosen[0]) == 8
    whole = stream(tmp_path / "x.npy", samples=20, seed=5)
    assert whole.chosen.tolist() == list(range(20))


def test_the_digest_is_of_the_samples_alone(tmp_path):
    np.save(tmp_path / "x.npy", RAW)
    np.savez_compressed(tmp_path / "y.npz", x=RAW.astype(np.float64))
    write_images(tmp_path / "images", RAW)
    sources = [tmp_path / "x.npy", tmp_path / "y.npz", tmp_path / "images"]
    digests = {stream(source, preprocess=PREPROCESS, samples=9).describe()["sha256"] for source in sources}
    assert len(digests) == 1
    of_batches = stream(sources[0], TensorSpec("x", (4, 3, 8, 12)), preprocess=PREPROCESS, samples=9)
    assert of_batches.describe()["sha256"] in digests
    others = [{"preprocess": None}, {"seed": 1}, {"samples": 8}]
    for other in others:
        found = stream(sources[0], **{"preprocess": PREPROCESS, "samples": 9, **other})
        assert found.describe()["sha256"] not in digests
    backwards = yielded([*preprocessed(RAW, PREPROCESS)[::-1]]).describe()["sha256"]
    assert backwards != yielded([*preprocessed(RAW, PREPROCESS)]).describe()["sha256"]


def test_the_digest_stays_what_it_is():
    # Manifests of different versions can be compared.
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    digest = yielded([*x], TensorSpec("x", (1, 3, 4))).describe()["sha256"]
    assert digest == "75b69236fbcc83817d57d4ae2c1ac0969d2fc4f2e030279a5576bbfe49c0cd17"


def test_the_description_is_plain(tmp_path):
    np.save(tmp_path / "x.npy", RAW)
    found = stream(tmp_path / "x.npy", samples=6, seed=2).describe()
    assert json.loads(json.dumps(found)) == found
    assert (found["samples"], found["of"], found["seed"], len(found["sha256"])) == (6, 20, 2, 64)


def test_it_can_be_gone_through_again_and_again(tmp_path):
    np.save(tmp_path / "x.npy", RAW)
    found = stream(tmp_path / "x.npy")
    np.testing.assert_array_equal(all_of(found), all_of(found))
    # Two readers at once do not disturb each other.
    pairs = list(zip(found, found, strict=True))
    np.testing.assert_array_equal(all_of(a for a, _ in pairs), all_of(b for _, b in pairs))


def test_samples_that_change_between_passes_are_noticed(tmp_path):
    rng = np.random.default_rng()
    found = CalibrationStream(Yielded(lambda: rng.random((4, 2, 3)), "noise", Form.of([TensorSpec("x", (1, 2, 3))])))
    with pytest.raises(CheckFailed, match="have changed") as caught:
        list(found)
    assert caught.value.value == "noise"
    np.save(tmp_path / "x.npy", RAW)
    files = stream(tmp_path / "x.npy")
    list(files)
    np.save(tmp_path / "x.npy", RAW[::-1].copy())
    with pytest.raises(CheckFailed, match="have changed"):
        list(files)


# What is refused


def refusal(make, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        make(*args, **kwargs).survey()
    error = caught.value
    assert error.exit_code == 2
    return error, str(error)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_wrong_shape_is_refused_at_once(name, tmp_path):
    (np.save if name == "x.npy" else lambda p, x: np.savez(p, x=x))(tmp_path / name, RAW.transpose(0, 2, 3, 1))
    _, text = refusal(stream, tmp_path / name)
    assert "(8, 12, 3)" in text
    assert "(3, 8, 12)" in text
    assert str(tmp_path / name) in text


def test_a_wrong_shape_from_a_function_names_the_item():
    items = [*RAW[:3], RAW[0][:2]]
    _, text = refusal(yielded, items)
    assert "item 3 of items" in text
    assert "(2, 8, 12)" in text
    assert "(3, 8, 12)" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(bad, tmp_path):
    x = RAW.astype(np.float64)
    x[5, 1, 2, 3] = bad
    np.save(tmp_path / "x.npy", x)
    error, text = refusal(stream, tmp_path / "x.npy", preprocess=PREPROCESS)
    assert "not finite" in text
    assert "1 of 288 numbers of input x" in text
    assert error.where == f"sample 5 of {tmp_path / 'x.npy'}"


def test_constant_samples_are_refused_and_some_are_counted():
    levels = np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 8, 12), np.float32)
    _, text = refusal(yielded, levels)
    assert "all constant" in text
    assert yielded([*levels, *RAW]).survey().constant == 6


def test_samples_that_are_all_the_same_are_refused():
    _, text = refusal(yielded, [RAW[0]] * 5)
    assert "all the same" in text
    assert yielded([RAW[0]]).survey().constant == 0
    assert yielded([RAW[0], RAW[0], RAW[1]]).survey().constant == 0


def test_no_samples_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", RAW[:0])
    for make, source in ((stream, tmp_path / "x.npy"), (stream, tmp_path), (yielded, [])):
        error, text = refusal(make, source)
        assert "there are no calibration samples" in text
        assert error.fix


def test_an_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, RAW[:3])
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])
    error, _ = refusal(stream, tmp_path)
    assert error.value == str(tmp_path / "001.png")
    (tmp_path / "001.png").write_text("no image")
    error, _ = refusal(stream, tmp_path)
    assert error.value == str(tmp_path / "001.png")


def test_images_of_16_bits_are_refused(tmp_path):
    from PIL import Image

    Image.fromarray(RNG.integers(0, 65536, (8, 12), dtype=np.uint16)).save(tmp_path / "deep.png")
    _, text = refusal(stream, tmp_path)
    assert "more than 8 bits" in text
    assert "deep.png" in text


@pytest.mark.parametrize("specs", [TEXT, (TensorSpec("x", (1, 10)),), (TensorSpec("x", (1, 5, 8, 8)),)])
def test_images_for_a_model_that_takes_none(specs, tmp_path):
    _, text = refusal(stream, tmp_path, *specs)
    assert "images cannot be the model's input" in text


def test_without_pillow_the_install_line_is_given(tmp_path, monkeypatch):
    write_images(tmp_path, RAW[:2])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainMissing) as caught:
        stream(tmp_path)
    assert caught.value.fix == "pip install pillow"


def test_damaged_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", RAW)
    np.savez(tmp_path / "x.npz", x=RAW)
    np.savez_compressed(tmp_path / "y.npz", x=RAW)
    for name in ("x.npy", "x.npz", "y.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        _, text = refusal(stream, tmp_path / name)
        assert "cannot be read" in text
        (tmp_path / name).write_bytes(b"")
        _, text = refusal(stream, tmp_path / name)
        assert "cannot be read" in text


def test_a_flipped_byte_in_a_compressed_file_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=RAW)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
    (tmp_path / "x.npz").write_bytes(bytes(data))
    _, text = refusal(stream, tmp_path / "x.npz")
    assert "cannot be read" in text


def test_arrays_of_other_kinds_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "not numbers" in refusal(stream, tmp_path / "x.npy")[1]
    np.save(tmp_path / "x.npy", RAW.astype(np.complex64))
    assert "not numbers" in refusal(stream, tmp_path / "x.npy")[1]
    np.save(tmp_path / "x.npy", np.asfortranarray(RAW))
    assert "ascontiguousarray" in refusal(stream, tmp_path / "x.npy")[1]


def test_npz_files_that_lack_something_are_refused(tmp_path):
    arrays = text_arrays(4)
    np.savez(tmp_path / "t.npz", ids=arrays["ids"], h=arrays["h"])
    error, text = refusal(stream, tmp_path / "t.npz", *TEXT)
    assert error.value == "mask"
    assert "it holds h, ids" in text
    np.savez(tmp_path / "t.npz", **{**arrays, "h": arrays["h"][:3]})
    assert "ids 4, mask 4, h 3" in refusal(stream, tmp_path / "t.npz", *TEXT)[1]
    np.save(tmp_path / "t.npy", arrays["ids"])
    assert "one input only" in refusal(stream, tmp_path / "t.npy", *TEXT)[1]


@pytest.mark.parametrize(("ids", "said"), [(np.float32([[1, 2]]), "float32"), (np.int64([[1, 300]]), "1 to 300")])
def test_whole_numbers_must_fit_their_dtype(ids, said):
    _, text = refusal(yielded, ids, TensorSpec("ids", (1, 2), "uint8"))
    assert said in text
    assert "input ids takes uint8" in text


def test_functions_that_fail_are_shown_where(tmp_path):
    spec = TensorSpec("x", (1, 2))
    text = module(tmp_path, "def make():\n    yield {'x': [1.0, 2.0]}\n    raise KeyError('no more')\n")
    error, said = refusal(stream, text, spec, folder=tmp_path)
    assert "KeyError" in said
    assert str(error.where).endswith("samples.py:3")
    assert "is no function" in refusal(stream, module(tmp_path, "make = 3"), spec, folder=tmp_path)[1]
    assert "did you mean 'maker'" in refusal(stream, module(tmp_path, "maker = 3"), spec, folder=tmp_path)[1]
    assert "SyntaxError" in refusal(stream, module(tmp_path, "def make(:"), spec, folder=tmp_path)[1]
    assert "TypeError" in refusal(stream, module(tmp_path, "def make(): return 3"), spec, folder=tmp_path)[1]
    assert "cannot be found" in refusal(stream, "no_such_module_here:make", spec)[1]


def test_a_function_that_is_used_up_is_noticed():
    items = iter([*RAW])
    _, text = refusal(yielded, items)
    assert "fewer than before" in text


def test_a_function_that_never_ends_is_noticed(monkeypatch):
    monkeypatch.setattr("edgeattn.quant.sources.MOST", 50)
    assert MOST > 50

    def forever():
        while True:
            yield RAW[0]

    with pytest.raises(UsageError, match="do not end"):
        CalibrationStream(Yielded(forever, "forever", Form.of([IMAGE])))


@pytest.mark.parametrize("item", ["text", {"y": RAW[0]}, [np.array("a")], [[1, 2], [3]]])
def test_items_that_are_no_samples_are_refused(item):
    error, _ = refusal(yielded, [item])
    assert "item 0 of items" in str(error.where)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "x.txt").write_text("no samples")
    form = Form.of([IMAGE])
    for text in ("x.txt", "nothing.npz", "nothing", "nothing:"):
        with pytest.raises(UsageError) as caught:
            open_source(text, form, str(tmp_path))
        assert caught.value.value == text
        assert "package.module:function" in str(caught.value.fix)


def test_preprocessing_for_other_channels_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", RAW[:, :1])
    error, _ = refusal(stream, tmp_path / "x.npy", TensorSpec("x", (1, 1, 8, 12)), preprocess=PREPROCESS)
    assert error.where == "preprocess.mean"


# Memory


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed", "function"])
def test_memory_does_not_grow_with_the_samples(kind, tmp_path):
    spec, peaks = TensorSpec("x", (4, 3, 64, 64)), []
    for n in (64, 1280):
        x = np.tile(RNG.integers(0, 256, (64, 3, 64, 64), dtype=np.uint8), (n // 64, 1, 1, 1))
        if kind == "npy":
            np.save(path := tmp_path / "x.npy", x)
        elif kind != "function":
            (np.savez if kind == "stored" else np.savez_compressed)(path := tmp_path / "x.npz", x=x)
        del x
        rows = np.random.default_rng(0).random((64, 3, 64, 64), np.float32)
        source = Yielded(lambda n=n, rows=rows: (rows[i % 64] for i in range(n)), "f", Form.of([spec]))
        tracemalloc.start()
        found = CalibrationStream(source) if kind == "function" else stream(path, spec, samples=100_000)
        assert sum(len(feed["x"]) for feed in found) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 1280 samples are 63 MB as floats; what grows is 8 bytes for the number of each.
    assert peaks[1] < peaks[0] + 200_000
    assert peaks[1] < 5e6


@pytest.mark.slow
@pytest.mark.parametrize("source", ["npy", "npz", "folder", "function"])
def test_a_calibrations_peak_memory_is_within_a_tenth(source):
    # Fewer samples would be less than a tenth of the process if all were kept.
    command = [sys.executable, str(ROOT / "benchmarks" / "calibration_memory.py"), "--samples", "10000"]
    done = subprocess.run([*command, "--sources", source], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
