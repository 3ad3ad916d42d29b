"""What every process of a run does before anything else, since its folder is on PYTHONPATH.

Unless SHOW_ALL_PACKAGES is set, it hides the packages that only tests/requirements.txt brings, since users have none
of them. LLaMA-Factory, transformers and accelerate import whatever else there is, so it also hides from ranks what their
configuration does not use. Together that is two fifths of a rank's start. In ranks it plants the faults of FAULTS. In
a test that is not marked `real` it refuses to start any.
"""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import only_real  # noqa: F401

IS_RANK = "LOCAL_RANK" in os.environ
HIDDEN = {"mlflow", "sklearn", "tensorboard", "wandb"}
# What in a configuration uses a package; nothing here needs the last two.
USES = {
    "deepspeed": "deepspeed:",
    "matplotlib": "plot_loss: true",
    "scipy": None,
    "torchvision": None,
}
config = Path(sys.argv[-1])
if IS_RANK and config.is_file():
    text = config.read_text(encoding="utf-8")
    HIDDEN |= {name for name, use in USES.items() if not use or use not in text}


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
