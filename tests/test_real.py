"""The marker `real` cannot be forgotten: where it is missing nothing starts ranks."""

import subprocess
import sys

import pytest


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
