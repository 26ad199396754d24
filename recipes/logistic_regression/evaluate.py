"""How well the logistic regression predicts: the protocol and the scores.

Protocol: fit on `load_data("train")`, 426 patients; score the 143 of `load_data("test")`, which
enter neither the fit nor the standardisation. A Bayesian fit predicts patient x with the posterior
predictive probability, the average of sigmoid(intercept + x coefficients) over the posterior; a
point estimate with the sigmoid at the estimate. Scores are means over patients, in nats.

A prediction is kept as its logit, log p - log(1 - p): a probability of 1 - 1e-20 is 1.0 in
floating point, and the log density of the outcome it rules out would be lost.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

import vi_toolkit as vi

# Bins of the predicted probability, narrow at the ends because most patients are clear cases.
EDGES = (0.0, 0.02, 0.2, 0.8, 0.98, 1.0)


def predictive_logits(draws, X):
    """Logit of the posterior predictive probability of y = 1, one per row of X: array (n,).

    draws: {"intercept": (S,), "coefficients": (S, d)}; X: (n, d).

    >>> draws = {"intercept": torch.zeros(2), "coefficients": torch.tensor([[1.0], [-1.0]])}
    >>> predictive_logits(draws, torch.tensor([[3.0]]))     # 0.95 and 0.05 average to a half
    array([0.], dtype=float32)
    """
    eta = draws["intercept"][:, None] + draws["coefficients"] @ X.T
    logsigmoid = torch.nn.functional.logsigmoid
    return (logsigmoid(eta).logsumexp(0) - logsigmoid(-eta).logsumexp(0)).numpy()


def nuts_predictive_logits():
    """The same of the NUTS draws behind reference.json, for the test split: array (143,)."""
    reference = vi.Reference.load(Path(__file__).with_name("reference.json"))
    return np.array(reference.made["test_predictive_logits"])


def point_estimate(X, y, penalty=0.0, tolerance=1e-4):
    """(Penalised) maximum likelihood by scikit-learn, in the form of one posterior draw.

    Minimises -log likelihood + penalty / 2 |coefficients|^2; penalty = 1 is the posterior mode for
    coefficients ~ Normal(0, 1) and a flat intercept. tolerance: stop when every component of the
    gradient of the mean objective is below it.

    With penalty = 0 on linearly separable data there is no maximum: the coefficients grow for as
    long as the optimiser is let run, so the "estimate" is a matter of `tolerance`.
    """
    strength = np.inf if penalty == 0 else 1 / penalty
    fit = LogisticRegression(C=strength, tol=tolerance, max_iter=100_000).fit(X.numpy(), y.numpy())
    return {
        "intercept": torch.tensor(fit.intercept_),
        "coefficients": torch.tensor(fit.coef_),
    }


def log_predictive_density(logits, y):
    """log p(y_n | x_n, training data) per patient: array (n,). logits: (n,), y: (n,) tensor."""
    return log_expit((2 * y.numpy() - 1) * logits)


def reliability(logits, y):
    """Predicted probability against observed frequency, one row per bin of the prediction.

    low, high: central 90 % interval of the bin's true frequency given its count (Jeffreys prior).
    """
    table = pd.DataFrame({"predicted": expit(logits), "observed": y.numpy()})
    table = table.groupby(np.digitize(table["predicted"], EDGES[1:-1])).agg(
        patients=("observed", "size"),
        predicted=("predicted", "mean"),
        observed=("observed", "mean"),
    )
    ones = table["patients"] * table["observed"]
    frequency = scipy.stats.beta(ones + 0.5, table["patients"] - ones + 0.5)
    table = table.assign(low=frequency.ppf(0.05), high=frequency.ppf(0.95))
    labels = [f"{EDGES[i]:g} to {EDGES[i + 1]:g}" for i in table.index]
    return table.set_index(pd.Index(labels, name="predicted probability"))


def calibration_error(logits, y):
    """Expected calibration error: |mean prediction - frequency| of each bin, averaged over
    patients. Weighting a bin by its count leaves the absolute sum of its residuals."""
    p = expit(logits)
    residuals = np.bincount(np.digitize(p, EDGES[1:-1]), p - y.numpy())
    return float(np.abs(residuals).sum() / len(p))


def chance_calibration_error(logits, simulations=500, seed=0):
    """The calibration error these predictions would have if they were the true probabilities.

    It is not zero, as frequencies of few patients scatter. Returns the 5 %, 50 % and 95 % quantile
    over simulated outcomes.
    """
    uniform = torch.rand(simulations, len(logits), generator=torch.Generator().manual_seed(seed))
    outcomes = (uniform < torch.as_tensor(expit(logits))).double()
    return np.quantile([calibration_error(logits, y) for y in outcomes], [0.05, 0.5, 0.95])


def scores(predictions, y):
    """One row per method. predictions: label -> logits (n,); y: (n,).

    Columns: mean log predictive density and its standard error over patients; accuracy at
    probability one half; expected calibration error.
    """
    rows = {}
    for label, logits in predictions.items():
        density = log_predictive_density(logits, y)
        rows[label] = {
            "log predictive density": density.mean(),
            "se": density.std(ddof=1) / np.sqrt(len(density)),
            "accuracy": ((logits > 0) == (y.numpy() == 1)).mean(),
            "calibration error": calibration_error(logits, y),
        }
    return pd.DataFrame(rows).T


def difference(logits, baseline, y):
    """(mean, standard error) over patients of the gain in log predictive density on `baseline`.

    Paired: both predict the same patients, whose difficulty cancels.
    """
    gain = log_predictive_density(logits, y) - log_predictive_density(baseline, y)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))
