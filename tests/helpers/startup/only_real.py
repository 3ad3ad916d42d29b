"""Only a test that is marked `real` starts ranks, or another Python with heavy packages: in others that fails."""

import os
import sys

LIGHT_TEST = "LIGHT_TEST"  # the name of the test that is running, unless it is real
# In the command that starts one.
HEAVY = {"torch.distributed.run", "--tokenize", "ask_python"}


def refuse_ranks(event: str, args: tuple) -> None:
    """An audit hook, in pytest's own process and in those that its tests start."""
    if event == "subprocess.Popen" and LIGHT_TEST in os.environ:
        if any(word in str(argument) for argument in args[1] for word in HEAVY):
            raise RuntimeError(
                f"{os.environ[LIGHT_TEST]} starts ranks: mark it with pytest.mark.real, "
                "or make the fixture that does with helpers.real.real_fixture"
            )


sys.addaudithook(refuse_ranks)
