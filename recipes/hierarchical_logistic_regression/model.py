"""Hierarchical logistic regression with three crossed groupings."""

import pyro
import pyro.distributions as dist

# "predictors" is the columns of X; "party", "education" and "income" are plates of groups.
LATENTS = {
    "intercept": (),
    "coefficients": ("predictors",),
    "party_sd": (),
    "education_sd": (),
    "income_sd": (),
    "party_effect": ("party",),
    "education_score": ("education",),
    "income_score": ("income",),
}
LEVELS = {"party": 7, "education": 7, "income": 24}

# Weakly informative, on the logit scale and for standardised predictors, as in logistic_regression.
# The prior of the groups' sds, 95 % between 0.14 and 7, leaves out zero: seven groups do not say
# that an sd is not zero, and a density that is positive there gives log sd a long lower tail, which
# means nothing but "small" (boundary-avoiding priors: Chung et al., Psychometrika, 2013).
INTERCEPT_SCALE, COEFFICIENT_SCALE, SD_MEDIAN, SD_SPREAD = 2.5, 1.0, 1.0, 1.0


def model(X, party, education, income, y=None):
    """intercept ~ Normal(0, 2.5),   coefficients ~ Normal(0, 1)
    party_sd, education_sd, income_sd ~ LogNormal(0, 1)
    party_effect ~ Normal(0, party_sd)                         for each of 7 party identifications
    education_score, income_score ~ Normal(0, 1)               for each of 7 and of 24 levels
    logit = intercept + X coefficients + party_effect[j]
            + education_sd education_score[k] + income_sd income_score[l]
    y ~ Bernoulli(logit)                                       for each voter

    Party is centred: 30 to 150 voters a group determine the effect, whatever party_sd is.
    Education and income are non-centred: their small groups say little, and the effects' scale is
    what is uncertain. X: (voters, predictors), without a column of ones. party, education, income:
    (voters,), the number of the voter's group. y: (voters,) of zeros and ones, floating point, or
    None to draw it. Returns y.
    """
    zero = X.new_zeros(())
    intercept = pyro.sample("intercept", dist.Normal(zero, INTERCEPT_SCALE))
    coefficients = pyro.sample(
        "coefficients", dist.Normal(X.new_zeros(X.shape[1]), COEFFICIENT_SCALE).to_event(1)
    )
    sd_prior = dist.LogNormal(X.new_tensor(SD_MEDIAN).log(), SD_SPREAD)
    party_sd = pyro.sample("party_sd", sd_prior)
    education_sd = pyro.sample("education_sd", sd_prior)
    income_sd = pyro.sample("income_sd", sd_prior)
    with pyro.plate("party", LEVELS["party"]):
        of_party = pyro.sample("party_effect", dist.Normal(zero, party_sd))
    with pyro.plate("education", LEVELS["education"]):
        of_education = education_sd * pyro.sample("education_score", dist.Normal(zero, 1.0))
    with pyro.plate("income", LEVELS["income"]):
        of_income = income_sd * pyro.sample("income_score", dist.Normal(zero, 1.0))
    logit = intercept + X @ coefficients
    logit = logit + of_party[party] + of_education[education] + of_income[income]
    with pyro.plate("voters", X.shape[0]):
        return pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)
