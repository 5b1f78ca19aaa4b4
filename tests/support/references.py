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


def l1_kept(kernels, count):
    """The `count` filters with the largest `sum |w|` over all kernels that write a space (Li et
    al., ICLR 2017).
    """
    return largest(sum(np.abs(k).reshape(-1, k.shape[-1]).sum(0) for k in kernels), count)


def contributions(patches, kernel):
    """`z[s, c, f]`, what channel c adds to filter f at sample s: patches `[s, taps, c]`."""
    samples, taps, channels = patches.shape
    z = np.zeros((samples, channels, kernel.shape[-1]))
    for t in range(taps):
        for c in range(channels):
            z[:, c] += np.outer(patches[:, t, c], kernel[t, c])
    return z


def thinet_kept(z, y, count):
    """Removes, one after the other, the channel without which `|y - sum z|^2` is smallest, the
    higher number of equals (Luo et al., ThiNet, ICCV 2017, algorithm 1).
    """
    kept = list(range(z.shape[1]))
    while len(kept) > count:
        errors = [((y - z[:, [c for c in kept if c != out]].sum(1)) ** 2).sum() for out in kept]
        least = min(errors)
        close = [c for c, e in zip(kept, errors) if e <= least + 1e-9 * (y**2).sum()]
        kept.remove(close[-1])
    return np.isin(np.arange(z.shape[1]), kept)


def thinet_factors(z, y, kept):
    """The least-squares factor of each kept channel (equation 7)."""
    matrix = z[:, kept].transpose(0, 2, 1).reshape(-1, kept.sum())
    return np.linalg.lstsq(matrix, y.reshape(-1), rcond=None)[0]


def lasso_kept(z, y, count):
    """A lasso by coordinate descent, with a penalty that grows by a twentieth until at most `count`
    channels are left (He et al., ICCV 2017, equation 3); those of the largest `|b|` just before
    fill up the count.
    """
    matrix = z.transpose(0, 2, 1).reshape(-1, z.shape[1])
    gram, inner = matrix.T @ matrix, matrix.T @ y.reshape(-1)
    penalty = 1e-4 * np.abs(inner).max()
    b = np.ones(len(gram))
    while True:
        before = b.copy()
        for _ in range(60):
            for c in range(len(b)):
                rest = inner[c] - gram[c] @ b + gram[c, c] * b[c]
                b[c] = np.sign(rest) * max(abs(rest) - penalty, 0) / gram[c, c]
        if (b != 0).sum() <= count:
            return largest(np.where(b != 0, np.inf, np.abs(before)), count)
        penalty *= 1.05


def group_norms(kernel, kind):
    """The L2 norm of every set of weights, in the kernel's shape: filters, channels, channel taps
    (Wen et al., NIPS 2016; Lebedev & Lempitsky, CVPR 2016).
    """
    axes = {"filter": (0, 1, 2), "channel": (0, 1, 3), "channel tap": (3,)}[kind]
    norms = np.sqrt((kernel.astype(np.float64) ** 2).sum(axes, keepdims=True))
    return np.broadcast_to(norms, kernel.shape)


def group_lasso_gradient(kernel, kind, strength):
    """`strength * w / |w_set|`, 0 for a set of zeros."""
    norms = group_norms(kernel, kind)
    return strength * kernel / np.where(norms > 0, norms, 1)


def group_lasso_kept(norms, kept, size, threshold, final, is_end):
    """The sets that stay: those above the threshold, as a root mean square over `size` weights, but
    no fewer than the `final` largest, and these alone at the end; pruned sets stay pruned.
    """
    norms = np.where(kept, norms, -1)
    above = (norms > threshold * np.sqrt(size)).sum()
    return largest(norms, final if is_end else max(final, above)) & kept


def snip_scores(weights, gradients):
    """`|w * g|` of every layer, divided by the sum over all (Lee et al., SNIP, ICLR 2019)."""
    sizes = {name: np.abs(weights[name] * gradients[name]) for name in weights}
    total = sum(size.sum() for size in sizes.values())
    return {name: size / total for name, size in sizes.items()}


def gradient(function, weights):
    """The gradient of an analytic function of named weights, exact by complex steps."""
    grads = {}
    for name, leaf in weights.items():
        grads[name] = np.zeros(leaf.shape)
        for place in np.ndindex(leaf.shape):
            moved = leaf.astype(np.complex128)
            moved[place] += 1e-30j
            grads[name][place] = function(weights | {name: moved}).imag / 1e-30
    return grads


def grasp_scores(losses, weights):
    """`w * Hg` with `g = sum_i grad L_i` held constant, and for `Hg = sum_i grad(g . grad L_i)` the
    central difference of the gradient along g (Wang et al., GraSP, ICLR 2020).
    """

    def grad_at(point):
        grads = [gradient(loss, point) for loss in losses]
        return {name: sum(grad[name] for grad in grads) for name in point}

    g = grad_at(weights)
    step = 1e-4 / max(np.abs(leaf).max() for leaf in g.values())
    ahead, behind = (
        grad_at({name: weights[name] + sign * step * g[name] for name in weights})
        for sign in (1, -1)
    )
    return {name: weights[name] * (ahead[name] - behind[name]) / (2 * step) for name in weights}


def grasp_count(size, sparsity):
    """`N - k + 1` weights stay, `k = int(N s)`: the weight at the cut does too."""
    return min(size, size - int(size * sparsity) + 1)


def global_masks(scores, count):
    """The `count` highest scores of all layers together, each layer's best one in any case."""
    best = {name: np.argmax(score) for name, score in scores.items()}
    flat = []
    for name, score in scores.items():
        layer = score.astype(np.float64).reshape(-1).copy()
        layer[best[name]] = np.inf
        flat.append(layer)
    kept = largest(np.concatenate(flat), max(count, len(flat)))
    ends = np.cumsum([len(layer) for layer in flat])[:-1]
    return {
        name: part.reshape(scores[name].shape)
        for name, part in zip(scores, np.split(kept, ends), strict=True)
    }


def synflow_masks(output, weights, sparsity, rounds):
    """Round e scores `|w dR/dw|` of the weights that are left, R the outputs' sum under `|w|`, and
    keeps the best `density^((e + 1) / rounds)` of all (Tanaka et al., SynFlow, NeurIPS 2020).
    """
    size = sum(leaf.size for leaf in weights.values())
    masks = {name: np.ones(leaf.shape, bool) for name, leaf in weights.items()}
    for e in range(rounds):
        left = {name: np.abs(leaf) * masks[name] for name, leaf in weights.items()}
        grads = gradient(output, left)
        scores = {name: np.abs(left[name] * grads[name]) for name in weights}
        count = round((1 - sparsity) ** ((e + 1) / rounds) * size)
        alive = {name: np.where(masks[name], scores[name], -np.inf) for name in scores}
        # what the last round prunes are scores of 0, which tie
        masks = global_masks(alive if e < rounds - 1 else scores, count)
    return masks


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


def signed_stays(kernel, mask, fraction):
    """What SET keeps: of the positive and of the negative weights all but `floor(fraction * n)` of
    each, those nearest to zero (Mocanu et al., SET, 2018).
    """
    stays = np.zeros(mask.shape, bool)
    for side in (mask & (kernel > 0), mask & (kernel < 0)):
        count = int(side.sum())
        gone = math.floor(np.float32(fraction) * np.float32(count))
        stays |= largest(np.where(side, np.abs(kernel), -1.0), count - gone)
    return stays


def deep_r_walk(kernel, mask, sign, pull):
    """Weights and kept connections after one step without noise (Bellec et al., Deep-R, ICLR 2018,
    algorithm 1, before the revival).
    """
    moved = np.where(mask, kernel - np.float32(pull) * sign, 0)
    stays = mask & (moved * sign >= 0)
    return np.where(stays, moved, 0), stays


def dsr_survivors(kernels, masks, threshold):
    """Kept weights of each layer that reach the threshold, the largest one of a layer at least
    (Mostafa & Wang, DSR, ICML 2019).
    """
    survivors = {}
    for name, kernel in kernels.items():
        size = np.where(masks[name], np.abs(kernel), -1.0)
        survivors[name] = (size >= np.float32(threshold)) | largest(size, 1)
    return survivors


def dsr_threshold(threshold, gone, aim):
    """The threshold of the next update: half where too many went, double where too few did."""
    if gone > 1.1 * aim:
        return threshold / 2
    return threshold * 2 if gone < 0.9 * aim else threshold


def granet_masks(kernels, gradients, masks, sparsity, fraction):
    """One threshold through the kept weights of all layers, the largest one of each layer apart,
    then RigL's exchange of `floor(fraction * n)` weights of each layer (Liu et al., GraNet, NeurIPS
    2021).
    """
    sizes = {n: np.where(masks[n], np.abs(k), -np.inf).reshape(-1) for n, k in kernels.items()}
    total = sum(size.size for size in sizes.values())
    scores = {name: size.copy() for name, size in sizes.items()}
    for score in scores.values():
        score[int(score.argmax())] = np.inf
    count = max(len(sizes), round(float((np.float32(1) - np.float32(sparsity)) * total)))
    best = largest(np.concatenate(list(scores.values())), count)
    after, start = {}, 0
    for name, size in sizes.items():
        number = min(int(best[start : start + size.size].sum()), int(masks[name].sum()))
        start += size.size
        moved = math.floor(np.float32(fraction) * np.float32(number))
        stays = largest(size, number - moved)
        grown = largest(np.where(stays, -np.inf, np.abs(gradients[name]).reshape(-1)), moved)
        after[name] = (stays | grown).reshape(masks[name].shape)
    return after


def srigl_mask(kernel, gradient, mask, fan_in, fraction, min_salient):
    """SRigL's step on one layer; `fan_in` is that of the first masks (Lasby et al., ICLR 2024)."""
    filters = kernel.shape[-1]
    kept, size, come = (a.reshape(-1, filters).T for a in (mask, np.abs(kernel), np.abs(gradient)))
    number, live = int(kept.sum()), kept.any(1)
    moved = math.floor(np.float32(fraction) * np.float32(number))
    stays = largest(np.where(kept, size, -1.0), number - moved)
    free = ~kept & live[:, None]
    wanted = largest(np.where(free, come, -1.0), min(moved, int(free.sum()))) & free
    salient = (stays | wanted).sum(1)
    enough = salient >= min_salient * kept.sum(1).max() - 1e-9
    least = math.ceil(fan_in * filters / kept.shape[1])
    needed = largest(np.where(live, salient, -1), least)
    live = live & (enough | needed)
    new = np.zeros_like(kept)
    for f in np.flatnonzero(live):
        fan = fan_in * filters // int(live.sum())
        grown = largest(np.where(stays[f], -np.inf, come[f]), fan - int(stays[f].sum()))
        new[f] = stays[f] | grown
    return new.T.reshape(mask.shape)


def mest_scores(kernel, gradient, weight):
    """`|w| + lambda |g|` (Yuan et al., MEST, NeurIPS 2021)."""
    return np.abs(kernel) + np.float32(weight) * np.abs(gradient)


def narang_part(step, start, ramp, end, ratio):
    """The threshold as a part of the one to reach, with the slopes `theta` and `phi = ratio *
    theta` (Narang et al., ICLR 2017, algorithm 1, equation 1).
    """
    theta = 1 / ((ramp - start) + ratio * (end - ramp))
    if step >= end:
        return 1.0
    if step < ramp:
        return min(1.0, theta * (step - start + 1))
    return min(1.0, theta * (ramp - start + 1) + ratio * theta * (step - ramp + 1))


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
