"""The price of options, from a million simulated histories of a share: three prices for which there are formulas, and one for which not.

    python examples/option_pricing.py            # 1,000,000 histories of 252 trading days
    python examples/option_pricing.py --small    # 50,000

The share follows a geometric Brownian motion, day by day; the state is the logarithm of its price, the sum of these logarithms, and the sum
of prices, so that no history is kept. A call and a put at the last day: Black and Scholes (1973). A call on the geometric mean of
all days' prices: Kemna and Vorst (1990). That on the arithmetic mean, which is what is traded, has no formula; it is so much like the
geometric one that their difference is simulated, with a twentieth of the error (Boyle, 1977: a control variate).
"""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist

import numpy as np

import shmarray as sa

PICTURE = Path(__file__).parent / "output" / "option_pricing.png"
HISTORIES = 50_000 if "--small" in sys.argv else 1_000_000
PRICE, STRIKE, RATE, VOLATILITY, DAYS = 100.0, 105.0, 0.03, 0.2, 252  # today, agreed; of a year; of a year; a year
today = math.exp(-RATE)  # what 1 in a year is worth today
drift, scale = (RATE - VOLATILITY**2 / 2) / DAYS, VOLATILITY / math.sqrt(DAYS)
rng = sa.random.default_rng(8)


def day(log_price, logs, prices):
    log_price = log_price + drift + scale * rng.standard_normal(log_price.shape)
    return log_price, logs + log_price, prices + sa.exp(log_price)


days, paths = [0], [np.full(25, math.log(PRICE))]


def keep(frame):
    days.append(frame.step)
    paths.append(frame.values["some"])


start = (sa.full(HISTORIES, math.log(PRICE)), sa.zeros(HISTORIES), sa.zeros(HISTORIES))
some = {"some": lambda log_price, logs, prices: log_price[:25]}
log_price, logs, prices = sa.iterate(day, *start, steps=DAYS, every=4, observe=some, callback=keep)

payoffs = {
    "call": sa.maximum(sa.exp(log_price) - STRIKE, 0),
    "put": sa.maximum(STRIKE - sa.exp(log_price), 0),
    "geometric mean": sa.maximum(sa.exp(logs / DAYS) - STRIKE, 0),
    "arithmetic mean": sa.maximum(prices / DAYS - STRIKE, 0),
}
payoffs["their difference"] = payoffs["arithmetic mean"] - payoffs["geometric mean"]
results = sa.compute(*([today * p.mean(), today * p.std() / math.sqrt(HISTORIES)] for p in payoffs.values()))


def lognormal_call(mean, deviation, strike):
    """Return today's worth of max(exp(z) - strike, 0) in a year, for a normal z."""
    d = (mean - math.log(strike)) / deviation
    cdf = NormalDist().cdf
    return today * (math.exp(mean + deviation**2 / 2) * cdf(d + deviation) - strike * cdf(d))


call = lognormal_call(math.log(PRICE) + RATE - VOLATILITY**2 / 2, VOLATILITY, STRIKE)
mean = math.log(PRICE) + drift * (DAYS + 1) / 2
deviation = scale * math.sqrt((DAYS + 1) * (2 * DAYS + 1) / (6 * DAYS))
formulas = {"call": call, "put": call - PRICE + today * STRIKE, "geometric mean": lognormal_call(mean, deviation, STRIKE)}
for name, (price, error) in zip(payoffs, results, strict=True):
    print(f"{name:18}{price:9.4f} +- {error:.4f}", end="")
    if name in formulas:
        print(f"   formula: {formulas[name]:.4f}", end="")
        assert abs(price - formulas[name]) < 4 * error
    print()
(direct, error), (difference, small_error) = results[-2:]
better = formulas["geometric mean"] + difference
print(f"arithmetic mean, as geometric mean by formula + difference: {better:.4f} +- {small_error:.4f}")
assert abs(direct - better) < 4 * error

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    counts, edges = sa.compute(*sa.histogram(sa.exp(log_price), bins=120, range=(40, 220)))
    middle = (edges[1:] + edges[:-1]) / 2
    d = (np.log(middle / PRICE) - drift * DAYS) / VOLATILITY
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    left.plot(days, np.exp(paths), linewidth=0.7)
    left.axhline(STRIKE, color="black", linestyle="--", linewidth=1)
    left.set(title=f"{len(paths[0])} of {HISTORIES:,} histories", xlabel="day", ylabel="price of the share", ylim=(40, 220))
    right.barh(middle, counts / HISTORIES / (edges[1] - edges[0]), height=edges[1] - edges[0], color="tab:cyan", label="simulated")
    density = np.exp(-d * d / 2) / (middle * VOLATILITY * math.sqrt(2 * np.pi))
    right.plot(density, middle, color="black", linewidth=1, label="lognormal density")
    right.set(title="the last day")
    right.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"picture: {PICTURE}")
