"""Load every file of `hostile.live_files` for real, each in a process of its own, and name those that leave no mark.

Run by `test_hostile.py`, in a folder of its own: `python run_live.py FOLDER`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import hostile
import joblib
import numpy as np
import torch


def load_twice(file):
    pickle.load(file)
    pickle.load(file)


LOADERS = {
    "torch": lambda path: torch.load(path, weights_only=False),
    "pickle": lambda path: pickle.loads(path.read_bytes()),
    "stream": lambda path: pickle.load(io.BytesIO(path.read_bytes())),
    "twice": lambda path: load_twice(io.BytesIO(path.read_bytes())),
    "python": lambda path: pickle._Unpickler(path.open("rb")).load(),
    "joblib": lambda path: joblib.load(path),
    "numpy": lambda path: np.load(path, allow_pickle=True),
    "npz": lambda path: np.load(path, allow_pickle=True)["a"],
    "member": lambda path: pickle.loads(zipfile.ZipFile(path).read("m/data.pkl")),
}


def leaves_a_mark(path, loader, mark):
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        signal.alarm(30)
        try:
            LOADERS[loader](path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    marks = [found for found in mark.parent.iterdir() if found.name.startswith(mark.name)]
    for found in marks:
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink()
    return bool(marks)


def main():
    folder = Path(sys.argv[1])
    mark = folder / "beside" / "canary"
    files = hostile.live_files(folder / "beside", mark)
    dead = []
    for title, (content, loader) in files.items():
        (folder / "live.pt").write_bytes(content)
        if not leaves_a_mark(folder / "live.pt", loader, mark):
            dead.append(title)
    print(json.dumps({"files": len(files), "dead": dead}))


if __name__ == "__main__":
    main()
