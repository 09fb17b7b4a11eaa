"""What runs on the far side of an ssh link; sent there as text: Python 3.9+ and its standard library only.

``stage`` makes the folder for a bundle and stays as its guard, ``run`` runs the bundle. The input of both is the link:
when that closes, whoever closed it, the runner ends and the folder goes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

#: In a staging folder: the token of the link that it belongs to, and the folders above that go with it.
MARK = ".link"


def say(**answer: object) -> None:
    """A line of JSON for the near side."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def marked(folder: str) -> "tuple[str, list[str]]":
    """(token, parents) of a staging folder; nothing if it is none."""
    try:
        with open(os.path.join(folder, MARK)) as file:
            token, parents = json.load(file)
            return token, parents
    except (OSError, ValueError):
        return "", []


def remove(folder: str, parents: "list[str]") -> None:
    """Remove ``folder``, and those of ``parents`` that hold nothing else, the innermost first."""
    for _ in range(5):  # a runner that is just ending may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.2)
    for parent in parents:
        try:
            os.rmdir(parent)
        except OSError:
            break


def stage(root: str, own: bool, digest: str, token: str, stale_s: float, grace_s: float) -> None:
    """Make the folder ``root/digest`` or find it as a cut transfer left it, and guard it.

    Args:
        own: ``root`` is removed too, whoever made it.
        token: of this link; a later one with the same bundle takes the folder over.
        stale_s: other bundles' folders of that age are removed, left behind by a machine that was switched off.
        grace_s: how long the folder stays after the link was cut, for a new one to go on; nothing once it runs.
    """
    root = os.path.expanduser(root)
    folder = os.path.join(root, digest)
    parents = marked(folder)[1] or ([root] if own else [])
    parent = root
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        parents += [parent] if parent not in parents else []
        parent = os.path.dirname(parent)
    try:
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(root):
            other = os.path.join(root, name)
            if os.path.exists(os.path.join(other, MARK)) and os.stat(other).st_mtime < time.time() - stale_s:
                shutil.rmtree(other, ignore_errors=True)
        with open(os.path.join(folder, MARK), "w") as file:
            json.dump([token, parents], file)
    except OSError as error:
        remove(folder, parents)
        say(error=str(error))
        return
    say(root=root, folder=folder)
    for line in sys.stdin:
        if line.strip() == "running":
            grace_s = 0
        if line.strip() == "clean":
            break
    else:
        time.sleep(grace_s)
    if marked(folder)[0] == token:
        remove(folder, parents)
    say(gone=True)


def run(folder: str, words: "list[str]", live: bool = False) -> None:
    """Run ``folder/run.py`` with ``words``; prints how it ended and what it wrote.

    Args:
        live: what comes over the link is for the runner, but a line "end", which ends its input; every line that it
            writes is passed on at once.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    engines = os.path.join(cache, "edgeattn", "engines")
    child = subprocess.Popen(
        [sys.executable, os.path.join(folder, "run.py"), *words],
        stdin=subprocess.PIPE if live else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What runtimes write into a user's cache goes with the folder; TensorRT's engines take minutes, and stay.
        env={
            "EDGEATTN_ENGINES": engines,
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": os.path.join(folder, "cache"),
        },
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    stderr = child.stderr

    def watch() -> None:
        held = b""
        while piece := os.read(0, 4096):
            held += piece if live else b""
            *lines, held = held.split(b"\n")
            for line in lines:
                assert child.stdin is not None
                try:
                    if line == b"end":
                        child.stdin.close()
                    else:
                        child.stdin.write(line + b"\n")
                        child.stdin.flush()
                except (OSError, ValueError):
                    pass  # it has ended; its last words say why
        try:
            os.killpg(child.pid, 9)
        except OSError:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if live:
        errors: list[bytes] = []
        drain = threading.Thread(target=lambda: errors.append(stderr.read()), daemon=True)
        drain.start()
        for line in child.stdout:
            say(line=line.decode(errors="replace"))
        child.wait()
        drain.join()
        ended = (b"", b"".join(errors))
    else:
        ended = child.communicate()
    out, told = (text.decode(errors="replace") for text in ended)
    died = signal.Signals(-child.returncode).name if child.returncode < 0 else ""
    say(code=child.returncode, died=died, out=out, errors=told)
    os._exit(0)


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    stage(**options) if sys.argv[1] == "stage" else run(**options)
