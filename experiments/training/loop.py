"""One training step for every method and execution: `Trainer` holds the jitted steps and moves a
state between its forms.

A state is in one of three forms: masked (dense conv on masked weights), sparse (block-sparse conv,
dense parameters) or packed (block-sparse conv, packed parameters and optimizer state). Where the
method needs the gradient of the pruned weights, the packed execution is in another form: sparse at
the mask updates of a dynamic method, masked in the soft phase of SUBP, whose kept count changes at
every update (the sparse execution runs that phase in the block-sparse conv and compiles a step for
every count).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import blocksparse_jax as bsj
from experiments import models
from experiments.models.spaces import with_channel_orders
from experiments.training.config import TrainConfig
from experiments.training.methods import METHODS, Length, Recipe, optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training changes.

    Attributes:
      params: dense kernels HWIO, or packed values in the packed form.
      batch_stats: BatchNorm statistics.
      opt_state: the optimizer's, with the masks.
      layouts: a layout for each parameter; {} in the masked form.
      form: masked, sparse or packed (static).
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    layouts: Any
    form: str = dataclasses.field(metadata={"static": True})


class Metrics(NamedTuple):
    """Of one batch: the mean loss and the number of right answers, on the device."""

    loss: jax.Array
    correct: jax.Array


class Trainer:
    """The training of one config, step by step.

    Args:
      config: a resolved config.
      image_shape: (height, width, channels).
      num_classes: of the data set.
      length: of the run, in steps.
      data_format: of the dense convolutions of the masked form, NHWC or CHWN; the other forms are
        CHWN.

    Attributes:
      config: as given.
      recipe: of the config's method.

    Reference: the forms are those of the run's `--execution`.
    """

    recipe: Recipe

    def __init__(
        self,
        config: TrainConfig,
        image_shape: tuple[int, ...],
        num_classes: int,
        length: Length,
        data_format: str = "NHWC",
    ):
        self.config = config
        self._image_shape = image_shape
        self._length = length
        self._model = functools.partial(
            models.create,
            config.model,
            num_classes=num_classes,
            width=config.width,
            stem=str(config.stem),
            dtype=jnp.dtype(config.precision),
        )
        self._masked_format = data_format
        self._step = jax.jit(self._train_step, static_argnames="dense_gradient", donate_argnums=0)
        self._correct = jax.jit(self._count_correct)

    def init(self) -> State:
        """The state before the first step, in that step's form.

        Returns:
          Initial parameters (pruned, for hard methods), statistics, optimizer state and layouts.
        """
        variables = _init(self.model("masked"), jax.random.key(self.config.seed), self._image_shape)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        if self.config.channel_order:
            sizes = {
                name: getattr(self.config, name)
                for name in ("channel_block", "group_size", "block_density", "budget")
            }
            params, batch_stats = with_channel_orders(
                params, batch_stats, self.config.sparsity, **sizes
            )
        self.recipe = METHODS[self.config.method].build(self.config, self._length, params)
        self._tx = optimizer(self.config, self.recipe, self._length)
        opt_state = self._tx.init(params)
        if self.recipe.transform is not None and self.recipe.hard:
            params = bsj.apply_masks(params, bsj.get_masks(opt_state))
        dense = jax.tree.map(
            lambda leaf: leaf.copy(), (params, batch_stats, opt_state)
        )  # no shared buffers: steps donate them
        state = State(*dense, layouts={}, form="masked")
        return self.to(self.form(0), state)

    def model(self, form: str, dense_gradient: bool = False) -> Any:
        """The linen model of a form.

        Args:
          form: masked, sparse or packed.
          dense_gradient: the block-sparse conv also gives the gradient of the pruned weights.

        Returns:
          A module over NHWC images.
        """
        if form == "masked":
            return self._model(data_format=self._masked_format)
        gradient = "dense" if dense_gradient else "masked"
        return self._model(
            data_format="CHWN", implementation=self.config.implementation, kernel_gradient=gradient
        )

    def form(self, step: int) -> str:
        """The form of the state that a step starts from.

        Args:
          step: from 0.

        Returns:
          masked, sparse or packed.
        """
        if self.config.execution != "packed" or not self.recipe.dense_gradient(step):
            return str(self.config.execution)
        return "masked" if self.recipe.resizes else "sparse"

    def with_execution(self, execution: str) -> "Trainer":
        """The same training in another execution; what is compiled is shared.

        Args:
          execution: masked, sparse or packed.

        Returns:
          A trainer for states of this one, moved to the other's forms by `to`.
        """
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, execution=execution)
        return other

    def to(self, form: str, state: State) -> State:
        """Converts a state to a form, exactly.

        Args:
          form: masked, sparse or packed.
          state: in any form.

        Returns:
          The same training state in that form.
        """
        params, opt_state = state.params, state.opt_state
        if state.form == "packed":
            params, opt_state = _unpack(params, opt_state, state.layouts)
        if form == "masked":
            return State(params, state.batch_stats, opt_state, {}, form)
        layouts = jax.tree.map(
            lambda leaf: leaf.copy(), bsj.get_layouts(opt_state)
        )  # a copy: the step donates the state, not the layouts
        if form == "packed":
            params, opt_state = _pack(params, opt_state, layouts)
        return State(params, state.batch_stats, opt_state, layouts, form)

    def step(
        self, state: State, step: int, images: Float[Array, "n h w c"], labels: Int[Array, "n"]
    ) -> tuple[State, Metrics]:
        """One training step; the given state is donated.

        Args:
          state: in the form of this step.
          step: its number, from 0.
          images: float32 batch.
          labels: int32 classes.

        Returns:
          The state in the form of the next step, and the batch's metrics.
        """
        dense_gradient, layouts = (
            state.form == "sparse" and bool(self.recipe.dense_gradient(step)),
            state.layouts,
        )
        state, metrics = self._step(
            dataclasses.replace(state, layouts={}),
            layouts,
            images,
            labels,
            dense_gradient=dense_gradient,
        )
        state = dataclasses.replace(state, layouts=layouts)
        form = self.form(step + 1)
        if form != state.form or (form != "masked" and self.recipe.changes(step)):
            state = self.to(form, state)
        return state, metrics

    def _train_step(
        self, state: State, layouts: Any, images: Array, labels: Array, dense_gradient: bool
    ) -> tuple[State, Metrics]:
        model = self.model(state.form, dense_gradient)

        def loss_fn(params):
            variables = self._variables(dataclasses.replace(state, params=params), layouts)
            logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, logits.shape[-1]), self.config.label_smoothing
            )
            loss = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()
            return loss, (changed.get("batch_stats", {}), jnp.sum(logits.argmax(-1) == labels))

        (loss, (batch_stats, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state, {}, state.form), Metrics(loss, correct)

    def _variables(self, state: State, layouts: Any) -> dict[str, Any]:
        """The model's variables; weights are masked where the convolution does not pick the kept
        ones itself.
        """
        masked = state.form == "masked" and self.recipe.transform is not None
        params = bsj.masked(state.params, state.opt_state) if masked else state.params
        return {"params": params, "batch_stats": state.batch_stats} | (
            {"layouts": layouts} if layouts else {}
        )

    def evaluate(self, state: State, batches: Iterable[tuple[Array, Array, Array]]) -> float:
        """The accuracy over batches of (images, labels, weight), weight 0 marking padding.

        Args:
          state: in any form.
          batches: NHWC float32 images, int32 labels, 0/1 weights.

        Returns:
          A fraction of right answers.
        """
        counts = [self._correct(state, *batch) for batch in batches]
        right, total = (float(sum(column)) for column in zip(*jax.device_get(counts)))
        return right / total

    def _count_correct(
        self, state: State, images: Array, labels: Array, weight: Array
    ) -> tuple[Array, Array]:
        logits = self.model(state.form).apply(
            self._variables(state, state.layouts), images, train=False
        )
        return jnp.sum((logits.argmax(-1) == labels) * weight), jnp.sum(weight)

    def masks(self, state: State) -> Any:
        """The masks of a state in any form: bool trees of the dense parameters, scalar True where
        dense.

        Args:
          state: in any form.

        Returns:
          A tree of bool arrays, which outlives the state.
        """
        if self.recipe.transform is None:
            return jax.tree.map(lambda leaf: jnp.asarray(True), state.params)
        if state.form != "packed":
            return jax.tree.map(lambda leaf: leaf.copy(), bsj.get_masks(state.opt_state))

        def mask(layout):
            return (
                bsj.layout_to_mask(layout)
                if isinstance(layout, bsj.BlockLayout)
                else jnp.asarray(True)
            )

        return jax.tree.map(mask, state.layouts, is_leaf=bsj.is_layout)

    def layouts(self, state: State) -> Any:
        """The layouts of a state in any form.

        Args:
          state: in any form.

        Returns:
          A tree of layouts; {} when training dense.
        """
        if self.recipe.transform is None or state.layouts:
            return state.layouts
        return bsj.get_layouts(state.opt_state)


def stepper(
    trainer: Trainer, state: State, step: int, images: Array, labels: Array
) -> Callable[[], Any]:
    """A function that trains on one batch over and over, to be timed.

    Args:
      trainer: of the state.
      state: copied, since steps donate it.
      step: the number that each step has.
      images: float32 batch, NHWC.
      labels: int32 classes.

    Returns:
      A function without arguments that returns the new state and the metrics.
    """
    box = [jax.tree.map(lambda leaf: leaf.copy(), state)]

    def call():
        box[0], metrics = trainer.step(box[0], step, images, labels)
        return box[0], metrics

    return call


@functools.partial(
    jax.jit, static_argnums=(0, 2), compiler_options={"xla_backend_optimization_level": 0}
)  # runs once: compiling counts
def _init(model: Any, key: Array, image_shape: tuple[int, ...]) -> Any:
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32), train=False)


@jax.jit
def _pack(params: Any, opt_state: Any, layouts: Any) -> tuple[Any, Any]:
    return bsj.pack_tree(
        params, opt_state, layouts, drop_pruned=True
    )  # soft SUBP's too: they play no part once its pattern is final


@jax.jit
def _unpack(values: Any, opt_state: Any, layouts: Any) -> tuple[Any, Any]:
    return bsj.unpack_tree(values, opt_state, layouts)
