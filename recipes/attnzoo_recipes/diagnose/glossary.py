"""What the terms of the reports mean, in a sentence each."""

from __future__ import annotations

SPECTRUM = {
    "qk, ov": "the matrices of a head that give its logits (query and key weights) and its output (value and output "
    "weights)",
    "eigenvalue": "a squared singular value of such a matrix, divided by its larger side for the Marchenko-Pastur law",
    "law, edge": "how the eigenvalues of random weights of these sizes are distributed, and the largest that the law "
    "allows",
    "threshold": "the edge plus the fluctuation of the largest eigenvalue of random weights at the stated probability",
    "outlier": "an eigenvalue above the threshold; its energy is its share of the sum of all eigenvalues",
    "gap": "the largest eigenvalue divided by the edge, minus 1; 0 or less without structure",
    "soft rank": "the edge divided by the largest eigenvalue; 1 or more without structure",
    "stable rank": "the sum of the eigenvalues divided by the largest",
    "participation ratio": "the squared sum of the eigenvalues divided by the sum of their squares; a number of "
    "dimensions",
}
"""Terms of attnzoo-spectrum."""

HEADS = {
    "pattern": "the attention weights of a head, one row for each query; a row sums to 1",
    "entropy / max": "mean entropy of the rows, divided by the largest possible; 1 is uniform attention",
    "distance": "mean number of tokens between a query and what it attends to, by weight",
    "first token": "mean weight on the first token of a sequence; heads that rest there are called sinks",
    "token before": "mean weight on the token just before the query",
    "previous token, duplicate token, induction": "heads that attend to the token before, to earlier copies of the "
    "same token, and to what followed these copies",
    "cosine": "of two heads' patterns or outputs as vectors; 1 for heads that do the same",
    "clusters, elbow": "groups of heads with similar patterns, and the number of groups after which the error falls "
    "slowly",
}
"""Terms of attnzoo-heads."""

PRUNE = {
    "loss": "mean over what is predicted, in nats; chance is that of equally likely answers",
    "importance": "how much the loss would change if a head were scaled, to first order (Michel et al. 2019): the mean "
    "absolute derivative by a factor on its output",
    "l2, minmax, none": "how importances are normalised within each layer before heads are ranked",
    "greedy, iterative": "importance is measured once, or again before every point of the curve",
    "random, reverse": "the same numbers of heads removed in random orders, and the most important ones first",
    "masked, structural": "outputs of heads multiplied by 0, or their weights removed; only the second saves time",
    "key/value group": "the query heads that share one key and one value head",
    "ablation": "the loss without one head (one), without the others of its layer (all_but_one), without a key/value "
    "group, or without a layer's heads",
}
"""Terms of attnzoo-prune."""
