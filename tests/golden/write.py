"""Write golden runs with the streamfisher that is on the path: `python tests/golden/write.py FOLDER NAME...`"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import golden_runs

ANALYSES = ("--blocks", "layer,module,none", "--center", "both")
OF_THE_PROCESS = ("log.jsonl", "lock", "lock.ranks")


def write(path: Path, name: str) -> None:
    """Collect a run, solve it, and leave its `spectrum.json` in it as `streamfisher run` would."""
    run = golden_runs.collect(path, name)
    target = path / "spectrum.json"
    command = [sys.executable, "-m", "streamfisher", "spectrum", str(path), *ANALYSES, "--out", str(target), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if hasattr(run.store, "mark_result"):
        run.store.markers.mark_result(target)
    for name in OF_THE_PROCESS:
        (path / name).unlink(missing_ok=True)


def pack(path: Path, archive: Path) -> None:
    """Put a run into an archive that says nothing of the machine, the user or the time."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz") as file:
        file.add(path, path.name, filter=anonymous)


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for each in names:
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary) / each, each)
            pack(Path(temporary) / each, Path(folder) / f"{each}.tar.xz")
    (Path(folder) / "arithmetic.txt").write_text(golden_runs.arithmetic() + "\n")
