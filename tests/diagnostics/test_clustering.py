"""Clusters of heads: stored figures, average linkage by its definition, ties, errors and elbows."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from attnzoo.diagnostics.heads import similarity
from attnzoo.diagnostics.heads.clusters import (
    chai_cluster_error,
    cluster_heads,
    cluster_representatives,
    cosine_distance,
    elbow,
    head_correlation,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "chai.safetensors"


@pytest.fixture(scope="module")
def stored():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def patterns(B=2, H=7, T=5, seed=0, sharpness=2.0):
    scores = sharpness * torch.randn(B, H, T, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


def by_definition(pattern, k):
    """Average linkage as it is written down: the mean distance of all pairs, recomputed for every merge."""
    d = cosine_distance(pattern)
    clusters = [[h] for h in range(d.shape[0])]
    while len(clusters) > k:
        pairs = list(itertools.combinations(range(len(clusters)), 2))
        mean = [float(torch.stack([d[a, b] for a in clusters[i] for b in clusters[j]]).mean()) for i, j in pairs]
        i, j = pairs[next(n for n, m in enumerate(mean) if m <= min(mean) + 1e-12)]
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
        clusters.sort()
    return [next(c for c, members in enumerate(clusters) if h in members) for h in range(d.shape[0])]


def test_stored_figures(stored):
    p = stored["output.probe"]
    assert (cosine_distance(p) - stored["output.cosine_distance"]).abs().max() < 1e-9
    assert (head_correlation(p) - stored["output.pearson"]).abs().max() < 1e-9
    labels = cluster_heads(p, 3)
    assert torch.equal(labels, stored["output.labels"])
    assert torch.equal(cluster_representatives(labels, 3), stored["output.representatives"])
    error = chai_cluster_error(p)
    assert (error - stored["output.cluster_error"]).abs().max() < 1e-9
    assert elbow(error) == stored["output.elbow"].item()


@pytest.mark.parametrize("H", [1, 2, 5, 11])
@pytest.mark.parametrize("seed", range(4))
def test_average_linkage_by_its_definition(H, seed):
    p = patterns(1, H, seed=seed)
    for k in range(1, H + 1):
        assert cluster_heads(p, k)[0].tolist() == by_definition(p[0], k)


def test_agrees_with_scipy():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")
    p = patterns(3, 24, 8, seed=3)
    for k in (2, 5, 13):
        for one, labels in zip(p, cluster_heads(p, k), strict=True):
            d = cosine_distance(one).fill_diagonal_(0).clamp(min=0)
            theirs = hierarchy.fcluster(hierarchy.linkage(distance.squareform(d.numpy()), "average"), k, "maxclust")
            number = {}
            assert labels.tolist() == [number.setdefault(int(c), len(number)) for c in theirs]


def test_ties_go_to_the_smallest_heads():
    # Four heads equally far from each other: 0 and 1 merge, and so does 2 with them.
    apart = torch.zeros(4, 3, 3)
    for h in range(4):
        apart[h].view(-1)[h] = 1
    assert cluster_heads(apart, 3).tolist() == [0, 0, 1, 2]
    # Means of equals stay equal, so 2 joins the first cluster before 3 does.
    assert cluster_heads(apart, 2).tolist() == [0, 0, 0, 1]
    # Two pairs of equal heads, whose distance of 0 is only 0 up to rounding.
    p = patterns(1, 4)[0]
    p[3], p[2] = p[0], p[1]
    assert cluster_heads(p, 3).tolist() == [0, 1, 2, 0]
    assert cluster_heads(p, 2).tolist() == [0, 1, 1, 0]


def test_examples_are_clustered_apart():
    p = patterns(4, 9)
    labels = cluster_heads(p, 4)
    for one, row in zip(p, labels, strict=True):
        assert torch.equal(cluster_heads(one, 4), row)
    assert (labels != labels[:1]).any()
    # Numbered by their smallest head: every new number is one more than the largest before.
    for row in labels.tolist():
        assert list(dict.fromkeys(row)) == list(range(4))
    heads = cluster_representatives(labels, 4)
    assert torch.equal(labels.gather(1, heads), torch.arange(4).expand(4, 4))


def test_only_the_probe_counts():
    p = patterns(2, 6, 12)
    other = patterns(2, 6, 12, seed=8)
    other[..., :5, :5] = p[..., :5, :5]
    for function in (cosine_distance, head_correlation):
        assert torch.equal(function(p, 5), function(other, 5))
        assert not torch.equal(function(p), function(other))
    assert torch.equal(cluster_heads(p, 3, 5), cluster_heads(other, 3, 5))
    assert torch.equal(chai_cluster_error(p), chai_cluster_error(p[..., :5, :5]))
    assert not torch.equal(chai_cluster_error(p, 8), chai_cluster_error(p))


def test_error_is_that_of_the_clusters():
    p = patterns(3, 8)
    error = chai_cluster_error(p)
    assert error.shape == (8,)
    assert error[-1] == 0
    assert (error.diff() <= 0).all()
    f = p.flatten(2)
    for k in range(1, 9):
        total = 0.0
        for features, labels in zip(f, cluster_heads(p, k), strict=True):
            for c in range(k):
                members = features[labels == c]
                total += float((members - members.mean(0)).square().sum())
        assert float(error[k - 1]) == pytest.approx(total, abs=1e-12)
    by_example = sum(chai_cluster_error(one) for one in p)
    torch.testing.assert_close(error, by_example)


def test_planted_groups_are_found():
    centre = patterns(1, 3, seed=4, sharpness=4.0)[0]
    noise = patterns(1, 12, seed=5)[0]
    group = [0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 1, 2]
    p = (0.95 * centre[group] + 0.05 * noise)[None]
    assert elbow(chai_cluster_error(p)) == 3
    assert cluster_heads(p, 3)[0].tolist() == group


def test_elbows():
    assert elbow(torch.tensor([5.0])) == 1
    assert elbow(torch.tensor([2.0, 2.0, 2.0])) == 1
    assert elbow(torch.zeros(4)) == 1
    # On a straight line all are equally far from the chord: the first.
    assert elbow(torch.linspace(0.9, 0, 8, dtype=torch.float64)) == 1
    assert elbow(torch.tensor([10.0, 9.0, 1.0, 0.5, 0.0])) == 3
    assert elbow(torch.tensor([10.0, 0.0, 0.0, 0.0])) == 2


def test_causal_cosines_are_high_and_correlations_are_not():
    p = patterns(20, 6, sharpness=1.0)
    off = ~torch.eye(6, dtype=torch.bool)
    cosine, correlation = 1 - cosine_distance(p)[:, off].mean(), head_correlation(p)[:, off].mean()
    assert cosine > 0.8
    assert correlation < cosine - 0.1
    torch.testing.assert_close(1 - cosine_distance(p).mean(0), similarity.attention_cosine(p))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster_heads(patterns(), 0), "num_clusters must lie between 1 and the 7 heads, got 0"),
        (lambda: cluster_heads(patterns(), 8), "num_clusters must lie between 1 and the 7 heads, got 8"),
        (lambda: cluster_heads(patterns()[..., :3], 2), "pattern must have shape"),
        (lambda: cosine_distance(torch.ones(3, 3)), "pattern must have shape"),
        (lambda: chai_cluster_error(patterns(T=4)), "probe_tokens must lie between 1 and the 4 tokens .* got 5"),
        (lambda: cluster_heads(patterns(), 2, 0), "probe_tokens must lie between 1 and the 5 tokens"),
        (lambda: elbow(torch.ones(2, 2)), "error must be a vector"),
        (lambda: elbow(torch.ones(0)), "error must be a vector"),
        (lambda: elbow(None), "error must be a vector of finite numbers, got None"),
        (lambda: elbow(["a"]), "error must be a vector of finite numbers"),
        (lambda: head_correlation([1.0]), r"pattern must be a tensor, got \[1.0\]"),
        (lambda: head_correlation(patterns(), 2.5), "probe_tokens must be an integer, got 2.5"),
        (lambda: chai_cluster_error(patterns(), True), "probe_tokens must be an integer, got True"),
        (lambda: chai_cluster_error(patterns() * math.nan), "pattern must be finite"),
        (lambda: elbow(torch.tensor([1.0, math.nan])), "error must be a vector of finite numbers"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
