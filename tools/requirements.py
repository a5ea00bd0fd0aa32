"""Print the packages that pyproject.toml asks for: of the build, of running, and of the extras named."""

import sys
import tomllib
from pathlib import Path

pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
names = pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"]
for extra in sys.argv[1:]:
    names += pyproject["project"]["optional-dependencies"][extra]
print("\n".join(names))
