"""The registry of methods: each entry trains, publishes what its options promise, and is the only
place under `experiments/` that knows a method; when masks change is read from the spec.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from small_runs import small_options

import blocksparse_jax as bsj
from blocksparse_jax import patterns
from experiments.training import registry
from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.methods import Setup
from experiments.training.patterns import NAMES, named
from experiments.training.registry import METHODS

SPARSE = [name for name, entry in METHODS.items() if entry.options.make_pattern() is not None]
# which mask nothing
SHRINKING = ["prune-train", "slimming", "sss", "l1-filters", "thinet", "lasso-channels", "pfa"]
# Methods whose masks the training loop sets, between two updates.
IN_THE_LOOP = [name for name in SPARSE if METHODS[name].function is bsj.external_masks]
LENGTH = Length(steps_per_epoch=8, total=24)


BATCH = (jnp.full((2, 2, 2, 3), 1.3), jnp.zeros(2, jnp.int32))


class SmallNet(nn.Module):
    """The network of `small_tree()`."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(16, (3, 3), use_bias=False, name="stem")(images)
        x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
        x = nn.Conv(32, (1, 1), use_bias=False, name="conv2")(x)
        return nn.Dense(10, use_bias=False, name="classifier")(jnp.tanh(x.mean((1, 2))))


def loss_fn(params, batch):
    return sum(jnp.sum(jnp.sin(leaf * batch[0].mean())) for leaf in jax.tree.leaves(params))


def setup_of(params):
    key, batch = jax.random.key(0), BATCH
    about = {"model": SmallNet(), "batch_stats": {}, "image_shape": (2, 2, 3)}
    return Setup(0.75, key, LENGTH, params, loss_fn, batch, **about)


def built(method, params, **changes):
    return METHODS[method].build(small_options(method, **changes), setup_of(params))


@pytest.mark.parametrize("method", SPARSE)
def test_masks_change_at_the_steps_that_the_spec_names(method, params):
    """Driven for a whole run with the full gradient: masks stay at every other step."""
    tx = bsj.sparse(built(method, params, update_every=4), optax.sgd(0.5))
    state = tx.init(params)
    spec = bsj.get_spec(state)
    update, key = jax.jit(tx.update), jax.random.key(1)
    moved = []
    for step in range(LENGTH.total):
        before = bsj.get_masks(state)
        key, noise_key = jax.random.split(key)
        noise = optax.tree_utils.tree_random_like(noise_key, params)
        updates, state = update(noise, state, params)
        params = optax.apply_updates(params, updates)
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, bsj.get_masks(state))
        if any(jax.tree.leaves(changed)):
            moved.append(step)
    allowed = [step for step in range(LENGTH.total) if spec.changes(step)]
    assert set(moved) <= set(allowed)
    assert bool(moved) == (bool(allowed) and method not in IN_THE_LOOP)


@pytest.mark.parametrize("method", SPARSE)
def test_an_entry_publishes_the_layout_and_the_density_of_its_pattern(method, params):
    pattern = METHODS[method].options.make_pattern()
    spec = bsj.get_spec(built(method, params).init(params))
    assert spec.has_layout == pattern.has_layout
    assert spec.density == pytest.approx(pattern.density or 0.25, abs=0.02)


@pytest.mark.parametrize("method", SPARSE)
def test_the_default_budget_is_that_of_the_function(method):
    """The options name it, so that config.json does."""
    entry = METHODS[method]
    source = entry.source or entry.function
    parameter = inspect.signature(source).parameters.get("budget")
    if parameter is not None:
        assert entry.options.budget == parameter.default


@pytest.mark.parametrize(
    "method",
    [
        name
        for name in SPARSE
        if hasattr(METHODS[name].options, "budget") and name not in IN_THE_LOOP
    ],
)
def test_the_budget_reaches_the_method(method, params):
    """The layers' densities after pruning are those of the budget that config.json names."""
    difference = {}
    for budget in ("uniform", "erk"):
        transform = bsj.sparse(built(method, params, budget=budget, update_every=1), optax.sgd(0.0))
        state = transform.init(params)
        update = jax.jit(transform.update)
        for _ in range(13 if bsj.get_spec(state).resizes else 0):  # which start dense
            _, state = update(params, state, params)
        masks = bsj.get_masks(state)
        densities = [float(masks[name]["kernel"].mean()) for name in ("conv1", "conv2")]
        difference[budget] = abs(densities[0] - densities[1])
    assert difference["uniform"] < 0.1
    assert difference["erk"] > 0.15


def test_the_table_has_a_row_for_every_method():
    rows = {row["method"]: row for row in registry.rows()}
    assert list(rows) == list(METHODS)
    assert rows["rigl"]["masks change"] == "every 100 steps, 100 to 700"
    assert rows["rigl"]["needs"] == "dense gradient at these steps"
    assert rows["rigl"]["reference"] == "Evci et al., ICML 2020"
    assert rows["set"]["needs"] == "—"
    assert rows["snip"]["function"] == "one_shot(scores=snip(...))"
    assert rows["snip"]["needs"] == "a batch before training"
    assert rows["hrbp"]["masks change"] == "never"
    assert rows["sr-ste"]["masks change"] == "every step"
    assert rows["subp"]["execution"] == "packed (has a layout)"
    assert rows["thinet"]["pattern"] == "channels, removed"
    assert rows["thinet"]["masks change"] == "step 500"
    assert rows["thinet"]["needs"] == "a batch"
    assert rows["prune-train"]["masks change"] == "step 500"
    assert rows["dsr"]["masks change"] == "every 25 to 300 steps, 25 to 900"
    assert {*SPARSE, *SHRINKING} == set(METHODS) - {"dense"}
    for method in (*SPARSE, *SHRINKING):
        assert hasattr(bsj, rows[method]["function"].partition("(")[0])
        assert any(character.isdigit() for character in rows[method]["reference"]), method


def test_the_methods_of_the_field_are_there():
    """HRBP, SUBP, SR-STE and Campfire, and what they are measured against."""
    names = """
        dense hrbp hrbp-dynamic subp sr-ste ste campfire magnitude gradual narang random
        random-channel snip grasp synflow lottery rumi dsb rigl set snfs deep-r dsr granet srigl
        mest prune-train slimming group-lasso sss brain-damage variational-dropout l1-filters thinet
        lasso-channels pfa nest deep-compression
    """
    assert set(names.split()) <= set(METHODS)


def test_the_table_says_all_of_what_is_ours():
    """Every part of "Our choice: A; B", and what the options of a method choose."""
    ours = {row["method"]: row["ours"] for row in registry.rows()}
    assert ours["deep-r"].endswith("counts stay in every layer")
    assert ours["mest"].endswith("the masks before the first step hold the target")
    assert ours["gradual"].endswith("the order taps before channels; the start and the end")
    assert ours["lottery"].startswith("the passes share the epochs of the run")
    assert "Jaccard distance" in ours["rumi"]
    assert "follows the shortcut" not in ours["l1-filters"], "which the paper does"
    assert not any("|" in text for text in ours.values()), "it would end the cell"
    assert all(text == "—" or text[-1].isalnum() or text[-1] in ")`" for text in ours.values())
    assert registry._our_choices("A, 2020. Our choice: b; c. D; e, are our choice; f.") == [
        "b; c",
        "e",
    ]


def test_schedules_are_those_of_the_authors_codes():
    """In runs of their lengths; short ones have as many updates, as far as they can."""
    setup = setup_of(None)

    def schedule(method, length):
        options = METHODS[method].options
        return options.arguments(setup._replace(length=length))["schedule"]

    granet, mest = (schedule(name, Length(390, 160 * 390)) for name in ("granet", "mest"))
    assert (granet.every, granet.end) == (1000, 110 * 390)
    assert (mest.start, mest.every, mest.end) == (5 * 390, 5 * 390, 120 * 390)
    narang = METHODS["narang"].options.arguments(setup._replace(length=Length(390, 40 * 390)))
    assert narang["schedule"] == bsj.between(390, 20 * 390, every=100)
    assert narang["ramp"] == 10 * 390
    dsr, epoch = schedule("dsr", Length(390, 200 * 390)), 390
    steps = [step for step in range(200 * epoch) if dsr(step)]
    expected = []
    for period, first, last in ((100, 0, 25), (200, 25, 80), (400, 80, 140), (800, 140, 200)):
        expected += range(first * epoch + period, last * epoch, period)
    assert steps == expected
    assert [step for step in range(44) if schedule("dsr", Length(22, 44))(step)][:3] == [1, 2, 3]
    assert schedule("granet", Length(22, 220)).every == 10
    asked = dataclasses.replace(METHODS["dsr"].options, update_every=30)
    assert asked.arguments(setup._replace(length=Length(22, 220)))["schedule"] == bsj.every(
        30, until=165
    )
    for method in ("dsr", "granet", "mest"):
        with pytest.raises(ValueError, match="update_every: expected an integer of at least 1"):
            dataclasses.replace(METHODS[method].options, update_every=0).arguments(setup)


def test_the_command_line_knows_every_pattern():
    assert set(NAMES) == set(patterns.__all__) - {"Kept", "Pattern"}
    for name in NAMES:
        made = named({"n_of_m": "n_of_m:2:4", "one_by_n": "one_by_n:8"}.get(name, name))
        assert made.noun
    assert named("kernel:mean") == patterns.kernel("mean")


def test_snip_needs_a_batch(params):
    setup = Setup(0.75, jax.random.key(0), LENGTH, params)
    with pytest.raises(ValueError, match="batch: snip scores weights by the loss of one batch"):
        METHODS["snip"].build(METHODS["snip"].options, setup)


def test_options_that_share_an_option_say_the_same_of_it():
    """Every option has a line in its class's docstring or in that of a base."""
    for entry in METHODS.values():
        kinds = type(entry.options).__mro__
        documented = " ".join(inspect.getdoc(kind) or "" for kind in kinds)
        for field in dataclasses.fields(entry.options):
            assert f"{field.name}: " in documented, (type(entry.options), field.name)


def _schedule_code(tree):
    """Nodes that decide at which steps something happens: `step % n`, `step <= end`, in functions
    that also name an option of a method's schedule.
    """
    names = {"update_every", "until", "drop_fraction"}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.Lambda):
            continue
        inside = list(ast.walk(function))
        used = {n.id for n in inside if isinstance(n, ast.Name)}
        used |= {n.attr for n in inside if isinstance(n, ast.Attribute)}
        steps = {"step", "count"} & used
        compares = any(isinstance(n, ast.Compare | ast.Mod) for n in inside)
        if steps and compares and names & used:
            yield function


def test_experiments_compute_no_schedule_of_a_method():
    """When masks change is the library's business: `get_spec(state)`."""
    root = Path(registry.__file__).parents[1]
    for path in root.rglob("*.py"):
        functions = list(_schedule_code(ast.parse(path.read_text())))
        assert not functions, (
            f"{path}, line {functions[0].lineno}: read bsj.get_spec(state) instead"
        )
    computes_a_schedule = "def moves(step):\n  return step % config.update_every == 0"
    assert list(_schedule_code(ast.parse(computes_a_schedule)))


class Scripted:
    """A schedule that no options could describe."""

    def __call__(self, count):
        return (count == 3) | (count == 5)

    def __eq__(self, other):
        return isinstance(other, Scripted)

    def __hash__(self):
        return 0


def test_the_trainer_follows_the_spec_alone(monkeypatch):
    """A method with a schedule of its own: the forms of the packed execution follow it."""
    entry = dataclasses.replace(
        METHODS["hrbp-dynamic"],
        function=lambda **arguments: bsj.hrbp_prune(**arguments | {"schedule": Scripted()}),
    )
    monkeypatch.setitem(METHODS, "hrbp-dynamic", entry)
    config = TrainConfig(method="hrbp-dynamic", width=0.25, options=small_options("hrbp-dynamic"))
    trainer = Trainer(resolve(config), (8, 8, 1), 10, LENGTH)
    trainer.init()
    forms = [trainer.needs.form(step) for step in range(8)]
    assert [step for step, form in enumerate(forms) if form == "sparse"] == [3, 5]
    assert [step for step in range(8) if trainer.needs.changes_masks(step)] == [3, 5]
    np.testing.assert_equal(set(forms), {"sparse", "packed"})


def test_packed_runs_unpack_where_masks_move_without_a_dense_gradient():
    """SET grows at random, and the masks of packed values could not change."""
    options = dataclasses.replace(METHODS["set"].options, pattern="one_by_n:16", update_every=3)
    config = TrainConfig(method="set", width=0.25, options=options, execution="packed")
    trainer = Trainer(resolve(config), (8, 8, 1), 10, LENGTH)
    state = trainer.init()
    assert not any(trainer.spec.dense_gradient(step) for step in range(LENGTH.total))
    assert [s for s in range(8) if trainer.needs.form(s) == "sparse"] == [3, 6]
    assert state.form == "packed"
