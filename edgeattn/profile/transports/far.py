"""Runs a bundle on the far side of an ssh link; sent there as text: Python 3.9+ and its standard library only.

Its input is the link: when that closes, the runner and everything in the staging folder go, whoever closed it.
"""

import json
import os
import shutil
import subprocess
import sys
import threading


def main(folder: str, parents: "list[str]", words: "list[str]") -> None:
    """Run ``folder/run.py`` with ``words``; prints how it ended and what it wrote.

    ``parents`` are the folders to remove after ``folder``, where nothing else is in them.
    """
    child = subprocess.Popen(
        [sys.executable, os.path.join(folder, "run.py"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What runtimes write into a user's cache goes with the folder.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": os.path.join(folder, "cache")},
        start_new_session=True,
    )

    def watch() -> None:
        while os.read(0, 4096):
            pass
        try:
            os.killpg(child.pid, 9)
        except OSError:
            pass
        shutil.rmtree(folder, ignore_errors=True)
        for parent in parents:
            try:
                os.rmdir(parent)
            except OSError:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    out, errors = child.communicate()
    answer = {"code": child.returncode, "out": out.decode(errors="replace"), "errors": errors.decode(errors="replace")}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])
