"""One training step for every method and execution.

`Trainer` holds the jitted steps and asks `StepNeeds`, which reads the method's published spec, what
each of them needs.
"""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import blocksparse_jax as bsj
from blocksparse_jax.state import sparse_states
from experiments.data.resident import EpochRest
from experiments.training.config import TrainConfig
from experiments.training.execution import State, copied, is_dense, to_form, widths_of
from experiments.training.length import Length
from experiments.training.methods import Setup, Weights
from experiments.training.network import Network, variables_of
from experiments.training.optimizer import learning_rate, mask_length, optimizer
from experiments.training.registry import METHODS
from experiments.training.step_needs import StepNeeds
from pallas_kernels.block_sparse_conv import reads_plans


class Metrics(NamedTuple):
    """Of one batch, or of each of several: mean loss and number of right answers, on the device."""

    loss: jax.Array
    correct: jax.Array


class Seed(NamedTuple):
    """What a run takes from a finished one.

    Attributes:
      masks: `masks` or `layouts` for `fixed_masks`.
      params: the weights to start from; None draws them anew.
      batch_stats: the statistics that belong to them.
    """

    masks: dict[str, Any]
    params: Any = None
    batch_stats: Any = None


class Trainer:
    """The training of one config, step by step.

    Args:
      config: a resolved config.
      image_shape: (height, width, channels).
      num_classes: of the data set.
      length: of the run, in steps.
      data_format: of the dense convolutions of the masked form, NHWC or CHWN; None is where they
        are faster: CHWN on CPUs that have the native kernels, else NHWC. The other forms are CHWN.
      seed: masks of another run, to train under in place of the method's own.
      fused: whether training runs in convolutions between batch norms; None: where the
        implementation has passes for them, in its forms (sparse and packed).

    Attributes:
      config: as given.
      network: what is trained.
      image_shape: as given.
      length: of the run.
      needs: what each step needs, after `init`.
      shapes: of the parameters that training begins with, after `init`.
    """

    shapes: Any = None

    def __init__(
        self,
        config: TrainConfig,
        image_shape: tuple[int, ...],
        num_classes: int,
        length: Length,
        data_format: str | None = None,
        seed: Seed | None = None,
        fused: bool | None = None,
    ):
        self.config = config
        self.network = Network(config, num_classes, data_format, fused)
        self.image_shape = image_shape
        self.length = length
        self.needs = StepNeeds(str(config.execution), length.total)
        self._seed = seed
        self._planned: tuple[Any, Any] | None = None  # layouts, and the same with their plans
        self._step = jax.jit(self.train_step, static_argnames="dense_gradient", donate_argnums=0)
        self._steps = jax.jit(self._train_steps, static_argnames="count", donate_argnums=0)
        self._correct = jax.jit(self._count_correct)

    @property
    def spec(self) -> bsj.Spec | None:
        """What the method publishes, after `init`; None where no weights are masked."""
        return self.needs.spec

    def init(self, batch: tuple[Array, Array] | None = None) -> State:
        """The state before the first step, in that step's form.

        Args:
          batch: images and labels, for methods that look at data before training (SNIP).

        Returns:
          Initial parameters (pruned, for hard methods), statistics, optimizer state and layouts.

        Raises:
          ValueError: the method refuses its options, the network or a missing batch.
        """
        config, key = self.config, jax.random.key(self.config.seed)
        assert config.options is not None
        assert config.sparsity is not None
        params, batch_stats = self.initial()

        def loss_fn(params: Any, batch: tuple[Array, Array]) -> Array:
            variables = {"params": params, "batch_stats": batch_stats}
            return self.network.loss(self.network.model("masked"), variables, *batch)[0]

        assert config.batch_size is not None
        dense = optimizer(config, self.length)
        setup = Setup(
            config.sparsity,
            jax.random.fold_in(key, 1),
            mask_length(config, self.length),
            params,
            loss_fn,
            batch,
            self.network.with_all_derivatives(),
            batch_stats,
            dense,
            learning_rate(config, self.length),
            self.image_shape,
            self.length.steps_per_epoch * config.batch_size,
            self.length.total,
        )
        self._setup, self._operations = setup, {}
        if self._seed is None:
            self._operations = config.options.operations(setup)
        self._tx = self._transform(setup)
        state = State(params, batch_stats, self._tx.init(params), {}, "masked")
        spec = None if is_dense(state) else bsj.get_spec(state.opt_state)
        self.needs = dataclasses.replace(self.needs, spec=spec, operations=set(self._operations))
        self.shapes = jax.eval_shape(lambda: params)
        if spec is not None and not spec.straight_through:
            params = bsj.apply_masks(params, bsj.get_masks(state.opt_state))
        # no shared buffers: steps donate them
        state = copied(dataclasses.replace(state, params=params))
        if 0 in self._operations:
            state = self._operate(0, state)
        return to_form(self.needs.form(0), state)

    def _transform(self, setup: Setup) -> optax.GradientTransformationExtraArgs:
        """The optimizer with the method."""
        options, dense = self.config.options, setup.optimizer
        assert options is not None
        assert dense is not None
        if self._seed is not None:
            masks = bsj.fixed_masks(**self._seed.masks, sparsity=setup.sparsity)
            return optax.with_extra_args_support(bsj.sparse(masks, dense))
        method = METHODS[self.config.method].build(options, setup)
        tx = dense if method is None else options.combined(method, dense, setup)
        return optax.with_extra_args_support(tx)

    def initial(self) -> tuple[Any, Any]:
        """The parameters and statistics that training starts from, before any pruning."""
        config, seed = self.config, self._seed
        assert config.options is not None
        assert config.sparsity is not None
        if seed is not None and seed.params is not None:
            return seed.params, seed.batch_stats
        key = jax.random.key(config.seed)
        if seed is not None:  # other weights than those the masks were found with
            key = jax.random.fold_in(key, 2)
        params, batch_stats = self.network.init(key, self.image_shape)
        return config.options.prepare(params, batch_stats, config.sparsity)

    def masks_to_test(self, step: int, state: State) -> list[Any]:
        """The masks of a state, where a step replaces them by those of steps to come.

        Args:
          step: its number, from 0.
          state: in any form, before the step.

        Returns:
          What `with_masks` takes, to test the network after the step by the masks that it was
          trained with; [] where it is to be tested as it is, as after the last step of all.
        """
        last = step + 1 == self.length.total
        if self.spec is None or not self.spec.ahead or last or not self.needs.changes_masks(step):
            return []
        return copied([sparse.masks for sparse in sparse_states(state.opt_state)])

    def with_execution(self, execution: str) -> "Trainer":
        """The same training in another execution; what is compiled is shared.

        Args:
          execution: masked, sparse or packed.

        Returns:
          A trainer for states of this one, moved to the other's forms by `to_form`.
        """
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, execution=execution)
        other.needs = dataclasses.replace(self.needs, execution=execution)
        return other

    @property
    def key(self) -> Array:
        """The random key of the method, an argument of each program."""
        return self._setup.key

    def share(self, other: "Trainer") -> None:
        """Takes the programs of another trainer, whose config differs in no more than the seed."""
        self._step, self._steps, self._correct = other._step, other._steps, other._correct

    def step(
        self, state: State, step: int, images: Float[Array, "n h w c"], labels: Int[Array, " n"]
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
        layouts, without = state.layouts, dataclasses.replace(state, layouts={})
        state, metrics = self._step(
            without,
            self.planned(layouts),
            images,
            labels,
            self.key,
            dense_gradient=self._needs_dense(state, step),
        )
        state = dataclasses.replace(state, layouts=layouts)
        form = self.needs.form(step + 1)
        if step + 1 in self._operations:
            return to_form(form, self._operate(step + 1, to_form("masked", state))), metrics
        if form != state.form or (form != "masked" and self.needs.changes_masks(step)):
            state = to_form(form, state)
        return state, metrics

    def steps(self, state: State, rest: EpochRest, count: int) -> tuple[State, Metrics, EpochRest]:
        """Several steps that are `needs.plain` in one program, which makes their batches too.

        Args:
          state: in the form of these steps; donated.
          rest: of the epoch, its next batch that of the first step.
          count: of the steps; each has a program of its own.

        Returns:
          The state in the same form, the metrics of each step, and the batches that are left.
        """
        layouts, without = state.layouts, dataclasses.replace(state, layouts={})
        state, metrics, step = self._steps(
            without, self.planned(layouts), rest, self.key, count=count
        )
        return dataclasses.replace(state, layouts=layouts), metrics, rest.at(step)

    def lower(
        self, state: State, step: int, images: Float[Array, "n h w c"], labels: Int[Array, " n"]
    ) -> jax.stages.Lowered:
        """Traces the program of a step without running it, to compile it ahead.

        Args:
          state: in the form of this step; it stays. Shapes will do.
          step: its number, from 0.
          images: float32 batch, or its shape.
          labels: int32 classes, or their shape.

        Returns:
          What `step` compiles and runs.
        """
        layouts, without = state.layouts, dataclasses.replace(state, layouts={})
        return self._step.lower(
            without,
            self.planned(layouts),
            images,
            labels,
            self.key,
            dense_gradient=self._needs_dense(state, step),
        )

    def _needs_dense(self, state: State, step: int) -> bool:
        """Whether the step's block-sparse convolutions also give the pruned weights' gradient."""
        return state.form == "sparse" and self.needs.dense_gradient(step)

    def planned(self, layouts: Any) -> Any:
        """The layouts with the lists that the steps read: made once for each change of masks.

        A state holds no plans, and neither do its checkpoints.

        Args:
          layouts: `state.layouts`; the same object as long as the masks stay. Shapes will do.

        Returns:
          The layouts, with plans where the implementation reads them.
        """
        if not layouts or not reads_plans(self.config.implementation):
            return layouts
        if self._planned is None or self._planned[0] is not layouts:
            leaves = jax.tree.leaves(layouts)
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                return jax.eval_shape(bsj.with_plans, layouts)
            self._planned = layouts, bsj.with_plans(layouts)
        return self._planned[1]

    def _operate(self, step: int, state: State) -> State:
        """What the method does before a step, outside of jit; the network may become smaller."""
        model = self.network.model("masked", widths=widths_of(state))

        def loss_fn(params: Any, batch: tuple[Array, Array]) -> Array:
            variables = {"params": params, "batch_stats": state.batch_stats}
            return self.network.loss(model, variables, *batch)[0]

        setup = self._setup._replace(
            params=state.params, batch_stats=state.batch_stats, loss_fn=loss_fn, model=model
        )
        return copied(self._operations[step](state, setup))

    def train_step(
        self,
        state: State,
        layouts: Any,
        images: Array,
        labels: Array,
        key: Array | None = None,
        dense_gradient: bool = False,
    ) -> tuple[State, Metrics]:
        """What `step` compiles: one update, which leaves the state in its form.

        Args:
          state: without layouts.
          layouts: those of the state, `planned`.
          images: float32 batch.
          labels: int32 classes.
          key: of the method; None is the run's own.
          dense_gradient: whether the block-sparse conv also gives the gradient of the pruned
            weights.

        Returns:
          The state, without layouts, and the batch's metrics.
        """
        options, setup, tx = self.config.options, self._setup, self._tx
        assert options is not None
        if key is not None:  # an argument, so that the program serves every seed
            setup = setup._replace(key=key)
            tx = self._transform(setup) if options.draws_in_steps and self._seed is None else tx
        widths = widths_of(dataclasses.replace(state, layouts=layouts))
        model = self.network.model(state.form, dense_gradient, widths)

        def network(weights: Any) -> tuple[Array, Any]:
            variables = variables_of(weights, state.batch_stats, layouts)
            return self.network.loss(model, variables, images, labels)

        def loss_fn(params: Any) -> tuple[Array, Any]:
            masked = self._masked(dataclasses.replace(state, params=params))
            weights = Weights(params, masked, state.opt_state)
            return options.loss(network, weights, setup)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (batch_stats, correct)), grads = grad_fn(state.params)
        if state.form == "masked" and jax.default_backend() == "gpu":
            grads = jax.tree.map(_in_order, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(
            state, params=params, batch_stats=batch_stats, opt_state=opt_state
        )
        return new, Metrics(loss, correct)

    def _train_steps(
        self, state: State, layouts: Any, rest: EpochRest, key: Array, count: int
    ) -> tuple[State, Metrics, Array]:
        def step(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], Metrics]:
            state, number = carry
            batch = rest.at(number).batch()
            state, metrics = self.train_step(state, layouts, *batch, key)
            return (state, number + 1), metrics

        (state, number), metrics = jax.lax.scan(step, (state, rest.step), length=count)
        return state, metrics, number

    def _masked(self, state: State) -> Any:
        """The masked weights, unless the convolution picks the kept ones."""
        masked = state.form == "masked" and self.spec is not None
        return bsj.masked(state.params, state.opt_state) if masked else state.params

    def evaluate(self, state: State, batches: Iterable[tuple[Array, Array, Array]]) -> float:
        """The accuracy over batches of (images, labels, weight), weight 0 marking padding.

        Args:
          state: in any form.
          batches: NHWC float32 images, int32 labels, 0/1 weights.

        Returns:
          A fraction of right answers.
        """
        state = dataclasses.replace(state, layouts=self.planned(state.layouts))
        counts = [self._correct(state, *batch) for batch in batches]
        right, total = (float(sum(column)) for column in zip(*jax.device_get(counts)))
        return right / total

    def _count_correct(
        self, state: State, images: Array, labels: Array, weight: Array
    ) -> tuple[Array, Array]:
        logits = self.logits(state, images)
        return jnp.sum((logits.argmax(-1) == labels) * weight), jnp.sum(weight)

    def logits(self, state: State, images: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """What the network says of images, as at inference.

        Args:
          state: in any form.
          images: NHWC float32 images.

        Returns:
          A score of each class.
        """
        variables = variables_of(self._masked(state), state.batch_stats, state.layouts)
        model = self.network.model(state.form, widths=widths_of(state))
        return model.apply(variables, images, train=False)


def _in_order(grad: Array) -> Array:
    """A kernel's gradient in the kernel's order in memory, before the optimizer reads it.

    cuDNN's gradients are transposed. An update that transposes them too reads and writes weights
    and moments at a quarter of the memory's rate (an H200: 42 MB in 45 us), and not in place.
    """
    return jax.lax.optimization_barrier(grad.reshape(-1)).reshape(grad.shape)
