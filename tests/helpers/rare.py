"""What plants the faults of rare_faults/ into a run."""

import json
from pathlib import Path

from helpers import HELPERS


def rare_faults(folder: Path, *rare: dict, usual: tuple[dict, ...] = ()) -> dict[str, str]:
    """The environment of a run in `folder` with these faults, and with those of faults/."""
    return {
        "PYTHONPATH": str(HELPERS / "rare_faults"),
        "RARE_FAULTS": json.dumps(rare),
        "FAULTS": json.dumps(usual),
        "FAULT_MARKERS": str(folder / "markers"),
    }
