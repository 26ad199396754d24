"""How far a stochastic check may be off: the one number that sets the suite's false-alarm rate."""

Z = 4.5
"""Standard errors that an estimate may lie from the truth before its check fails.

A Normal estimate is further out with probability 2 Phi(-4.5) = 6.8e-6. Seeds are fixed, so a check
that passed once passes again; the rate is for the day when a version of torch or an edit reshuffles
the random numbers. A suite of 1,000 such comparisons then fails by chance once in 150 reshuffles,
and an error of 6.5 standard errors is still caught 98 times in 100. For two estimates use
``Z * sqrt(se_a**2 + se_b**2)``.
"""
