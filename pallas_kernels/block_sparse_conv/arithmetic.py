"""The arithmetic of a convolution's products on a GPU."""

import jax

from pallas_kernels.block_sparse_conv.spec import ConvSpec

HALF_DTYPES = ("bfloat16", "float16")
TF32_PRECISIONS = (
    "default",
    "fastest",
    "bfloat16",
    "high",
    "tensorfloat32",
    "bfloat16_3x",
    "tf32",
    "tf32_tf32_f32",
)
"""JAX's precisions that allow float32 operands to be rounded to TF32."""


def arithmetic(spec: ConvSpec) -> str:
    """How a convolution multiplies on a GPU: in 16 bits, in true float32 or in TF32.

    TF32 must be allowed by the precision. A precision of None means
    `jax_default_matmul_precision`, and where that is None too, true float32.

    Args:
      spec: the static sizes.

    Returns:
      "half" (bfloat16 and float16), "ieee" (true float32) or "tf32".

    Example:
      >>> import dataclasses
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> arithmetic(spec), arithmetic(dataclasses.replace(spec, precision="high"))
      ('ieee', 'tf32')
    """
    if spec.dtype in HALF_DTYPES:
        return "half"
    precision = spec.precision
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    both_operands = precision if isinstance(precision, tuple) else (precision,)
    names = [str(getattr(operand, "name", operand)).lower() for operand in both_operands]
    return "tf32" if all(name in TF32_PRECISIONS for name in names) else "ieee"
