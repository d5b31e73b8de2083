"""The condition number that a random matrix of a given shape has."""

import math

from kappatune_plugin.errors import KappaTuneError

# medians of the Tracy-Widom law (real case) and of sqrt(n) * sigma_min of an n x n Gaussian matrix (Edelman 1988)
TRACY_WIDOM_MEDIAN = -1.2686
EDELMAN_MEDIAN = math.sqrt(1 + 2 * math.log(2)) - 1


def null_condition(m: int, n: int) -> float:
    """The median condition number of an (m, n) matrix of independent Gaussian values, m, n >= 1.

    kappa mostly follows the shape; kappa / null_condition(m, n) is what training changed. For rectangular shapes it
    approaches the edges of the Marchenko-Pastur law, (1 + sqrt(b)) / (1 - sqrt(b)) with b = min / max, for square ones
    3.67 n (Edelman, SIAM J. Matrix Anal. Appl. 9, 1988). In between and for small shapes, the edges move inwards by the
    median of the Tracy-Widom law: Johnstone, Ann. Statist. 29, 2001 (sigma_max); Feldheim and Sodin, Geom. Funct.
    Anal. 20, 2010 (sigma_min). The last term joins this to Edelman's law; its factor of m - n is fitted to
    simulations. Within 15% from 8 x 8 to 4096 x 4096, as the tests check.

    Raises:
        KappaTuneError: m or n below 1.
    """
    if min(m, n) < 1:
        raise KappaTuneError(f"null_condition: {m} x {n} is not a matrix shape: both sides must be at least 1.")
    short, long = math.sqrt(min(m, n)), math.sqrt(max(m, n))
    if short == 1:
        return 1.0
    shift, gap = -TRACY_WIDOM_MEDIAN, long - short
    largest = (long + short) ** 2 - shift * (long + short) * (1 / short + 1 / long) ** (1 / 3)
    smallest = gap**2 + shift * gap * (1 / short - 1 / long) ** (1 / 3)
    smallest += (EDELMAN_MEDIAN**2 + 0.21 * abs(m - n)) / min(m, n)
    return math.sqrt(largest / smallest)
