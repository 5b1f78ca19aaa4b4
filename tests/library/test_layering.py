"""Imports run one way: a module imports only from those above it in `ORDER`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Modules on one line do not import each other.
ORDER = [
    {"_checks", "_dtypes", "alike", "origins", "run_once", "transposes"},
    {"kernels", "norm_act"},
    {"tree", "geometry", "erk"},
    {"selection", "scores", "budgets", "schedules"},
    {"data_scores"},
    {"counts", "dead_inputs"},
    {"layout"},
    {"layout_of_mask", "layout_check"},
    {"layout_nodes"},
    {"plans"},
    {"grouping.search_input", "grouping.column_blocks"},
    {"grouping.runs_and_taps", "grouping.exchange"},
    {"grouping.search"},
    {"grouping.hrbp", "grouping.search_together"},
    {"grouping.channel_order"},
    {"grouping.channel_spaces"},
    {"grouping.channel_removal", "grouping.channel_choice"},
    {"channel_pruning.spaces", "channel_pruning.inputs"},
    {"channel_pruning.reconstruction", "channel_pruning.l1_filters", "channel_pruning.pfa"},
    {"channel_pruning.thinet", "channel_pruning.lasso_channels"},
    {"patterns._base"},
    {"patterns.unstructured", "patterns.kernel", "patterns.window", "patterns.n_of_m"}
    | {"patterns.channel_tap", "patterns.one_by_n", "patterns.fan_in", "patterns.vector"},
    {"patterns.channel", "patterns.block"},
    {"masks"},
    {"column_masks", "lottery", "channel_growth"},
    {"variational", "compression.huffman", "compression.share"},
    {"compression.encode"},
    {"spec", "hidden_parts"},
    {"state", "serialization"},
    {"packing"},
    {"packing_checks"},
    {"tree_packing"},
    {"transforms.leaves"},
    {"transforms.due"},
    {"transforms.proposed"},
    {"transforms._base"},
    {"transforms.first_masks", "transforms.nesting", "transforms.exchange"},
    {"transforms.keep_zeros", "transforms.static", "transforms.one_shot", "transforms.gradual"}
    | {"transforms.drop_and_grow", "transforms.sr_ste", "transforms.subp"}
    | {
        "transforms.external",
        "transforms.campfire",
        "transforms.prune_train",
        "transforms.slimming",
        "transforms.shared_weights",
    }
    | {"transforms.deep_r", "transforms.dsr", "transforms.granet", "transforms.srigl"}
    | {"transforms.mest", "transforms.nest", "transforms.narang", "transforms.group_lasso"},
    {"transforms.rigl", "transforms.set", "transforms.snfs", "transforms.hrbp", "transforms.sss"}
    | {"transforms.brain_damage", "transforms.deep_compression"}
    | {"transforms.variational_dropout"},
    {"kernel_gradient"},
    {"conv"},
    {"norm_act_conv"},
    {"linear", "pending"},
    {"_layer_forward", "pools"},
    {"linen.conv", "linen.variational", "linen.batch_norm"},
    {"linen.linear"},
    {"linen.interceptor", "linen.inputs"},
    {"nnx.layouts"},
    {"nnx.conv", "nnx.linear", "nnx.variational", "nnx.batch_norm"},
    {"nnx.model", "nnx.optimizer"},
    {"metrics"},
    {"summary"},
    {"export"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FLAX_ONLY_IN = {"linen", "nnx", "_layer_forward", "serialization"}  # packages and modules
KERNELS_ONLY_IN = {"layout", "plans", "kernel_gradient", "conv", "norm_act", "norm_act_conv"}
KERNELS_ONLY_IN |= {"_layer_forward", "export", "pools"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as `a.b` too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, (
                f"{path}: relative import; write the full name so that the order can be checked"
            )
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules(package: str) -> dict[str, Path]:
    base = ROOT / package
    return {
        ".".join(p.relative_to(base).with_suffix("").parts): p
        for p in sorted(base.rglob("*.py"))
        if p.name != "__init__.py"
    }


@pytest.mark.parametrize("name", modules("blocksparse_jax"))
def test_a_module_imports_only_from_those_above_it(name):
    assert name in RANK, f"give blocksparse_jax/{name}.py a place in ORDER"
    used = imports(modules("blocksparse_jax")[name])
    for other, rank in RANK.items():
        if f"blocksparse_jax.{other}" in used and other != name:
            assert rank < RANK[name], (
                f"{name} imports {other}, which stands below it (or beside it)"
            )
    assert not any(u.split(".")[0] == "experiments" for u in used)
    if name.split(".")[0] not in FLAX_ONLY_IN:
        assert not any(u.split(".")[0] == "flax" for u in used), (
            f"{name} imports flax; only {sorted(FLAX_ONLY_IN)} may"
        )
    if name not in KERNELS_ONLY_IN:
        assert not any(u.split(".")[0] == "pallas_kernels" for u in used), (
            f"{name} imports a kernel; only {sorted(KERNELS_ONLY_IN)} may"
        )
    if name == "layout":
        kernels = {u for u in used if u.split(".")[0] == "pallas_kernels"}
        index, plan = (f"pallas_kernels.block_sparse_conv.{name}" for name in ("index", "plan"))
        assert kernels == {index, f"{index}.Index", plan, f"{plan}.Plan"}, (
            "layout imports the index helper and the type of plans alone"
        )


def test_kernels_know_no_pruning():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"blocksparse_jax", "experiments", "flax", "optax"}, (
            f"{path.name} imports {used}"
        )


def test_experiments_import_the_library_and_nothing_runs_back():
    for package in ("blocksparse_jax", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert not any(
                name.split(".")[0] in ("experiments", "tests") for name in imports(path)
            ), path


def test_every_module_of_the_order_exists():
    names = set(modules("blocksparse_jax"))
    assert set(RANK) <= names, f"not there: {set(RANK) - names}"


def test_no_test_file_imports_another():
    """What tests share lies in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not any(name.startswith("test_") for name in imports(path)), path
