"""Deep Compression of trained networks: shared weights, and their coding to the last bit."""

from blocksparse_jax.compression.encode import Compressed, compress, decompress
from blocksparse_jax.compression.share import SharedWeights, share_weights

__all__ = ["Compressed", "SharedWeights", "compress", "decompress", "share_weights"]
