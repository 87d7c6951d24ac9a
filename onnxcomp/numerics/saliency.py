"""What each channel is worth, by every criterion in use: one layer or activation in, (channels,) scores out.

Higher means keep. `combine` makes one score of those that coupled layers give, and `penalised` any of them mind cost.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.moments import Moments
from onnxcomp.numerics.obs import Consumer, damped_inverse, removal_costs

Scores = NDArray[np.float64]

# -- weights ----------------------------------------------------------------------------------------------------------


def l1(weights: Floats) -> Scores:
    """sum_i |w_i| over the weights (channels, n) of each channel.

    Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1.
    """
    result: Scores = np.abs(_float64(weights)).sum(axis=1)
    return result


def l2(weights: Floats) -> Scores:
    """sqrt(sum_i w_i^2) over the weights (channels, n) of each channel.

    He, Kang, Dong, Fu and Yang, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018,
    equation 2 with p = 2.
    """
    result: Scores = np.linalg.norm(_float64(weights), axis=1)
    return result


def l1_nonzero(weights: Floats) -> Scores:
    """||w||_1 / ||w||_0: the mean magnitude of the weights (channels, n) that are not zero, 0 where all are.

    On how the scores of a channel's weights are reduced and scaled: Persand, Anderson and Gregg, "Taxonomy of Saliency
    Metrics for Channel Pruning", IEEE Access 9, 2021.
    """
    return _ratio(l1(weights), np.count_nonzero(weights, axis=1))


def l2_nonzero(weights: Floats) -> Scores:
    """||w||_2 / ||w||_0 over the weights (channels, n) of each channel, 0 where all are zero; see `l1_nonzero`."""
    return _ratio(l2(weights), np.count_nonzero(weights, axis=1))


def gamma(scales: Floats) -> Scores:
    """sum_i |gamma_i| over the BatchNorm scales (channels, n) of each channel: mostly one.

    Liu, Li, Shen, Huang, Yan and Zhang, "Learning Efficient Convolutional Networks through Network Slimming", ICCV
    2017, section 3.
    """
    return l1(scales)


def fpgm(weights: Floats) -> Scores:
    """sum_j ||w_i - w_j||_2: how far the filter w_i of (channels, n) lies from all others.

    The filters nearest the geometric median are the ones that others replace: He, Liu, Wang, Hu and Yang, "Filter
    Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019.
    Distances come from inner products: those below 1e-8 of the filters' norms are rounding.
    """
    filters = _float64(weights)
    inner = filters @ filters.T
    squares = np.diagonal(inner)
    distances: Scores = np.sqrt(np.maximum(squares[:, None] + squares - 2 * inner, 0)).sum(axis=1)
    return distances


def random(channels: int, seed: int, name: str) -> Scores:
    """Uniform in [0, 1), by seed and the group's name alone: the control that a criterion has to beat.

    Mittal, Bhardwaj, Khapra and Ravindran, "Recovering from Random Pruning: On the Plasticity of Deep Convolutional
    Neural Networks", WACV 2018.
    """
    return np.random.default_rng([seed, *name.encode()]).random(channels)


# -- activations ------------------------------------------------------------------------------------------------------


def activation(moments: Moments) -> Scores:
    """E|x|, the mean magnitude over all samples and positions.

    Molchanov, Tyree, Karras, Aila and Kautz, "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017, "Activation".
    """
    return moments.magnitudes / max(moments.values.count, 1)


def activation_std(moments: Moments) -> Scores:
    """Standard deviation over samples of each sample's mean |x|: a channel that says the same of all is a constant.

    Polyak and Wolf, "Channel-Level Acceleration of Deep Face Representations", IEEE Access 3, 2015, for the variance of
    a channel's output; Molchanov et al. 2017, "Activation", for its deviation. By sample where they go by batch, so
    that the batch size does not matter.
    """
    result: Scores = np.sqrt(moments.levels.variance)
    return result


def feature_map(moments: Moments) -> Scores:
    """||z||_1 / ||z||_0: the mean magnitude of the values that are not zero, 0 where all are.

    The L1 norm of a feature map, scaled by its own sparsity; see `l1_nonzero`.
    """
    return _ratio(moments.magnitudes, moments.nonzeros)


def apoz(moments: Moments) -> Scores:
    """1 - APoZ, the share of values that are not zero: a channel that is mostly zero after its ReLU can go.

    Hu, Peng, Tai and Tang, "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
    Architectures", 2016 (arXiv:1607.03250), equation 1.
    """
    return moments.nonzeros / max(moments.values.count, 1)


# -- weights and the second moment of what they meet ------------------------------------------------------------------


def wanda(weight: Floats, norms: Floats, columns: NDArray[np.int64]) -> Scores:
    """Sum over o, and j in S, of |W_oj| ||X_j||_2, with S the columns that read the channel.

    Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    equation 1, summed over all weights that would go.

    Args:
        weight: (out, in) of a layer that reads the channels.
        norms: (in,) L2 norm of each of its inputs over the data.
        columns: (channels, n) the inputs that belong to each channel.
    """
    result: Scores = (np.abs(_float64(weight)).sum(axis=0) * norms)[columns].sum(axis=1)
    return result


def obd(consumer: Consumer) -> Scores:
    """tr(W_S diag(H_SS) W_S^T): what removal adds to the layer's squared error, were its inputs uncorrelated.

    LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989, h_kk u_k^2 / 2, for the layer's own squared
    error, whose Hessian is 2 H for every row of W.
    """
    cost = np.square(_float64(consumer.weight)).sum(axis=0) * np.diagonal(consumer.second_moment)
    result: Scores = cost[consumer.columns].sum(axis=1)
    return result


def obs(consumer: Consumer, damping: float = 1e-2) -> Scores:
    """tr(W_S [(H^-1)_SS]^-1 W_S^T): the same when all other weights make up for it; the first step of `eliminate`.

    Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, equation 5, for
    blocks: Kurtic et al., "The Optimal BERT Surgeon", EMNLP 2022, equation 6.

    Args:
        consumer: a layer that reads the channels.
        damping: added to H's diagonal, as a share of its mean.
    """
    return removal_costs(consumer.weight, damped_inverse(consumer.second_moment, damping), consumer.columns)


# -- together ---------------------------------------------------------------------------------------------------------

_AGGREGATES: Mapping[str, Callable[[Scores], Scores]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "sum": lambda rows: rows.sum(axis=0),
}


def combine(members: Sequence[Scores], how: str, normalised: bool) -> Scores:
    """One score for each channel from those that coupled layers give.

    Fang, Ma, Song, Mi and Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023, on why the layers
    of a group must be asked together.

    Args:
        members: of each layer (channels,) scores.
        how: `mean`, `max` or `sum` over the layers.
        normalised: divide the scores of each layer by their mean first, so that all have the same say and groups
            compare. Where the mean is zero they stay.
    """
    rows = np.stack(members)
    if normalised:
        means = rows.mean(axis=1, keepdims=True)
        rows = rows / np.where(means, means, 1)
    return _AGGREGATES[how](rows)


def penalised(scores: Scores, flops_per_channel: ArrayLike, strength: float) -> Scores:
    """Theta - lambda Theta^flops: any criterion, with a channel of an expensive layer worth less.

    Molchanov et al. 2017, "FLOPs regularized pruning".

    Args:
        scores: (channels,) by any criterion, comparable between groups: normalised.
        flops_per_channel: what removing one channel saves, in whatever unit lambda is for.
        strength: lambda.
    """
    result: Scores = scores - strength * np.asarray(flops_per_channel, np.float64)
    return result


def _float64(values: Floats) -> Scores:
    return np.asarray(values, np.float64)


def _ratio(values: Scores, counts: NDArray[np.generic]) -> Scores:
    result: Scores = np.divide(values, counts, out=np.zeros_like(values), where=np.asarray(counts) != 0)
    return result
