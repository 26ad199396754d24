"""Three guides for the conjugate regression, from the one to start with to the exact one."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import A0, B0, PRIOR_SCALE, model

# Recommended. Predictors correlate (the blood serums strongly), so the coefficients' posterior
# does too, and only a full covariance gets their sds right. With hundreds of observations the
# posterior of log(variance) is close to Normal as well. It stays right when you change the model.
full_rank = AutoMultivariateNormal(model)

# Ignores the correlations: right means, but each coefficient's sd is the sd it would have if all
# the others were known, which is too narrow by the factor given in exact.gaussian_optimum.
mean_field = AutoNormal(model)


def exact_family(X, y=None):
    """Normal-inverse-gamma guide: the family the posterior belongs to, so the ELBO can reach
    log p(y). Use it to see what exact looks like; it fits only this conjugate model.

    variance ~ InverseGamma(a, b)
    coefficients | variance ~ MultivariateNormal(m, scale_tril = sqrt(variance) * scale_tril)

    The coefficients' scale must follow the variance as it does in the posterior; a product of
    independent factors could not be exact. Starts at the prior.
    """
    d = X.shape[1]
    a = pyro.param("a", lambda: X.new_tensor(A0), constraint=constraints.positive)
    b = pyro.param("b", lambda: X.new_tensor(B0), constraint=constraints.positive)
    m = pyro.param("m", lambda: X.new_zeros(d))
    scale_tril = pyro.param(
        "scale_tril",
        lambda: PRIOR_SCALE * torch.eye(d, dtype=X.dtype, device=X.device),
        constraint=constraints.lower_cholesky,
    )
    variance = pyro.sample("variance", dist.InverseGamma(a, b))
    pyro.sample("coefficients", dist.MultivariateNormal(m, scale_tril=variance.sqrt() * scale_tril))


guide = full_rank
GUIDES = {"full-rank": full_rank, "mean-field": mean_field, "exact family": exact_family}
