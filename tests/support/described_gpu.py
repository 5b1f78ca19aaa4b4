"""Compiling for an H200 on a machine without a GPU, and the interpreter of Mosaic GPU kernels."""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import re
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from pallas_kernels.block_sparse_conv import ConvSpec

H200 = """gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""
_NUMBERS = itertools.count()
# What XLA records by default, and convolutions.
RECORDED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler reports.

    Attributes:
      kernels: how many kernels were compiled.
      registers: of a thread, in the kernel that has most.
      stack, spills: bytes, over all kernels.
      ptx: the code of all kernels.
    """

    kernels: int
    registers: int
    stack: int
    spills: int
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an instruction (a regular expression) occurs in the PTX."""
        return len(re.findall(instruction, self.ptx))


def interpreter(**options):
    """Parameters of the interpreter of Mosaic GPU kernels, with its race detector on.

    Use them inside `no_races`. Either generation of JAX will do.
    """
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams(
        **{
            "out_of_bounds_reads": "uninitialized",
            "uninitialized_memory": "nan",
            "detect_races": True,
        }
        | options
    )


@contextlib.contextmanager
def no_races() -> Iterator[None]:
    """Fails if any kernel that is interpreted inside has a race.

    Inside, memory that nobody wrote is NaN, and reads outside of an array give zeros, as the copy
    engine's do: the interpreter by itself has one value for both. Its race detector also sees what
    the matrix products read, which it does not look at by itself.
    """
    callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    (detector,) = (name for name in vars(callbacks) if name.endswith("RaceDetectionState"))
    new_state, multiply = getattr(callbacks, detector), callbacks.wgmma
    states = []

    def recorded_state(*args, **kwargs):
        states.append(new_state(*args, **kwargs))
        return states[-1]

    def multiply_and_report(**call):
        token = multiply(**call)
        for operand in "ab":
            key = callbacks.HostAllocationKey.from_array(call[f"{operand}_allocation_key_as_array"])
            transforms = callbacks._remove_noop_transforms(call[f"{operand}_transforms"])
            _report_read(callbacks, key, jax.tree.map(int, transforms), call)
        return token

    zeros_outside = vars(callbacks.interpret_utils) | {"get_uninitialized_value": lambda *_: 0}
    catch = getattr(callbacks, "fail_on_exception", lambda f: f)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "interpret_utils", types.SimpleNamespace(**zeros_outside))
        patch.setattr(callbacks, detector, recorded_state)
        patch.setattr(callbacks, "wgmma", catch(multiply_and_report))
        yield
    assert not any(state.races_found for state in states), "the interpreter found a race"


def _report_read(callbacks, key, transforms, call) -> None:
    """Reports to the race detector that a warpgroup read shared memory as wgmma does.

    Such a read goes past the caches, without a fence in between.
    """
    memory, races, where = (
        callbacks._get_shared_memory(),
        callbacks.get_races(),
        call["source_info"],
    )
    if "thread_id" in call:  # jax 0.10
        device, thread = int(call["device_id"]), int(call["thread_id"])
        with memory.lock:
            clock = memory.clocks[memory.get_global_thread_id(device, thread)].copy()
        ranges = callbacks.interpret_utils.to_range(transforms)
        races.check_read(device, thread, clock, key, ranges, where)
        return
    thread = call["thread"]
    with memory.lock:
        memory.clocks[thread].inc(memory.thread_to_vc_position(thread))
        clock = memory.clocks[thread].copy()
    races.check_read(thread, clock.async_smem_clock, key, memory.access(key, transforms), where)


def spec_of(key: str) -> tuple[ConvSpec, str]:
    """The inverse of `tuned_tables.key`: a convolution that has this key, and the pass."""
    name, *words, _, block, arithmetic = key.split()
    shape, kernel, padding, packed = words
    cin, height, width, batch = _numbers(shape)
    kernel_size, strides, dilation = map(_numbers, kernel.split("/"))
    top, bottom, left, right = _numbers(padding)
    groups, kept, kept_taps, group_size = _numbers(packed)
    spec = ConvSpec(
        cin=cin,
        height=height,
        width=width,
        batch=batch,
        kernel=kernel_size,
        cout=groups * group_size,
        groups=groups,
        kept=kept,
        kept_taps=kept_taps,
        group_size=group_size,
        strides=strides,
        dilation=dilation,
        padding=((top, bottom), (left, right)),
        dtype="bfloat16" if arithmetic == "half" else "float32",
        channel_block=int(block),
        precision={"half": None, "ieee": "highest", "tf32": "high"}[arithmetic],
    )
    return spec, name


def _numbers(word: str) -> tuple[int, ...]:
    return tuple(map(int, word.split("x")))


def pytest_terminal_summary(terminalreporter) -> None:
    """Lists what tests recorded as `compiled`: registers, spills and shared memory of each kernel.

    A hook of pytest, for conftest.py.
    """
    tests = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    lines = [line for test in tests for name, line in test.user_properties if name == "compiled"]
    if lines:
        terminalreporter.section("compiled GPU kernels")
        terminalreporter.write("\n".join(sorted(lines)) + "\n")


def missing() -> str | None:
    """Why nothing can be compiled for a described GPU here; None where it can."""
    has_plugins = importlib.util.find_spec("jax_plugins") is not None
    if has_plugins and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None:
        return None
    return (
        "needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of this JAX's version (install "
        "them with --no-deps)"
    )


@functools.cache
def described_h200() -> jax.sharding.Sharding:
    """Arrays on one H200 that is only described."""
    jax.devices()  # settles what this process computes on, before the plugin is loaded
    describe = functools.partial(
        topologies.get_topology_desc, platform="cuda", target_config=H200, topology="1x1x1"
    )
    try:
        topology = describe()
    except NotImplementedError:  # without CUDA's libraries the plugin left itself out
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        importlib.import_module("jax_plugins.xla_cuda13").initialize()
        topology = describe()
    return jax.sharding.NamedSharding(
        topologies.make_mesh(topology, (1,), ("x",)), jax.sharding.PartitionSpec()
    )


@contextlib.contextmanager
def _what_the_compiler_prints(*switches: str) -> Iterator[list[str]]:
    """Collects what the compiler writes to standard output's file descriptor, past Python."""
    printed: list[str] = []
    before = {name: os.environ.get(name) for name in switches}
    with tempfile.TemporaryFile() as file:
        stdout = os.dup(1)
        os.environ.update(dict.fromkeys(switches, "1"))
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def _unique_kernel_names() -> Iterator[None]:
    """JAX keeps the code of a Mosaic GPU kernel for as long as the process runs: under another name
    it is compiled again.
    """
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    plain = plgpu.kernel

    def renamed(body, **options):
        def named(*refs):
            return body(*refs)

        named.__name__ = named.__qualname__ = f"kernel_{next(_NUMBERS)}"
        return plain(named, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "kernel", renamed)
        yield


def compile_for_h200(f, *shapes: jax.ShapeDtypeStruct | None) -> Report:
    """Lowers and compiles a function fully for compute capability 9.0a."""
    placed = [
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=described_h200())
        for a in shapes
    ]
    with (
        _unique_kernel_names(),
        _what_the_compiler_prints("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS") as printed,
    ):
        jax.jit(f).lower(*placed).compile()
    text = printed[0]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    stack = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", text))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    return Report(len(registers), max(registers, default=0), stack, spills, text)


def launches_on_h200(lowered: jax.stages.Lowered) -> list[str]:
    """The kinds of what a program launches, one after the other, in XLA's words.

    "kCommandBuffer" is a CUDA graph of many kernels, "kCustomCall" a foreign function outside of
    any. XLA makes graphs only for a GPU whose description names the versions of its driver and its
    runtime.

    Args:
      lowered: for arrays on `described_h200()`.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_gpu_enable_command_buffer": RECORDED}
        lowered.compile(options | {"xla_gpu_autotune_level": 0})
        (dump,) = Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        lines = dump.read_text().splitlines()
    matches = (re.match(r"\d+: (\w+)", line) for line in lines)  # indented: inside of a graph
    return [match[1] for match in matches if match]
