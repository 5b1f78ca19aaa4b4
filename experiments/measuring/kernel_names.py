"""The categories of GPU kernels, by their names."""

KERNEL_NAMES = {  # the first that fits: a part of a kernel's name -> its category
    "gather_product": "block-sparse kernels",
    "weight_gradient": "block-sparse kernels",
    "mosaic": "block-sparse kernels",
    "sort": "sort",
    "scatter": "scatter",
    "transpose": "transpose",
    "nvjet": "cuDNN and cuBLAS",
    "xmma": "cuDNN and cuBLAS",
    "cudnn": "cuDNN and cuBLAS",
    "cutlass": "cuDNN and cuBLAS",
    "gemm": "cuDNN and cuBLAS",
    "conv2d": "cuDNN and cuBLAS",
    "nchwtonhwc": "cuDNN and cuBLAS",
    "nhwctonchw": "cuDNN and cuBLAS",
    "reduce": "reductions",
    "gather": "gather",
    "concatenate": "concatenate",
    "pad": "pad",
    "memcpy": "copies",
    "memset": "copies",
    "copy": "copies",
    "fusion": "other elementwise",
    "wrapped": "other elementwise",
}
OTHER = "other"


def category(kernel: str) -> str:
    """Returns the category of a kernel, by its name.

    Args:
      kernel: name of a GPU kernel.

    Example:
      >>> category("sm90_xmma_wgrad_indexed"), category("loop_add_fusion_3")
      ('cuDNN and cuBLAS', 'other elementwise')
    """
    name = kernel.lower()
    return next((kind for part, kind in KERNEL_NAMES.items() if part in name), OTHER)


def by_category(kernels: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Returns how many kernels of each category run and how long, the longest first.

    Args:
      kernels: `(launches, microseconds)` by name.

    Returns:
      `(launches, microseconds)` by category.

    Example:
      >>> by_category({"loop_fusion": (1, 2.0), "sort.1": (1, 3.0), "loop_fusion_1": (2, 0.5)})
      {'sort': (1, 3.0), 'other elementwise': (3, 2.5)}
    """
    sums: dict[str, tuple[float, float]] = {}
    for name, (launches, us) in kernels.items():
        kind = category(name)
        before = sums.get(kind, (0, 0.0))
        sums[kind] = (before[0] + launches, before[1] + us)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))
