"""Control groups, as those of a container: what limits this process, in the files of both versions."""

import math
from collections.abc import Iterator
from pathlib import Path


def control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each control group that the process is in, its own first, below the folder of ``proc`` and
    ``sys``."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        controllers, _, inside = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / inside.lstrip("/")
        for folder in [group, *group.parents]:
            yield (1 if controllers else 2), folder
            if folder == top:
                break


def processors_allowed(root: str | Path = "/") -> int | None:
    """As many processors as the groups give time of, rounded up; None where none sets a limit."""
    found = []
    for version, folder in control_groups(Path(root), "cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota = " ".join(text_of(folder / name) for name in names).split()
        if len(quota) == 2 and all(word.isdecimal() and int(word) for word in quota):  # else "max", or -1
            found.append(math.ceil(int(quota[0]) / int(quota[1])))
    return min(found, default=None)


def text_of(path: Path) -> str:
    """The text of a file of the system; none where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
