"""What every process of a run does before anything else, since its folder is on PYTHONPATH.

It hides the packages that only tests/requirements.txt brings, unless SHOW_ALL_PACKAGES is set: users have none of
them, and importing them would be a fifth of each rank's start. In ranks it plants the faults of FAULTS.
"""

import os
import sys
from importlib.machinery import PathFinder

TEST_ONLY = {"mlflow", "sklearn", "tensorboard", "wandb"}


class WithoutTestPackages(PathFinder):
    """Finds what is on sys.path, but no package that only the tests have."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in TEST_ONLY:
            return None
        return super().find_spec(name, path, target)


if "SHOW_ALL_PACKAGES" not in os.environ:
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTestPackages
if "LOCAL_RANK" in os.environ and "FAULTS" in os.environ:
    import faults

    faults.plant()
