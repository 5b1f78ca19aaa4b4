"""Slow, plain NumPy transcriptions of the methods, written from their definitions: what the
library's transformations are compared with.

Conv kernels are HWIO, `[kh, kw, cin, cout]`. Ties: the higher score wins, equal scores go to the
lower index in C order.
"""

import itertools
import math

import numpy as np


def largest(scores, count):
    """Mask of the `count` largest scores, ties to the lower index in C order."""
    scores = np.asarray(scores, np.float64)
    flat = scores.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def floor(number):
    """The floor of a real number in floating point, where 28.999999 stands for 29."""
    return math.floor(number + 1e-4)


def erk_densities(shapes, density):
    """`density_l = eps * sum(shape) / prod(shape)`; layers above 1 become dense and eps is solved
    again (Evci et al., RigL, ICML 2020).
    """
    dense = set()
    while True:
        sizes = [math.prod(s) for s in shapes]
        room = density * sum(sizes) - sum(sizes[i] for i in dense)
        eps = room / sum(sum(s) for i, s in enumerate(shapes) if i not in dense)
        over = {
            i for i, s in enumerate(shapes) if i not in dense and eps * sum(s) / math.prod(s) > 1
        }
        if not over:
            return [
                1.0 if i in dense else eps * sum(s) / math.prod(s) for i, s in enumerate(shapes)
            ]
        dense |= over


def er_densities(shapes, density):
    """ERK's rule over the channels alone: `density_l = eps * (cin + cout) / (cin * cout)`, of all
    `kh * kw` taps alike; layers above 1 become dense and eps is solved again (Mocanu et al., SET,
    2018).
    """
    raw = [(cin + cout) / (cin * cout) for *_, cin, cout in shapes]
    sizes = [math.prod(s) for s in shapes]
    dense = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        room = density * sum(sizes) - sum(sizes[i] for i in dense)
        eps = room / sum(raw[i] * sizes[i] for i in sparse)
        over = {i for i in sparse if eps * raw[i] > 1}
        if not over:
            return [1.0 if i in dense else eps * raw[i] for i in range(len(shapes))]
        dense |= over


def cubic_sparsity(step, start, end, initial, final, power=3):
    """`s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^power` inside [start, end] (Zhu &
    Gupta, ICLR workshop 2018, eq. 1).
    """
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** power


def gradual_mask(kernel, mask, sparsity):
    """The `round((1 - s) * size)` largest `|w * mask|`; a pruned weight never comes before an
    active one.
    """
    scores = np.where(mask, np.abs(kernel), -1.0)
    return largest(scores, round((1 - sparsity) * kernel.size)) & mask


def n_m_mask(kernel, n, m, axis):
    """The `n` largest `|w|` of each `m` consecutive weights along the reduction axis (Zhou et al.,
    ICLR 2021).

    `axis="input"`: consecutive input channels at one tap of one filter. `axis="kernel"`:
    consecutive in each filter's weights, in the order (channel, y, x).
    """
    kh, kw, cin, cout = kernel.shape
    mask = np.zeros(kernel.shape, bool)
    for f in range(cout):
        if axis == "input":
            runs = [[(y, x, c, f) for c in range(cin)] for y in range(kh) for x in range(kw)]
        else:
            runs = [[(y, x, c, f) for c in range(cin) for y in range(kh) for x in range(kw)]]
        for run in runs:
            assert len(run) % m == 0
            for first in range(0, len(run), m):
                group = run[first : first + m]
                for position, kept in zip(group, largest([abs(kernel[p]) for p in group], n)):
                    mask[position] = kept
    return mask


def sr_ste_gradient(gradient, kernel, mask, decay):
    """`g(w~) + lambda (1 - mask) w`: what the optimizer gets (Zhou et al., ICLR 2021)."""
    return gradient + decay * (1 - mask) * kernel


def sad(mask_a, mask_b):
    """Sparse Architecture Divergence `||E_b - E_a||_1`, normalised by the size (Zhou et al., ICLR
    2021).
    """
    return float(np.abs(mask_b.astype(float) - mask_a.astype(float)).sum()) / mask_a.size


def rigl_due(step, start, until, every):
    """Whether the topology changes at this step."""
    return start < step < until and (step - start) % every == 0


def rigl_drop_count(step, n_on, start, until, drop_fraction):
    """`floor(alpha / 2 (1 + cos(pi t / T_end)) n_on)` with t counted from `start` (Evci et al.,
    RigL, ICML 2020), before the floor.
    """
    return drop_fraction / 2 * (1 + math.cos(math.pi * (step - start) / (until - start))) * n_on


def rigl_mask(kernel, gradient, mask, n_drop):
    """Keeps the largest `|w * mask|`, grows the largest dense `|gradient|` among all the others
    (Evci et al., RigL, ICML 2020, alg. 1).
    """
    kept = largest(np.where(mask, np.abs(kernel), -1.0), int(mask.sum()) - n_drop)
    grown = largest(np.where(kept, -1.0, np.abs(gradient)), n_drop)
    return kept | grown


def cosine_fraction(step, start, until, fraction):
    """`fraction / 2 (1 + cos(pi (t - start) / (until - start)))`; constant where `until` is None
    (Evci et al., RigL, ICML 2020, section 3).
    """
    if until is None:
        return fraction
    return fraction / 2 * (1 + math.cos(math.pi * (step - start) / (until - start)))


def hrbp_moved_runs(kept_runs, fraction):
    """How many runs of channels a group exchanges at one step: `fraction * kept_runs`, rounded,
    halves up (before the floor).
    """
    return fraction * kept_runs + 0.5


def hrbp_channels(filters, channels, taps, kernel, gradient, moved, run=1):
    """The kept channels `[groups, kept]` after one topology step of dynamic HRBP.

    In every group the `moved` kept runs of `run` channels with the smallest summed `|w|` are
    dropped, and as many with the largest summed `|g|` are grown among all runs that did not stay.
    Sums are over the group's filters, its kept taps and the channels of the run; NaN counts as 0
    (Ma et al., HRBP, CPAL 2024).
    """
    kw, cin = kernel.shape[1:3]
    after = []
    for members, kept, positions in zip(filters, channels, taps):

        def score(array, first, members=members, positions=positions):
            total = 0.0
            for channel in range(first * run, (first + 1) * run):
                for position in positions:
                    weights = np.abs(array[position // kw, position % kw, channel, members])
                    total += np.nan_to_num(weights.astype(np.float64)).sum()
            return total

        kept_runs = [int(channel) // run for channel in kept[::run]]
        by_weight = sorted(kept_runs, key=lambda r: (-score(kernel, r), r))
        stay = by_weight[: len(kept_runs) - moved]
        others = [r for r in range(cin // run) if r not in stay]
        grown = sorted(others, key=lambda r: (-score(gradient, r), r))[:moved]
        after.append([r * run + i for r in sorted(stay + grown) for i in range(run)])
    return np.array(after)


def block_mask(filters, channels, taps, shape):
    """The mask of a block pattern: every group keeps its taps at its channels of its filters."""
    mask = np.zeros(shape, bool)
    for members, kept, positions in zip(filters, channels, taps):
        for position in positions:
            mask[position // shape[1], position % shape[1]][np.ix_(kept, members)] = True
    return mask


def subp_block(filters, block):
    """The largest divisor of the filter count that is at most `block`."""
    return max(d for d in range(1, filters + 1) if filters % d == 0 and d <= block)


def subp_scores(kernel, mask, block, criterion, version=2, alpha=1.0):
    """Scores `[groups, cin]` of the blocks of `block` consecutive filters x one input channel
    (Xiang et al., SUBP, NeurIPS 2023).
    """
    cin, cout = kernel.shape[2:]
    masked = kernel.astype(np.float64) * mask
    weights = masked if version == 2 else kernel.astype(np.float64)

    def blocks_of(values, g):
        return [values[:, :, c, g * block : (g + 1) * block].reshape(-1) for c in range(cin)]

    scores = np.zeros((cout // block, cin))
    for g in range(cout // block):
        blocks = blocks_of(weights, g)
        if criterion == "l1":
            scores[g] = [np.abs(b).sum() for b in blocks]
        elif criterion == "l2":
            scores[g] = [np.sqrt((b**2).sum()) for b in blocks]
        else:
            lengths = [np.abs(b).sum() for b in blocks]
            scores[g] = _angular_redundancy(lengths, blocks_of(masked, g), alpha)
    return scores


def _angular_redundancy(length, blocks, alpha):
    """`l_j / sum l - alpha r_j / sum r`, l the L1 norm, `r_j = sum_i |cos(b_i, b_j)|` of the masked
    blocks; a zero block's normalised r is 1.
    """
    norms = [np.linalg.norm(b) for b in blocks]
    redundancy = [0.0] * len(blocks)
    for j, i in itertools.product(range(len(blocks)), repeat=2):
        if norms[i] > 0 and norms[j] > 0:
            redundancy[j] += abs(blocks[i] @ blocks[j]) / (norms[i] * norms[j])
    scores = []
    for j in range(len(blocks)):
        share = length[j] / sum(length) if sum(length) > 0 else 0.0
        scores.append(share - alpha * (redundancy[j] / sum(redundancy) if norms[j] > 0 else 1.0))
    return scores


def subp_rho(step, start, end, every, schedule):
    """The growth schedule, 0 before `start` (all regrown) and 1 from `end` on (Xiang et al., SUBP,
    NeurIPS 2023).
    """
    t = min(max((step - start) / (end - start), 0.0), 1.0)
    if schedule == "cubic":
        return t**3
    if schedule == "linear":
        return t
    if schedule == "cos":
        return 1 - math.cos(math.pi * t / 2)
    epochs = (end - start) / every  # i-th of them; i = epochs - 1 is the last to change anything
    if epochs <= 1:
        return math.floor(t)
    i = min(epochs * t, epochs - 1)
    return (1 - math.exp(-0.05 * i)) / (1 - math.exp(-0.05 * (epochs - 1)))


def subp_counts(sparsity, channels, rho):
    """Blocks removed and blocks regrown in each group: `floor(P C)`, `floor((P - P rho) C)`."""
    return floor(sparsity * channels), floor((sparsity - sparsity * rho) * channels)


def subp_probabilities(removed_scores, tau):
    """`softmax(x / tau)`, x = the removed blocks' scores divided by their L2 norm (0 when all of
    them are 0).
    """
    scores = np.asarray(removed_scores, np.float64)
    norm = np.sqrt((scores**2).sum())
    x = scores / norm if norm > 0 else np.zeros_like(scores)
    weights = np.exp((x - x.max()) / tau)
    return weights / weights.sum()


def draws_without_replacement(probabilities, count):
    """Exact probability of every set of `count` items drawn one by one without replacement, in
    proportion to `probabilities`.
    """
    sets = {frozenset(s): 0.0 for s in itertools.combinations(range(len(probabilities)), count)}
    for order in itertools.permutations(range(len(probabilities)), count):
        chance = 1.0
        remaining = 1.0  # of the probability, of all items not yet drawn
        for item in order:
            chance *= probabilities[item] / remaining
            remaining -= probabilities[item]
        sets[frozenset(order)] += chance
    return sets


def subp_channels(mask, block):
    """Kept input channels `[groups, cin]` of a mask of whole blocks."""
    cin, cout = mask.shape[2:]
    blocks = mask.reshape(-1, cin, cout // block, block)
    kept = blocks.all((0, 3))
    assert (kept == blocks.any((0, 3))).all(), "a block is kept in part"
    return kept.T


def snip_scores(weights, gradients):
    """`|w * g|` of every layer, divided by the sum over all (Lee et al., SNIP, ICLR 2019)."""
    sizes = {name: np.abs(weights[name] * gradients[name]) for name in weights}
    total = sum(size.sum() for size in sizes.values())
    return {name: size / total for name, size in sizes.items()}


def moving_average(average, gradient, decay):
    """`decay * m + (1 - decay) * g`: what SNFS grows by (Dettmers & Zettlemoyer, 2019)."""
    return decay * average + (1 - decay) * gradient


def exchange(kept, stay, come, n_drop):
    """One row: keeps the best `stay` of the kept sets, grows the best `come` of all others."""
    stays = largest(np.where(kept, stay, -np.inf), int(kept.sum()) - n_drop)
    return stays | largest(np.where(stays, -np.inf, come), n_drop)


def complete_linkage(distance, clusters):
    """Merges the pair of clusters whose farthest members are closest, the first pair of equals,
    until so many clusters remain; each is the sorted list of its rows.
    """
    groups = [[i] for i in range(len(distance))]
    while len(groups) > clusters:
        pairs = itertools.combinations(range(len(groups)), 2)
        first, second = min(
            pairs,
            key=lambda pair: max(distance[i, j] for i in groups[pair[0]] for j in groups[pair[1]]),
        )
        groups[first] = sorted(groups[first] + groups.pop(second))
    return groups


def forward_matrix(kernel):
    """`[kh, kw, cin, cout]` as `[cout, cin * kh * kw]`, a filter a row."""
    kh, kw, cin, cout = kernel.shape
    rows = [
        [kernel[y, x, c, f] for c in range(cin) for y in range(kh) for x in range(kw)]
        for f in range(cout)
    ]
    return np.array(rows)


def dsb_mask(weights, sparsity, block):
    """The forward matrix's mask of DSB (2022), by the authors' code as described in words."""
    matrix = np.abs(forward_matrix(weights).astype(np.float64))
    top = largest(matrix.reshape(-1), round((1 - sparsity) * matrix.size)).reshape(matrix.shape)
    counts = top.sum(1)
    distance = np.ones((len(matrix), len(matrix)))
    for i, j in itertools.product(range(len(matrix)), repeat=2):
        if counts[i] * counts[j]:
            distance[i, j] = 1 - (top[i] & top[j]).sum() / np.sqrt(counts[i] * counts[j])
    clusters = sorted(complete_linkage(distance, max(1, len(matrix) // block)), key=len)
    order = [row for cluster in clusters for row in cluster]
    squares = []
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        norms = [np.sqrt(((matrix * top)[rows, c] ** 2).sum()) for c in range(matrix.shape[1])]
        columns = sorted(range(len(norms)), key=lambda c: -norms[c])
        for at in range(0, len(columns), block):
            chosen = columns[at : at + block]
            squares.append((sum(norms[c] for c in chosen), rows, chosen))
    squares.sort(key=lambda square: -square[0])
    mask = np.zeros(matrix.shape, bool)
    for _, rows, columns in squares[: math.ceil((1 - sparsity) * matrix.size / block**2 - 1e-9)]:
        mask[np.ix_(rows, columns)] = True
    return mask


def rumi_blocks(mask, clusters, t1=1.5):
    """Rows and columns of the blocks of "Grouping" (Rumi et al., 2020), by its public
    re-implementation as described in words, with Jaccard distances.
    """
    matrix = forward_matrix(mask)
    rows = [f for f in range(len(matrix)) if matrix[f].any()]
    distance = np.array(
        [
            [1 - (matrix[i] & matrix[j]).sum() / (matrix[i] | matrix[j]).sum() for j in rows]
            for i in rows
        ]
    ).astype(np.float32)
    blocks = []
    for members in complete_linkage(distance, clusters):
        cluster = [rows[i] for i in members]
        if len(cluster) <= 16:
            continue
        columns = []
        counts = matrix[cluster].sum(0)
        for column in sorted(range(matrix.shape[1]), key=lambda c: -counts[c]):
            gains = any(len(columns) + 1 <= t1 * matrix[row].sum() for row in cluster)
            if counts[column] and gains:
                columns.append(column)
        whole = len(cluster) // 32 * 32 if len(cluster) > 32 else len(cluster)
        blocks += [(part, sorted(columns)) for part in (cluster[:whole], cluster[whole:]) if part]
    return blocks


def campfire_counts(shape, sparsity, share):
    """Weights of each kernel slice and kernel slices that a conv layer keeps at the era's end."""
    kh, kw, cin, cout = shape
    share = share if kh * kw > 1 else 0
    taps = max(1, round((1 - share * sparsity) * kh * kw))
    if share == 1:
        return taps, cin * cout
    return taps, min(cin * cout, max(1, round((1 - sparsity) * kh * kw * cin * cout / taps)))


def campfire_conv_mask(kernel, mask, window_sparsity, slice_sparsity, final, share):
    """One update of Campfire (Gamboa et al., 2020) on the proposed weights of a conv layer.

    Every kernel slice keeps its largest weights, then the slices of the largest `max |w|` stay:
    `1 - share * s` of the weights of a slice, `(1 - s) / (1 - share * s)` of the slices, rounded
    and no fewer than the final counts. What is pruned stays pruned.
    """
    kh, kw, cin, cout = kernel.shape
    share = share if kh * kw > 1 else 0
    size, one = np.abs(kernel), np.float32(1)
    taps = max(final[0], int(np.round((one - np.float32(share) * window_sparsity) * (kh * kw))))
    new = np.zeros(mask.shape, bool)
    for c, f in np.ndindex(cin, cout):
        inside = np.where(mask[:, :, c, f], size[:, :, c, f], -1)
        new[:, :, c, f] = largest(inside, taps) & mask[:, :, c, f]
    if share == 1:
        return new
    density = (one - slice_sparsity) / (one - np.float32(share) * slice_sparsity)
    slices = max(final[1], int(np.round(density * (cin * cout))))
    best = np.where(new, size, -1).max((0, 1))
    return new & largest(best, slices)


def campfire_dense_mask(kernel, mask, live, sparsity, final_sparsity, block):
    """One update of Campfire on a dense layer: windows of `block x block` weights.

    Weights of dead inputs go first, unless a column of windows has no others: it keeps its best
    window. Then the windows of the largest sums stay, the best one of every column among them.
    """
    cin, cout = kernel.shape
    windows = [
        (slice(i, i + block), slice(j, j + block), j // block)
        for i in range(0, cin, block)
        for j in range(0, cout, block)
    ]
    columns = -(-cout // block)
    usable = {}
    for column in range(columns):
        own = [w for w in windows if w[2] == column]
        alive = [w for w in own if (mask & live[:, None])[w[:2]].any()]
        for window in alive:
            usable[windows.index(window)] = (mask & live[:, None])[window[:2]]
        if not alive:
            sums = [np.where(mask[w[:2]], np.abs(kernel[w[:2]]), 0).sum() for w in own]
            sums = [s if mask[w[:2]].any() else -1 for s, w in zip(sums, own)]
            best = own[int(np.argmax(sums))]
            usable[windows.index(best)] = mask[best[:2]]
    score = {
        i: np.where(part, np.abs(kernel[windows[i][:2]]), 0).sum() for i, part in usable.items()
    }
    first = {
        max((i for i in usable if windows[i][2] == column), key=lambda i: (score[i], -i))
        for column in range(columns)
    }
    count = max(1, round((1 - final_sparsity) * len(windows)))
    count = max(count, columns, int(np.round((np.float32(1) - sparsity) * len(windows))))
    order = sorted(usable, key=lambda i: (i not in first, -score[i], i))
    new = np.zeros(mask.shape, bool)
    for i in order[:count]:
        new[windows[i][:2]] = usable[i]
    return new
