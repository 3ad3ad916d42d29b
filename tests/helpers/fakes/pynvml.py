"""NVML as the tests want it. FAKE_GPUS is a JSON list of GPUs; unset: no driver.

A GPU is {name, total, used, processes, uuid, capability, unsupported}: sizes in GiB, `processes` a list of
[pid, GiB], `capability` such as [8, 0] (the default is [9, 0]), `unsupported` the names of the calls that answer
"Not Supported" for it; one that is `lost` has no handle; `nvlink` are the numbers of the GPUs that it reaches by
NVLink. All but `total` may be left out.

FAKE_GPUS_DRIVER is a JSON object {cuda, driver, unsupported, missing}: `cuda` is the driver's CUDA version as NVML
says it (13000, the default, is 13.0), `driver` its own; `unsupported` and `missing` are the names of calls that answer
"Not Supported" and "Shared Library Not Found" on this machine.
"""

import functools
import json
import os
from types import SimpleNamespace

GIB = 1 << 30


class NVMLError(Exception):
    """The base of all NVML errors."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801
    """The call is not there for this GPU or machine."""


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801
    """There is no driver."""


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801
    """A shared library is missing: libnvidia-ml.so.1 or, for the CUDA version, libcuda.so.1."""


def driver() -> dict:
    """What the test says of the driver."""
    return json.loads(os.environ.get("FAKE_GPUS_DRIVER", "{}"))


def call(function):
    """A call of NVML that fails where the test wants it to."""
    name = function.__name__

    @functools.wraps(function)
    def answer(*args):
        handle = args[0] if args and isinstance(args[0], dict) else {}
        if name in driver().get("missing", ()):
            raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
        if name in driver().get("unsupported", ()) or name in handle.get("unsupported", ()):
            raise NVMLError_NotSupported("Not Supported")
        return function(*args)

    return answer


def nvmlInit():  # noqa: N802
    if "FAKE_GPUS" not in os.environ:
        raise NVMLError_DriverNotLoaded("Driver Not Loaded")


def nvmlShutdown():  # noqa: N802
    pass


@call
def nvmlSystemGetCudaDriverVersion_v2():  # noqa: N802
    return driver().get("cuda", 13000)


@call
def nvmlSystemGetCudaDriverVersion():  # noqa: N802
    return driver().get("cuda", 13000)


@call
def nvmlSystemGetDriverVersion():  # noqa: N802
    return driver().get("driver", "580.95.05")


@call
def nvmlDeviceGetCount():  # noqa: N802
    return len(json.loads(os.environ["FAKE_GPUS"]))


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    gpu = json.loads(os.environ["FAKE_GPUS"])[index]
    if gpu.get("lost"):
        raise NVMLError("GPU is lost")
    return {"index": index, **gpu}


@call
def nvmlDeviceGetMemoryInfo(handle):  # noqa: N802
    total, used = int(handle["total"] * GIB), int(handle.get("used", 0) * GIB)
    return SimpleNamespace(total=total, used=used, free=total - used)


@call
def nvmlDeviceGetName(handle):  # noqa: N802
    return handle.get("name", "NVIDIA Test GPU")


@call
def nvmlDeviceGetUUID(handle):  # noqa: N802
    return handle.get("uuid", f"GPU-{handle['index']:08x}-0000-4000-8000-000000000000")


@call
def nvmlDeviceGetCudaComputeCapability(handle):  # noqa: N802
    return tuple(handle.get("capability", (9, 0)))


@call
def nvmlDeviceGetComputeRunningProcesses(handle):  # noqa: N802
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=int(size * GIB))
        for pid, size in handle.get("processes", [])
    ]


@call
def nvmlDeviceGetP2PStatus(handle, other, index):  # noqa: N802
    has_link = other is not None and handle["index"] in other.get("nvlink", ())
    return 0 if has_link and index == 2 else 1  # NVML_P2P_STATUS_OK, ..._CHIPSET_NOT_SUPPORTED
