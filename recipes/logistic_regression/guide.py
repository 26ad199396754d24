"""Two Gaussian guides for the logistic regression."""

from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import model

# Recommended. The predictors measure much the same thing several times over (radius, perimeter and
# area; mean and worst), so the data fix sums of coefficients better than the coefficients, and the
# posterior is strongly correlated. Only a full covariance can say so. All latents are real and the
# log posterior is concave, so there is one mode and a Gaussian is a fair approximation of it. The
# covariance of d = 31 latents costs d (d + 1) / 2 = 496 numbers, nothing at this size.
full_rank = AutoMultivariateNormal(model)

# Ignores the correlations, and pays twice. Each sd is close to the sd the coefficient would have if
# all the others were known, r_i = (Lambda_ii Sigma_ii)^(-1/2) of the true one. And since the
# likelihood is not Gaussian, the means depend on the covariance, so they move too (see
# optimum.py). For predictions it is nearly as good, in a fraction of the parameters.
mean_field = AutoNormal(model)

guide = full_rank
GUIDES = {"full-rank": full_rank, "mean-field": mean_field}
