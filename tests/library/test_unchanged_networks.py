"""Networks of others, as they are written, on block-sparse convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from unchanged import assert_linen_equals_masked_dense

import blocksparse_jax as bsj


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "convolutions"),
    [("ResNet18", 64, 19), ("ResNet50", 64, 52), ("VGG16", 224, 12)],
)
def test_flaxmodels_networks_equal_masked_dense(name, size, convolutions):
    flaxmodels = pytest.importorskip("flaxmodels", reason="`make slow` installs it")
    model = getattr(flaxmodels, name)(output="logits", pretrained=None, num_classes=10)
    x = jax.random.uniform(jax.random.key(0), (2, size, size, 3))
    executions = assert_linen_equals_masked_dense(model, x, 1e-4, train=False)
    assert list(executions.values()) == ["block-sparse"] * convolutions


class MnistCnn(nn.Module):
    """The shapes of Flax's MNIST example."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(
            nn.relu(nn.Conv(features=32, kernel_size=(3, 3))(x)), (2, 2), strides=(2, 2)
        )
        x = nn.avg_pool(
            nn.relu(nn.Conv(features=64, kernel_size=(3, 3))(x)), (2, 2), strides=(2, 2)
        )
        x = nn.relu(nn.Dense(features=256)(x.reshape((x.shape[0], -1))))
        return nn.Dense(features=10)(x)


class Bottleneck(nn.Module):
    """The shapes of a block of Flax's ImageNet example."""

    filters: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        def conv(filters, size, strides=(1, 1), name=None):
            return nn.Conv(filters, (size, size), strides, use_bias=False, name=name)

        def norm(name=None):
            return nn.BatchNorm(use_running_average=True, name=name)

        y = nn.relu(norm()(conv(self.filters, 1)(x)))
        y = nn.relu(norm()(conv(self.filters, 3, self.strides)(y)))
        y = norm()(conv(4 * self.filters, 1)(y))
        if x.shape != y.shape:
            x = conv(4 * self.filters, 1, self.strides, name="conv_proj")(x)
            x = norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ImagenetNet(nn.Module):
    """The stem, two blocks and the head of Flax's ImageNet example."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, name="conv_init")(
            x
        )
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        x = Bottleneck(32, strides=(2, 2))(Bottleneck(16)(x))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize(
    ("model", "shape", "convolutions"),
    [
        pytest.param(MnistCnn(), (2, 28, 28, 1), 1, id="mnist"),
        pytest.param(ImagenetNet(), (2, 32, 32, 3), 7, id="imagenet", marks=pytest.mark.slow),
    ],
)
def test_networks_of_flax_examples_equal_masked_dense(model, shape, convolutions):
    x = jax.random.normal(jax.random.key(0), shape)
    executions = assert_linen_equals_masked_dense(model, x, 1e-4)
    assert list(executions.values()) == ["block-sparse"] * convolutions


class NnxBlock(nnx.Module):
    """A residual block as one writes it in nnx."""

    def __init__(self, cin, cout, strides, rngs):
        self.conv1 = nnx.Conv(cin, cout, (3, 3), strides, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(cout, rngs=rngs)
        self.conv2 = nnx.Conv(cout, cout, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(cout, rngs=rngs)
        self.shortcut = (
            nnx.Conv(cin, cout, (1, 1), strides, rngs=rngs) if cin != cout else lambda x: x
        )

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class NnxResNet(nnx.Module):
    """A small ResNet."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.blocks = nnx.List([NnxBlock(16, 16, 1, rngs), NnxBlock(16, 32, 2, rngs)])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def test_nnx_resnet_trains_as_masked_dense():
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    labels = jnp.arange(4)

    def train(model):
        tx = bsj.sparse(bsj.hrbp_prune(0.75, block_density=1), optax.sgd(0.1, momentum=0.9))
        optimizer = bsj.nnx.Optimizer(model, tx, wrt=nnx.Param)
        if isinstance(model.stem, bsj.nnx.BlockSparseConv):
            bsj.nnx.set_layouts(model, bsj.get_layouts(optimizer.opt_state))
        masks = bsj.get_masks(optimizer.opt_state)
        nnx.update(model, bsj.apply_masks(nnx.state(model, nnx.Param), masks))

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        return [float(step(model, optimizer)) for _ in range(3)]

    model = bsj.nnx.sparsify(NnxResNet(nnx.Rngs(0)))
    np.testing.assert_allclose(train(model), train(NnxResNet(nnx.Rngs(0))), rtol=1e-4)
    assert len(bsj.nnx.executions(model)) == 5
