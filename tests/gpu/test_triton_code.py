"""The Triton kernels' machine code, their lowering through JAX, and the choice of tiles.

All of it is compiled for Hopper and Ampere on a machine without a GPU.
"""

import dataclasses
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from described_gpu import spec_of
from requirements import needs

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import PASSES, triton, tuned_tables
from pallas_kernels.block_sparse_conv.triton import calls, fitting, kernels, products, tiles
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.block_sparse_conv.triton.normal_form import normal
from pallas_kernels.devices import shared_memory

MISSING = [
    name
    for name in ("triton", "jax_triton", "jax_cuda13_plugin")
    if importlib.util.find_spec(name) is None
]
needs_triton = needs("the package triton is not installed" if "triton" in MISSING else None)
needs_jax_triton = needs(f"not installed: {', '.join(MISSING)}" if MISSING else None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # as jax-triton compiles
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
SHAPES = [(layer, 256) for layer in shapes.OTHERS if "resnet50" in layer.name]
SHAPES += [(layer, batch) for batch in (128, 1024) for layer in shapes.VGG19 + shapes.RESNET32]


PLAIN = {"forward_with_sums": "forward", "norm_input_gradient": "input_gradient"}
"""The passes whose tiles those between batch norms have."""


def launches(spec, name, capability=90, fused=False, raw=False, **private):
    """The kernel calls of a pass on such a GPU, with the operands' dtypes.

    `raw`: the input is normalised while it is loaded.
    """
    recorded = []

    def record(launch, *operands):
        recorded.append((launch, [a.dtype.name for a in operands]))
        return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), launch.out)

    lists = (
        (spec.groups, spec.group_size),
        (spec.groups, spec.kept),
        (spec.groups, spec.kept_taps),
    )
    index = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in lists]
    x, dy, values = (
        jax.ShapeDtypeStruct(shape, spec.dtype)
        for shape in (spec.in_shape, spec.out_shape, spec.packed_shape)
    )
    inputs = {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}
    inputs |= {norm_pass: inputs[name] for norm_pass, name in PLAIN.items()}
    if name == "norm_input_gradient":  # fused: of a stream, which a shortcut joins
        vector = jax.ShapeDtypeStruct((spec.cin,), jnp.float32)
        index = [*index, x, vector, vector, *([x, x] if fused else [])]
    elif fused:
        vector = jax.ShapeDtypeStruct((spec.cout,), jnp.float32)
        index = [*index, vector, vector, dy]
    if raw:
        index = [*index, *[jax.ShapeDtypeStruct((spec.cin,), jnp.float32)] * 2]
    if fused or raw or name == "norm_input_gradient":
        spec = dataclasses.replace(spec, relu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "run", record)
        patch.setattr(calls, "capability", lambda: capability)
        run = getattr(triton.IMPLEMENTATION, name)
        jax.eval_shape(lambda *a: run(spec, *a, **private), *inputs[name], *index)
    return recorded


def machine_code(launch, dtypes, capability):
    """Compiles a kernel call for a GPU as jax-triton does, and takes its cubin apart."""
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, launch.kernel)
    types = [TYPES[name] for name in (*dtypes, *(out.dtype.name for out in launch.outs))]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(names, types)) | dict.fromkeys(names[len(types) :], "constexpr"),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    tools = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
        compiled = triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        cubin = Path(folder, "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [tools / tool, option, cubin], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL"))
    local_accesses, in_loops = (
        len(re.findall(r"\b(?:LDL|STL)\b", code)) for code in (sass, loops(sass))
    )
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", compiled.asm["ptx"])]
    return {
        "registers": registers,
        "spilled": local_accesses + local,  # a frame on the stack counts, though it may go unused
        "in loops": in_loops,
        "shared": compiled.metadata.shared,
        "waits": waits,
    }, sass


def loops(sass):
    """The lines of machine code that a branch can come back to."""
    lines = sass.splitlines()
    labels, inside = {}, set()
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
    for i, line in enumerate(lines):
        if branch := re.search(r"BRA\b.*`\((\S+?)\)", line):
            inside.update(range(labels.get(branch[1], len(lines)), i))
    return "\n".join(lines[i] for i in sorted(inside))


def check_code(
    record, spec, name, capability=90, fused=False, around_loops=False, raw=False, **private
):
    """Compiles a pass, and checks the machine code.

    No spill (with `around_loops`: none in a loop), as much shared memory as predicted, 16-byte
    copies, tensor cores, no early wait for loads.
    """
    if getattr(private.get("tile"), "walkers", 0):
        check_kept_weights(record, spec, name, private["tile"], raw, fused)
        return
    kernel_calls = launches(spec, name, capability, fused, raw, **private)
    is_dense = "dense" in (private.get("method"), getattr(private.get("tile"), "method", ""))
    assert len(kernel_calls) == (0 if is_dense else 1)
    what_runs, name = name, PLAIN.get(name, name)
    for launch, dtypes in kernel_calls:
        measured, sass = machine_code(launch, dtypes, capability)
        tile, plain = launch.tile, normal(spec)
        key = tiles.tuned_key(spec, name).replace(name, what_runs, 1)
        what = f"{key}{' fused' * fused}: {tile}: {measured}"
        record("compiled", f"triton sm_{capability} {what}")
        assert measured["in loops" if around_loops else "spilled"] == 0
        norms = 8 * tile.stages * tile.depth * (raw and name == "forward")
        most = fitting.shared_bytes(tile, name, plain) + norms + 1024
        assert measured["shared"] <= min(shared_memory(capability), most)
        steps = 8
        if name != "weight_gradient":
            steps = -(-products.product(plain, name, tile.method).depth // tile.depth)
        copies = re.findall(r"LDGSTS\S*", sass)
        step = tile.positions if name == "weight_gradient" else tile.depth
        # Bytes that a thread copies of the operand that is not gathered.
        least = min(16, tile.rows * step * fitting.itemsize(spec) // (32 * tile.warps))
        sizes = {"128", str(8 * least)} | ({"E"} if norms else set())  # one number each
        assert {copy.rsplit(".", 1)[1] for copy in copies} <= sizes
        assert not re.search(r"LDG\S*\.U16", sass)
        if steps >= 3:
            assert any(copy.endswith(".128") for copy in copies)
            *in_the_loop, at_the_end = measured["waits"]
            assert at_the_end == 0
            assert len(set(in_the_loop)) == 1
            loads = (1, 2, 4) if norms else (1, 2)  # a step's rows and weights, scales and shifts
            assert in_the_loop[0] in [number * (tile.stages - 2) for number in loads], (
                "the loop must not wait for the loads of the next steps"
            )
        else:
            assert re.search(r"(LDGSTS|LDG)\S*\.128", sass)
        multiply = {
            "half": "HGMMA" if capability == 90 else r"HMMA\.16816",
            "tf32": r"H(G)?MMA\S*TF32",
            "ieee": "FFMA",
        }[plain.precision]
        assert re.search(multiply, sass)
        instructions = set(re.findall(r"\bHG?MMA\S*", sass))
        assert all(re.search(r"\.F32(\.|$)", one) for one in instructions), (
            f"sums in single precision: {instructions}"
        )
        if launch.zeroed:
            assert re.search(r"REDG?\.E\.ADD\.F32" + ("x4" if capability == 90 else ""), sass)


def check_kept_weights(record, spec, name, tile, raw=False, fused=False):
    """Compiles a tile that keeps its weights, and checks what its loop over positions loads.

    Each row once, in 16-byte copies, and nothing else: neither weights nor lists.
    """
    ((launch, dtypes),) = launches(spec, name, fused=fused, raw=raw, tile=tile)
    assert launch.kernel == "stationary_product"
    tile = launch.tile  # with a norm maybe narrower
    measured, sass = machine_code(launch, dtypes, 90)
    inner = loops(sass)
    copies = re.findall(r"LDGSTS\S*", inner)
    what = f"{tuned_tables.key(normal(spec), name)}{' raw' * raw}: {tile}: {measured}"
    record("compiled", f"triton sm_90 {what}, {len(copies)} copies a tile")
    assert measured["spilled"] == 0
    assert measured["shared"] <= shared_memory(90)
    assert measured["shared"] <= fitting.shared_bytes(tile, "forward", normal(spec)) + 1024
    piece = 16 // fitting.itemsize(spec)
    assert {copy.rsplit(".", 1)[1] for copy in copies} == {"128"}
    assert len(copies) == tile.depth * tile.positions // piece // (32 * tile.warps)
    assert fused or not re.search(r"\bLDG\b", inner)  # an epilogue loads its operands
    assert "HGMMA" in inner


def layer_spec(layer, batch=128, sparsity=0.9, group_size=32, run=1, **fields):
    spec = shapes.layer_spec(
        layer,
        sparsity=sparsity,
        batch=batch,
        group_size=group_size,
        dtype=fields.pop("dtype", "bfloat16"),
    )
    return dataclasses.replace(
        spec, kept=max(run, spec.kept // run * run), channel_block=run, **fields
    )


MAIN = layer_spec(shapes.VGG19[4], group_size=64, run=32)
REPRESENTATIVE = {
    "3x3 256, groups of 64": [(MAIN, name, 90, {}) for name in ("forward", "weight_gradient")],
    "input gradient": [
        (MAIN, "input_gradient", 90, {"method": method}) for method in ("transposed", "scatter")
    ],
    "groups of 32, epilogue": [(layer_spec(shapes.VGG19[4]), "forward", 90, {"fused": True})],
    "between batch norms": [
        (MAIN, "forward_with_sums", 90, {}),
        (MAIN, "norm_input_gradient", 90, {}),
        (MAIN, "norm_input_gradient", 90, {"fused": True}),
    ],
    "between batch norms, Ampere": [
        (MAIN, "forward_with_sums", 80, {}),
        (MAIN, "norm_input_gradient", 80, {"fused": True}),
    ],
    "groups of 8": [(layer_spec(shapes.VGG19[2], group_size=8, batch=24), "forward", 90, {})],
    "1x1": [
        (layer_spec(shapes.OTHERS[6], batch=256), name, 90, {})
        for name in ("forward", "weight_gradient")
    ],
    "float16": [
        (dataclasses.replace(MAIN, dtype="float16"), name, 90, {})
        for name in ("forward", "weight_gradient")
    ],
    "float16, Ampere": [(dataclasses.replace(MAIN, dtype="float16"), "forward", 80, {})],
    "Ampere": [
        (MAIN, "forward", 80, {}),
        (MAIN, "weight_gradient", 80, {}),
        (MAIN, "input_gradient", 80, {"method": "scatter"}),
    ],
    "Ampere, float32": [
        (dataclasses.replace(MAIN, dtype="float32"), name, 80, {"method": method} if method else {})
        for name, method in (
            ("forward", ""),
            ("weight_gradient", ""),
            ("input_gradient", "transposed"),
            ("input_gradient", "scatter"),
        )
    ],
    "tf32": [
        (dataclasses.replace(MAIN, dtype="float32", precision="high"), name, 90, {})
        for name in ("forward", "weight_gradient")
    ],
    "float32": [
        (dataclasses.replace(MAIN, dtype="float32"), name, 90, {})
        for name in ("forward", "weight_gradient")
    ],
}


@needs_triton
@pytest.mark.parametrize("case", REPRESENTATIVE)
def test_the_main_tiles_compile_without_spills_to_tensor_cores_and_16_byte_copies(
    case, record_property
):
    for spec, name, capability, private in REPRESENTATIVE[case]:
        check_code(record_property, spec, name, capability, **private)


KEPT = {  # the layer, and what else its tile has
    "3x3 256@14": (shapes.RESNET50[10], 256),
    "3x3 512@7": (shapes.RESNET50[15], 256),
    "3x3 64@32": (shapes.VGG19[0], 128),
    "1x1 256-1024@14": (shapes.RESNET50[11], 256),
}


@needs_triton
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(KEPT)]
)
def test_programs_that_keep_weights_load_each_row_once_and_nothing_else(case, record_property):
    layer, batch = KEPT[case]
    spec = layer_spec(layer, batch, group_size=64, run=16 if layer.cin > 64 else 1)
    for tile in tiles.frugal_tiles(spec, "forward")[:1]:
        check_kept_weights(record_property, spec, "forward_with_sums", tile)
        check_kept_weights(record_property, spec, "forward_with_sums", tile, raw=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["input_gradient", "weight_gradient"])
def test_the_tiles_of_gradients_that_load_least_compile(name, record_property):
    spec = layer_spec(shapes.RESNET50[10], 256, group_size=64, run=64)
    tile = tiles.frugal_tiles(spec, name)[0]
    check_code(record_property, spec, name, tile=tile)
    if name == "input_gradient":
        check_code(record_property, spec, "norm_input_gradient", fused=True, tile=tile)


@needs_triton
@pytest.mark.parametrize("name", ["forward_with_sums", "weight_gradient"])
@pytest.mark.parametrize("group_size", [64, pytest.param(32, marks=pytest.mark.slow)])
def test_a_norm_in_the_load_compiles_without_spills(group_size, name, record_property):
    spec = layer_spec(shapes.VGG19[4], group_size=group_size)
    check_code(record_property, spec, name, raw=True)
    if group_size == 32:
        check_code(record_property, spec, name, 80, raw=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("run", [16, 64])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.9, 0.95])
def test_every_layer_compiles_between_batch_norms(sparsity, name, run, record_property):
    for layer, batch in SHAPES:
        if layer.cin % run:
            continue
        group_size = min(64, layer.cout)
        taps = layer.kernel**2 if sparsity == 0 else None
        spec = shapes.layer_spec(
            layer,
            sparsity=sparsity,
            batch=batch,
            group_size=group_size,
            kept_taps=taps,
            dtype="bfloat16",
        )
        kept = max(run, spec.kept // run * run)
        spec = dataclasses.replace(spec, kept=kept, channel_block=run)
        if name == "forward_with_sums" or not spec.pointwise():
            fused = name == "norm_input_gradient"
            tile = tiles.choose_tile(spec, PLAIN[name], method="transposed" if fused else "")
            check_code(record_property, spec, name, fused=fused, tile=tile)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_the_chosen_tiles_of_every_layer_compile(sparsity, name, record_property):
    for layer, batch in SHAPES:
        for run, method in (
            ((1, "scatter"), (16, "transposed")) if name == "input_gradient" else ((1, ""),)
        ):
            private = {"method": method} if method else {}
            check_code(
                record_property, layer_spec(layer, batch, sparsity, run=run), name, **private
            )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", None), ("float32", None), ("float32", "high")]
)
@pytest.mark.parametrize("capability", [90, 80])
def test_the_rules_tiles_compile(capability, dtype, precision, name, record_property):
    around = (capability, dtype, name) == (
        80,
        "bfloat16",
        "weight_gradient",
    )  # Triton 3.6: one word, stored before the loop, read after it
    ways = (
        ((1, "scatter"), (16, "transposed"), (32, "transposed"))
        if name == "input_gradient"
        else ((1, ""), (16, ""))
    )
    picked = {}  # the specs of each tile
    for (layer, batch), sparsity, group_size, (run, method) in itertools.product(
        SHAPES, (0.8, 0.9, 0.95), (16, 32, 64, 128), ways
    ):
        if layer.cout % group_size == 0:
            spec = layer_spec(
                layer, batch, sparsity, group_size, run, dtype=dtype, precision=precision
            )
            picked.setdefault(
                (tiles.choose_tile(spec, name, capability, method), layer.kernel), []
            ).append((spec, method))
    for specs in picked.values():
        for spec, method in dict.fromkeys((specs[0], specs[len(specs) // 2], specs[-1])):
            private = {"method": method} if method else {}
            check_code(
                record_property,
                spec,
                name,
                capability,
                name == "forward",
                around_loops=around,
                **private,
            )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("capability", [90, 80])
def test_every_candidate_compiles(capability, group_size, dtype, name, record_property):
    for precision in (None,) if dtype == "bfloat16" else (None, "high"):
        for layer, batch in ((shapes.VGG19[6], 128), (shapes.OTHERS[3], 256)):
            spec = layer_spec(
                layer, batch, group_size=group_size, run=16, dtype=dtype, precision=precision
            )
            for tile in tiles.candidate_tiles(spec, name, capability):
                check_code(
                    record_property, spec, name, capability, fused=name == "forward", tile=tile
                )


CAPABILITY = {"a100": 80}  # others in tables: 90


def check_tables(record):
    """Compiles all that the tuned tables name; how many tiles that is."""
    count = 0
    for gpu in tuned_tables.gpus():
        tuned_tables.read.cache_clear()
        for key, fields in tuned_tables.read(gpu)["tiles"].get("triton", {}).items():
            spec, name = spec_of(key)
            tile = Tile(**fields)
            assert tiles.tuned_key(spec, name) == key
            capability = CAPABILITY.get(gpu, 90)
            assert tile.method == "dense" or fitting.fits(tile, name, normal(spec), capability)
            check_code(record, spec, name, capability, tile=tile)
            count += 1
    tuned_tables.read.cache_clear()
    return count


def write_table(folder, spec, name, tile, gpu="h200"):
    fields = {tiles.tuned_key(spec, name): dataclasses.asdict(tile)}
    path = tuned_tables.path(gpu, folder)
    path.unlink(missing_ok=True)
    tuned_tables.write_tiles(path, "triton", fields, {}, {})


@needs_triton
def test_every_tuned_tile_compiles(record_property):
    check_tables(record_property)


@needs_triton
def test_a_tuned_tile_that_does_not_compile_is_found(tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    assert check_tables(record_property) == 0
    strided = layer_spec(shapes.OTHERS[-1], dtype="float32", precision="high", run=16)
    for spec, name in ((MAIN, "forward"), (strided, "weight_gradient")):
        write_table(tmp_path, spec, name, tiles.choose_tile(spec, name))
        assert check_tables(record_property) == 1
    for wrong in ({"positions": 256, "warps": 2}, {"depth": 128, "stages": 6}):
        write_table(
            tmp_path,
            MAIN,
            "forward",
            dataclasses.replace(tiles.choose_tile(MAIN, "forward"), **wrong),
        )
        with pytest.raises(AssertionError):
            check_tables(record_property)


@needs_jax_triton
def test_a_training_step_lowers_to_three_kernels_for_cuda():
    record = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)
    spec = layer_spec(shapes.VGG19[4], group_size=64, run=32)
    assert tiles.choose_tile(spec, "input_gradient").method == "transposed"
    x, dy, values, *index = map(jax.typeof, shapes.random_operands(spec))

    def step(x, values, dy, *index):
        y, pullback = jax.vjp(lambda x, v: shapes.convolve(spec, record, x, v, *index), x, values)
        return y, *pullback(dy)

    text = jax.jit(step).trace(x, values, dy, *index).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @triton_kernel_call", text)) == 3


# The choice of tiles.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_tiles_fit(capability, dtype):
    for layer, batch in SHAPES:
        for group_size in (8, 24, 32, 64, 128):
            if layer.cout % group_size == 0:
                spec = layer_spec(layer, batch, group_size=group_size, run=16, dtype=dtype)
                plain = normal(spec)
                for name in PASSES:
                    candidates = tiles.candidate_tiles(spec, name, capability)
                    assert candidates
                    for tile in (*candidates, tiles.choose_tile(spec, name, capability)):
                        assert fitting.shared_bytes(tile, name, plain) < shared_memory(capability)
                        assert (
                            tile.method == "dense"
                            or min(tile.rows, tile.positions, tile.depth) >= 16
                        )
                        assert (name == "input_gradient") == (tile.method != "")


def test_a_tuned_tile_is_used_on_the_gpu_that_it_was_tuned_on(tmp_path, monkeypatch):
    spec = layer_spec(shapes.VGG19[4])
    tuned = Tile(32, 64, 32, stages=5, positions_first=True)
    write_table(tmp_path, spec, "forward", tuned)
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    tuned_tables.read.cache_clear()
    assert tiles.choose_tile(spec, "forward") != tuned
    monkeypatch.setattr(tuned_tables, "this_gpu", lambda: "h200")
    assert tiles.choose_tile(spec, "forward") == tuned
    assert tiles.choose_tile(layer_spec(shapes.VGG19[5]), "forward") != tuned
    assert (
        tiles.choose_tile(dataclasses.replace(spec, gradients=True, relu=True), "forward") == tuned
    )
    strided = layer_spec(shapes.OTHERS[-1])
    assert tiles.tuned_key(strided, "input_gradient") == tiles.tuned_key(
        strided.pointwise(), "input_gradient"
    )
    tuned_tables.read.cache_clear()


def test_the_input_gradient_goes_the_cheapest_way_that_serves():
    methods = {
        run: tiles.choose_tile(
            layer_spec(shapes.VGG19[4], group_size=64, run=run), "input_gradient"
        ).method
        for run in (1, 32)
    }
    assert methods[32] == "transposed"
    assert methods[1] in ("scatter", "dense")
    few = layer_spec(shapes.VGG19[4], group_size=16)
    (launch, _), *_ = launches(few, "input_gradient", method="transposed")
    assert dict(launch.constants)["run"] == 1, "the table takes single channels too"
    tile = Tile(64, 64, 64, method="transpose")
    with pytest.raises(ValueError, match="expected one of transposed, scatter, dense, got 'transp"):
        launches(few, "input_gradient", tile=tile)
    for tile in (Tile(128, 64, 16), Tile(64, 64, 32)):
        with pytest.raises(ValueError, match=r"blocks of 64 channels .* stages of 16 filters, got"):
            launches(few, "input_gradient", tile=dataclasses.replace(tile, method="transposed"))


def test_what_cannot_be_served_says_why():
    spec = layer_spec(shapes.VGG19[4])
    assert "runs on NVIDIA GPUs" in triton.unavailable()
    assert triton.IMPLEMENTATION.supports(spec) == triton.unavailable()
    assert triton.limits(spec) is None
    for change, reason in (
        ({"kernel": (17, 1)}, "up to 16 pixels"),
        ({"cin": 1 << 24}, "channels"),
        ({"dtype": "float64"}, "not in float64"),
        ({"height": 1 << 13, "width": 1 << 13}, "31 bits"),
    ):
        assert reason in triton.limits(dataclasses.replace(spec, **change))
