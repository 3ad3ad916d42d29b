"""What every process of a run does before anything else, since its folder is on PYTHONPATH.

Unless SHOW_ALL_PACKAGES is set, it hides the packages that only tests/requirements.txt brings, since users have none
of them, and from ranks that train without DeepSpeed also deepspeed, since accelerate imports whatever there is: both
together are a third of a rank's start. In ranks it plants the faults of FAULTS.
"""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

IS_RANK = "LOCAL_RANK" in os.environ
HIDDEN = {"mlflow", "sklearn", "tensorboard", "wandb"}
config = Path(sys.argv[-1])
if IS_RANK and config.is_file() and "deepspeed:" not in config.read_text(encoding="utf-8"):
    HIDDEN.add("deepspeed")


class WithoutHidden(PathFinder):
    """Finds what is on sys.path, but for HIDDEN."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)


if "SHOW_ALL_PACKAGES" not in os.environ:
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutHidden
if IS_RANK and "FAULTS" in os.environ:
    import faults

    faults.plant()
