"""Which channels of a trained network to keep, one file a rule, residual-safe by channel spaces.

    counts = channel_counts(params, spaces, 0.75)
    kept = l1_filters(params, spaces, counts)
    masks = channel_masks(params, spaces, kept)

A space is all axes of a network that count the same channels (`fold_channel_orders` explains it).
Its kernels write the channels (their last axis) or read them (the axis before it). `kept` is
`{space: bool vector of its channels}`, as `remove_channels` takes it. Rules that look at data take
what the layers read (`LayerInput`): `linen.capture_inputs` records it, and any other network gives
its own arrays.
"""
