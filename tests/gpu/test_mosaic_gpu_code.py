"""The Mosaic GPU kernels' machine code for Hopper, and the choice of tiles: no GPU needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from described_gpu import compile_for_h200, missing, spec_of
from requirements import needs

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec, tuned_tables
from pallas_kernels.block_sparse_conv.mosaic_gpu import launch as mosaic_gpu
from pallas_kernels.block_sparse_conv.mosaic_gpu import tiles
from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import pixels
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile, candidate_tiles, choose_tile

needs_plugin = needs(missing())
RUNS = {
    "forward": mosaic_gpu._forward,
    "input_gradient": mosaic_gpu._input_gradient,
    "weight_gradient": mosaic_gpu._weight_gradient,
}


LAYERS = {
    layer.name: layer
    for layer in (*shapes.VGG19, *shapes.RESNET32, *shapes.OTHERS)
    if layer.cin >= 32
}


def layer(
    name: str,
    sparsity: float,
    batch: int,
    group_size: int = 32,
    block: int = 16,
    dtype: str = "bfloat16",
) -> ConvSpec:
    """A layer of `shapes.py` with aligned channels."""
    spec = shapes.layer_spec(
        LAYERS[name], sparsity=sparsity, batch=batch, group_size=group_size, dtype=dtype
    )
    return dataclasses.replace(
        spec, channel_block=block, kept=min(spec.cin, max(block, round(spec.kept / block) * block))
    )


def check_tile(spec: ConvSpec, name: str, tile: Tile) -> None:
    """The tile fits, and divides what it must."""
    assert tiles.shared_memory(tile, name) <= tiles.most_shared_memory()
    assert tile.rows * tile.columns <= tile.consumers * 64 * 256, (
        "more than 128 registers of sums in a thread"
    )
    assert pixels(spec, name).images % tile.images == 0
    assert tile.columns % tile.images == 0 or name == "weight_gradient"
    assert name == "input_gradient" or tile.rows >= spec.group_size
    assert tile.stages >= 2


BARRIERS = {
    "forward": 5,
    "input_gradient": 5,
    "weight_gradient": 2,
}  # 2 at the start; for stores: memory is free, is written; at the end


def compiled(
    spec: ConvSpec, name: str, record, tile: Tile | None = None, fused: bool = False
) -> None:
    """Compiles one pass and checks the code."""
    struct = jax.ShapeDtypeStruct
    x, dy, values = (
        struct(s, spec.dtype) for s in (spec.in_shape, spec.out_shape, spec.packed_shape)
    )
    index = [
        struct(s, jnp.int32)
        for s in (
            (spec.groups, spec.group_size),
            (spec.groups, spec.kept),
            (spec.groups, spec.kept_taps),
        )
    ]
    inputs = {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}
    vector = struct((spec.cout,), jnp.float32)
    epilogue = (vector, vector, dy) if fused else ()
    one_pass = functools.partial(RUNS[name], None, tile, spec)
    report = compile_for_h200(one_pass, *inputs[name], *index, *epilogue)
    tile = tile or choose_tile(spec, name)
    shared = tiles.shared_memory(tile, name)
    used = f"{report.registers} registers, {report.spills} bytes of spills, {shared} bytes shared"
    what = f"{spec.dtype} {tuned_tables.key(spec, name)}{' fused' * fused}: {tile}: {used}"
    record("compiled", f"mosaic_gpu sm_90a {what}")
    assert report.kernels == 1
    assert (report.stack, report.spills) == (0, 0)
    assert report.count(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32") >= tile.depth // 16
    assert report.count(r"cp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global") > 1
    stores = {
        "forward": r"cp\.async\.bulk\.global\.shared::cta",
        "input_gradient": r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta",
    }
    assert name not in stores or report.count(stores[name]) >= 1
    assert report.count(r"ld\.local|st\.local") == 0
    assert report.count(r"\bbar(rier)?(\.cta)?\.sync") == BARRIERS[name], (
        "no barrier in a loop that copies or multiplies"
    )


MAIN = {
    "fused forward": (layer("vgg19 256@8", 0.9, 128), "forward", True),
    "forward, group of 128": (
        dataclasses.replace(layer("resnet50 128@28", 0.9, 256, 128), dtype="float16"),
        "forward",
        False,
    ),
    "input gradient, stride": (layer("resnet32x2 64-128@16/2", 0.8, 1024), "input_gradient", False),
    "weight gradient": (layer("resnet50 512@7", 0.9, 256, 64), "weight_gradient", False),
}


@needs_plugin
@pytest.mark.parametrize("case", MAIN)
def test_main_tiles_compile_fully_for_an_h200(case, record_property):
    spec, name, fused = MAIN[case]
    compiled(dataclasses.replace(spec, relu=fused), name, record_property, fused=fused)


def check_tables(record) -> int:
    """Compiles all that the tuned tables name; how many tiles that is."""
    count = 0
    for gpu in tuned_tables.gpus():
        tuned_tables.read.cache_clear()
        for key, fields in tuned_tables.read(gpu)["tiles"].get("mosaic_gpu", {}).items():
            spec, name = spec_of(key)
            tile = Tile(**fields)
            assert tuned_tables.key(spec, name) == key
            check_tile(spec, name, tile)
            compiled(spec, name, record, tile, fused=name == "forward")
            count += 1
    tuned_tables.read.cache_clear()
    return count


def write_table(folder, spec: ConvSpec, name: str, tile: Tile) -> None:
    fields = {tuned_tables.key(spec, name): dataclasses.asdict(tile)}
    path = tuned_tables.path("h200", folder)
    path.unlink(missing_ok=True)
    tuned_tables.write_tiles(path, "mosaic_gpu", fields, {}, {})


@needs_plugin
def test_every_tuned_tile_compiles(record_property):
    check_tables(record_property)


@needs_plugin
def test_a_tuned_tile_that_does_not_compile_is_found(tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    assert check_tables(record_property) == 0
    spec, name, _ = MAIN["input gradient, stride"]
    write_table(tmp_path, spec, name, choose_tile(spec, name))
    assert check_tables(record_property) == 1
    for wrong in ({"stages": 7}, {"images": 96}, {"rows": 128, "consumers": 1}):
        write_table(tmp_path, spec, name, dataclasses.replace(choose_tile(spec, name), **wrong))
        with pytest.raises(AssertionError):
            check_tables(record_property)


def test_a_tuned_tile_is_used_on_the_gpu_that_it_was_tuned_on(tmp_path, monkeypatch):
    spec, best = layer("vgg19 256@8", 0.9, 128), Tile(64, 64, 64, stages=2, consumers=1)
    write_table(tmp_path, spec, "forward", best)
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    tuned_tables.read.cache_clear()
    assert choose_tile(spec, "forward") != best
    monkeypatch.setattr(tuned_tables, "this_gpu", lambda: "h200")
    assert choose_tile(spec, "forward") == best
    for change in ({"padding": ((0, 0), (0, 0))}, {"dilation": (1, 2)}, {"batch": 256}):
        assert choose_tile(dataclasses.replace(spec, **change), "forward") != best
    tuned_tables.read.cache_clear()


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("of", LAYERS)
def test_every_tile_compiles_fully_for_an_h200(of, name, record_property):
    jobs = {}
    for batch in (256,) if "resnet50" in of else (128, 1024):
        for sparsity in (0.8, 0.9, 0.95):
            spec = layer(
                of,
                sparsity,
                batch,
                group_size=64 if sparsity == 0.8 else 32,
                block=8 if sparsity == 0.95 else 16,
            )
            jobs |= {(spec, tile): None for tile in candidate_tiles(spec, name)}
    for spec, tile in jobs:
        compiled(spec, name, record_property, tile)


@pytest.mark.parametrize("name", PASSES)
def test_tiles_fit_and_divide_what_they_must(name):
    for of in LAYERS:
        for batch in (1, 96, 128, 256, 1024):
            for group_size in (8, 32, 64, 128):
                spec = layer(of, 0.9, batch, group_size, 8)
                candidates = candidate_tiles(spec, name)
                assert choose_tile(spec, name) in candidates
                assert len(set(candidates)) == len(candidates)
                for tile in candidates:
                    check_tile(spec, name, tile)


def test_what_is_missing_can_be_a_failure(monkeypatch):
    monkeypatch.delenv("BLOCKSPARSE_JAX_NO_SKIP", raising=False)
    assert needs("a compiler").args == (True,)
    assert needs(None).args == (False,)
    monkeypatch.setenv("BLOCKSPARSE_JAX_NO_SKIP", "1")
    assert needs(None).args == (False,)
    with pytest.raises(RuntimeError, match="cannot run: a compiler"):
        needs("a compiler")
