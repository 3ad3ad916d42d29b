"""The helpers of the tests: the marker `real` cannot be forgotten, and a failure shows what it saw."""

import subprocess
import sys

import pytest

from helpers.launcher import says


def test_a_test_that_is_not_marked_cannot_start_torchrun():
    with pytest.raises(RuntimeError, match="mark it with pytest.mark.real"):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"])


def test_a_launcher_that_such_a_test_starts_cannot_either(launcher, write_config):
    done = launcher(write_config())
    assert "starts ranks: mark it with pytest.mark.real" in done.stderr
    assert done.returncode != 0


def test_a_launcher_in_this_process_cannot_either(here, write_config):
    with pytest.raises(RuntimeError, match="mark it with pytest.mark.real"):
        here(write_config())


def test_what_is_not_said_is_shown_with_what_was():
    with pytest.raises(AssertionError, match=r"(?s)not said: \^loss.*step 5\nno more"):
        says("step 5\nno more", r"^loss \d")


def test_what_is_said_is_found_in_any_line():
    assert says("step 5\nloss 7.1\n", r"^loss (.*)$")[1] == "7.1"
