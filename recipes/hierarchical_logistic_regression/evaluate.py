"""Predictions for held-out voters and their scores, in nats per voter.

Protocol: fit on `load_data("train")`, 708 voters; score the 236 of `load_data("test")`.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.special import log_expit
from sklearn.linear_model import LogisticRegression

import vi_toolkit as vi


def linear_predictor(draws, X, party, education, income):
    """The logit of each voter under each draw: (draws, voters)."""
    groups = draws["party_effect"][:, party]
    groups = groups + draws["education_sd"][:, None] * draws["education_score"][:, education]
    groups = groups + draws["income_sd"][:, None] * draws["income_score"][:, income]
    return draws["intercept"][:, None] + draws["coefficients"] @ X.T + groups


def predictive_logits(draws, data):
    """Logit of the posterior predictive probability of y = 1, one per voter: array (n,).

    draws: {site: (S, ...)}; data: as `load_data` gives it.
    """
    eta = linear_predictor(draws, **{name: data[name] for name in data if name != "y"})
    logsigmoid = torch.nn.functional.logsigmoid
    return (logsigmoid(eta).logsumexp(0) - logsigmoid(-eta).logsumexp(0)).numpy()


def nuts_predictive_logits():
    """The same of the NUTS draws behind reference.json, for the test split: array (236,)."""
    reference = vi.Reference.load(Path(__file__).with_name("reference.json"))
    return np.array(reference.made["test_predictive_logits"])


def baseline_logits(train, test, groups=("party", "education", "income")):
    """What the baselines predict for `test`: array (n,).

    Maximum likelihood by scikit-learn on X and an indicator for every level of `groups`: none of
    them is complete pooling, all of them no pooling.
    """

    def design(data):
        columns = [data["X"].numpy()]
        for name in groups:
            levels = np.unique(train[name])
            columns.append(data[name].numpy()[:, None] == levels)
        return np.column_stack(columns).astype(float)

    # Indicators sum to the intercept; the penalty is far too small to matter otherwise.
    fit = LogisticRegression(C=1e4, max_iter=100_000).fit(design(train), train["y"].numpy())
    return fit.decision_function(design(test))


def log_predictive_density(logits, y):
    """log p(y_n | training data) per voter: array (n,). logits: (n,); y: (n,) tensor of 0 and 1."""
    return log_expit((2 * y.numpy() - 1) * logits)


def difference(logits, baseline, y):
    """(mean, standard error) over voters of the gain in log predictive density on `baseline`.

    Paired: both predict the same voters, whose difficulty cancels.
    """
    gain = log_predictive_density(logits, y) - log_predictive_density(baseline, y)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))
