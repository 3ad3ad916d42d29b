"""What every process does before anything else that finds the fake NVML."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "startup"))

import only_real  # noqa: E402, F401
