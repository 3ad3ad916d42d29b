"""NVML as the tests want it. FAKE_GPUS is a JSON list of {name, total, used, processes, uuid}; unset: no driver.

Sizes are in GiB, `processes` is a list of [pid, GiB]; all but `total` may be left out.
"""

import json
import os
from types import SimpleNamespace

GIB = 1 << 30


class NVMLError(Exception):
    """The base of all NVML errors."""


def nvmlInit():  # noqa: N802
    if "FAKE_GPUS" not in os.environ:
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown():  # noqa: N802
    pass


def nvmlDeviceGetCount():  # noqa: N802
    return len(json.loads(os.environ["FAKE_GPUS"]))


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    return {"index": index, **json.loads(os.environ["FAKE_GPUS"])[index]}


def nvmlDeviceGetMemoryInfo(handle):  # noqa: N802
    total, used = int(handle["total"] * GIB), int(handle.get("used", 0) * GIB)
    return SimpleNamespace(total=total, used=used, free=total - used)


def nvmlDeviceGetName(handle):  # noqa: N802
    return handle.get("name", "NVIDIA Test GPU")


def nvmlDeviceGetUUID(handle):  # noqa: N802
    return handle.get("uuid", f"GPU-{handle['index']:08x}-0000-4000-8000-000000000000")


def nvmlDeviceGetComputeRunningProcesses(handle):  # noqa: N802
    return [SimpleNamespace(pid=pid, usedGpuMemory=int(size * GIB)) for pid, size in handle.get("processes", [])]
