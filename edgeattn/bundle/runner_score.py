"""The runner's part that scores held-out samples: top-1 accuracy of an artifact on this machine.

Standard library, NumPy and the runtime; Python 3.9 and newer. Beside run.py in a bundle as run_score.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
else:
    import run  # run.py, beside this file

SAMPLES = "heldout.npz"


def score(manifest: dict[str, Any], part: dict[str, Any], threads: int) -> dict[str, Any]:
    """How many of the bundle's held-out samples the artifact gets right, and how many its reference does."""
    import numpy as np

    task = part["task"]
    if not run.runtime_name(part):
        raise run.lacking([part])
    execute, runtime = run.open_entry(part, "main", threads)
    spec, first = part["entries"]["main"]["inputs"][0], part["entries"]["main"]["outputs"][0]["name"]
    with np.load(run.place(SAMPLES), allow_pickle=False) as data:
        x, y = data["x"], data["y"]
    correct, batch = 0, spec["shape"][0]
    for start in range(0, len(y), batch):
        rows = np.arange(start, start + batch) % len(y)  # the last batch is filled up with the first samples
        logits = execute({spec["name"]: _prepared(x[rows], manifest["recipe"]["preprocess"], spec)})[first]
        wanted = y[start : start + batch]
        correct += int((logits.argmax(-1)[: len(wanted)] == wanted).sum())
    drop = (task["reference_correct"] - correct) / len(y)
    return {
        "backend": part["backend"],
        "runtime": runtime,
        "threads": threads,
        "samples": len(y),
        "correct": correct,
        "reference_correct": task["reference_correct"],
        "accuracy": correct / len(y),
        "drop": drop,
        "holds": True,
        "text": (
            f"{manifest['name']}: {part['backend']} under {runtime} gets {correct} of {len(y)} held-out samples right, "
            f"{correct / len(y):.2%}; PyTorch {task['reference_correct']}, a drop of {100 * drop:.2f} points"
        ),
    }


def _prepared(raw: Any, preprocess: Any, spec: dict[str, Any]) -> Any:
    """Raw samples (N, C, H, W) as the artifact takes them: EdgeAttn's own preprocessing, in float32."""
    import numpy as np

    values = raw.astype(np.float32)
    if preprocess:
        along = (1, -1) + (1,) * (values.ndim - 2)
        mean, std = (np.asarray(preprocess[key], np.float32).reshape(along) for key in ("mean", "std"))
        values = (values * np.float32(preprocess["scale"]) - mean) / std
    if spec["layout"] == "nhwc":
        values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
    return values.astype(spec["dtype"])
