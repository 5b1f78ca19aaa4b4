"""What is known of each GPU: its sizes, and the rates that a kernel can reach on it."""

import dataclasses

import jax

SHARED_MEMORY_KIB = {
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    120: 99,
    121: 99,
}
"""Shared memory that one thread block may use, in KiB, by compute capability times ten."""
LEAST_SHARED_MEMORY_KIB = 99


@dataclasses.dataclass(frozen=True)
class Device:
    """Sizes and rates of one model of GPU.

    Attributes:
      name: short name, as `short_name` gives it.
      capability: compute capability times ten.
      multiprocessors: how many thread blocks run at the same time at least.
      l2_bytes: size of the L2 cache.
      memory: bytes/s that a kernel reads and writes in device memory.
      half: FLOP/s of the tensor cores on bfloat16 and float16 operands.
      tf32: FLOP/s of the tensor cores on float32 operands rounded to TF32.
      ieee: FLOP/s in true float32.
      gather: bytes/s of activation rows gathered from the L2 cache.
      add: bytes/s of float32 sums that are added to memory (atomics).

    Example:
      >>> H200.flops("tf32") / H200.flops("half")
      0.5
    """

    name: str
    capability: int
    multiprocessors: int
    l2_bytes: int
    memory: float
    half: float
    tf32: float
    ieee: float
    gather: float
    add: float

    def flops(self, arithmetic: str) -> float:
        """FLOP/s in one arithmetic: "half", "tf32" or "ieee"."""
        return {"half": self.half, "tf32": self.tf32, "ieee": self.ieee}[arithmetic]

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one thread block may use."""
        return shared_memory(self.capability)


# `memory` and `half` of the H200 were measured with copies and matrix products; its other rates are
# estimates. The rates of the other GPUs are estimates too: what NVIDIA's data sheets promise, times
# the share that an H200 reaches of its own data sheet.
H200 = Device(
    name="h200",
    capability=90,
    multiprocessors=132,
    l2_bytes=60 << 20,
    memory=4.3e12,
    half=790e12,
    tf32=395e12,
    ieee=50e12,
    gather=5.5e12,
    add=1.4e12,
)
H100 = dataclasses.replace(H200, name="h100", l2_bytes=50 << 20, memory=3.0e12)
A100 = Device(
    name="a100",
    capability=80,
    multiprocessors=108,
    l2_bytes=40 << 20,
    memory=1.8e12,
    half=250e12,
    tf32=125e12,
    ieee=15e12,
    gather=3.5e12,
    add=0.6e12,
)
DEFAULT = H200
"""Stands in for a GPU that is not listed, and for the GPU where there is none."""
DEVICES = {device.name: device for device in (H200, H100, A100)}


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one thread block may use.

    Args:
      capability: compute capability times ten.

    Returns:
      The bytes; those of the smallest GPU where the capability is unknown.

    Example:
      >>> shared_memory(90) // 1024
      227
    """
    return SHARED_MEMORY_KIB.get(capability, LEAST_SHARED_MEMORY_KIB) * 1024


def short_name(kind: str) -> str:
    """A GPU's model in lower case.

    That is the first word that has a digit, up to a hyphen; the last word where no word has one.

    Args:
      kind: as JAX's `device_kind`.

    Returns:
      The name, as in the names of tuned tables.

    Example:
      >>> models = ("H200", "H100 80GB HBM3", "A100-SXM4-80GB", "TITAN V")
      >>> [short_name(f"NVIDIA {model}") for model in models]
      ['h200', 'h100', 'a100', 'v']
    """
    words = kind.split()
    with_digit = [word for word in words if any(map(str.isdigit, word))]
    model = with_digit[0] if with_digit else words[-1]
    return model.split("-")[0].lower()


def this_gpu() -> str | None:
    """The short name of JAX's default device.

    Returns:
      The name; None where the default device is no GPU.
    """
    device = jax.devices()[0]
    return short_name(device.device_kind) if device.platform == "gpu" else None


def this_device() -> Device:
    """The record of JAX's default device.

    Returns:
      The record; `DEFAULT` where the device is no GPU or is not listed.

    Example:
      >>> this_device().multiprocessors > 0
      True
    """
    return DEVICES.get(this_gpu() or "", DEFAULT)
