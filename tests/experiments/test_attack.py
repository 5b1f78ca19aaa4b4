"""The fast gradient sign method: by hand on a linear model, and through the command on a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import config

from experiments import attack
from experiments.training.fgsm import fast_gradient_sign
from experiments.training.restored import restore
from experiments.training.run import Run


def test_every_pixel_moves_by_epsilon_along_the_sign_of_a_linear_gradient():
    """Logits (0, w.x) and class 0: the loss rises along w, whatever the size of its entries."""
    mean, std = (0.5, 0.25), (0.2, 0.5)
    pixels = np.array([[0.30, 0.95], [0.02, 0.50]], np.float32).reshape(1, 2, 1, 2)
    weights = np.array([[3.0, 0.1], [-0.2, 0.0]], np.float32).reshape(1, 2, 1, 2)
    images = (pixels - np.array(mean)) / np.array(std)

    def loss(images):
        logits = jnp.stack([jnp.zeros(1), (images * weights).sum((1, 2, 3))], axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(1, int)).sum()

    attacked = fast_gradient_sign(loss, jnp.asarray(images, jnp.float32), 0.1, mean, std)
    seen = np.asarray(attacked) * np.array(std) + np.array(mean)
    # 0.95 + 0.1 and 0.02 - 0.1 leave the range; no gradient, no move
    expected = np.array([[0.40, 1.00], [0.00, 0.50]]).reshape(1, 2, 1, 2)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A packed run."""
    run = Run(config(tmp_path_factory.mktemp("attack"), "hrbp", epochs=2))
    run.train()
    return run


def test_the_command_attacks_a_run(run, capsys):
    folder = run.folder.path
    report = attack.main(attack.AttackConfig(str(folder), epsilons=(0.0, 0.05, 0.3)))
    assert json.loads((folder / "attack.json").read_text()) == report
    assert (folder / "attack.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "hrbp on digits, step 22: test accuracy" in out
    assert "epsilon 0.05: " in out
    accuracies = [row["accuracy"] for row in report["rows"]]
    assert [row["epsilon"] for row in report["rows"]] == [0.0, 0.05, 0.3]
    assert report["test_accuracy"] == run.result["test_accuracy"]
    assert accuracies[0] == pytest.approx(report["test_accuracy"])
    assert accuracies[0] > accuracies[1] > accuracies[2]


@pytest.mark.slow
def test_the_accuracy_is_that_of_images_made_one_by_one(run):
    """With a loop over the test set, unnormalised pixels and the library's own gradient."""
    _, data, trainer, state, _ = restore(str(run.folder.path))
    mean, std, right, total = 0.3053, 0.3760, 0, 0

    @jax.jit
    def grad(pixels, labels):
        def loss(pixels):
            logits = trainer.logits(state, (pixels - mean) / std)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

        return jax.grad(loss)(pixels)

    for images, labels, weight in data.test_batches(128):
        pixels = images * std + mean
        moved = np.clip(pixels + 0.1 * np.sign(grad(pixels, labels)), 0, 1)
        logits = trainer.logits(state, jnp.asarray((moved - mean) / std))
        right += float(((logits.argmax(-1) == labels) * weight).sum())
        total += float(weight.sum())
    report = attack.main(attack.AttackConfig(str(run.folder.path), epsilons=(0.1,)))
    assert report["rows"][0]["accuracy"] == pytest.approx(right / total, abs=1.5 / total)


@pytest.mark.parametrize(
    ("epsilons", "message"),
    [
        ((), r"epsilons: expected numbers in \[0, 1\] such as 0.05 0.1, got none"),
        ((0.1, 8.0), r"epsilons: expected a number in \[0.0, 1.0\], got 8.0; as a fraction"),
        ((-0.1,), r"epsilons: expected a number in \[0.0, 1.0\], got -0.1"),
        ((float("nan"),), r"epsilons: expected a number in \[0.0, 1.0\], got nan"),
    ],
)
def test_wrong_epsilons(tmp_path, epsilons, message):
    with pytest.raises(ValueError, match=message):
        attack.main(attack.AttackConfig(str(tmp_path), epsilons=epsilons))


def test_attack_of_no_run(tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.json: missing, so .* is not the folder of a run$"
    ):
        attack.main(attack.AttackConfig(str(tmp_path)))
