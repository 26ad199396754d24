"""Shopper on half a million purchases: prediction, slices, ablation, price moves.

    python -m benchmarks.baskets fit NAME --split random --seed 0   # one fit, kept in runs/baskets
    python -m benchmarks.baskets table                              # all that was kept
    python -m benchmarks.baskets ablation                           # on 200 products
    python -m benchmarks.baskets speed
    python -m benchmarks.baskets whole                              # all purchases in one fit

`fit` without a name fits every configuration. One thread; minutes per fit.
"""

import argparse
import itertools
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from recipes.shopper import (
    PAPER,
    TERMS,
    fast_model,
    fit_trips,
    load_trips,
    mean_field,
    plug_in,
    point,
)
from recipes.shopper import evaluate as ev
from recipes.shopper.guide import start

FOLDER = Path("runs/baskets")
# Gamma(2, 5) for the price terms: under the paper's Gamma(100, 1000) elasticities are 0.1, give or
# take a tenth of that, and these data do not move them.
# Embeddings have sd 0.5 instead of 1: the best of 1, 0.5 and 0.3 on the validation trips.
HALF = {"attributes": 0.5, "interaction": 0.5, "preference": 0.5}
LOOSE = {"price_prior": (2.0, 5.0), "size": 50, "prior_sd": HALF}
CONFIGURATIONS = {
    "VI, I": (mean_field, {"terms": PAPER[:1]}),
    "VI, I+U": (mean_field, {"terms": PAPER[:2]}),
    "VI, I+U+S": (mean_field, {"terms": PAPER[:3]}),
    "VI": (mean_field, {"terms": PAPER}),
    "point": (point, {"terms": PAPER}),
    "VI, rest": (mean_field, {"terms": PAPER, "rest": True, "checkout": False}),
    "point, rest": (point, {"terms": PAPER, "rest": True, "checkout": False}),
    "VI, no prices, rest": (mean_field, {"terms": PAPER[:3], "rest": True, "checkout": False}),
    "VI, habit": (mean_field, {"terms": TERMS}),
    "point, habit": (point, {"terms": TERMS}),
    "VI, habit, rest": (mean_field, {"terms": TERMS, "rest": True, "checkout": False}),
    "point, habit, rest": (point, {"terms": TERMS, "rest": True, "checkout": False}),
    "VI, paper's price prior": (mean_field, {"terms": PAPER, "price_prior": (100.0, 1000.0)}),
}
# Measured by other code on the same splits: nats per item, random and last six weeks.
KNOWN = {
    "hierarchical Poisson factorisation (hpfrec)": (-5.946, -6.050),
    "item embeddings": (-5.911, -5.977),
    "Shopper, another point estimate": (-5.340, -5.514),
    "log-linear blend": (-5.093, -5.312),
    "Shopper + habit, another point estimate": (-5.081, -5.286),
}


def path_of(name: str, split: str, seed: int) -> Path:
    words = f"{name} {split} {seed}".replace(",", "").replace("+", "").replace("'", "")
    return FOLDER / f"{'_'.join(words.split())}.npz"


def run(name: str, split: str, seed: int, steps: int, batch: int) -> None:
    train, validation, test = load_trips().split(split)
    guide, options = CONFIGURATIONS[name]
    pyro.enable_validation(False)  # of 270,000 latents at every step
    began, worked = time.time(), time.process_time()
    fit = fit_trips(train, guide, steps, batch, seed=seed, progress=False, **LOOSE | options)
    seconds, cpu = time.time() - began, time.process_time() - worked
    history = train.history()
    mean = plug_in(fit)
    kept = {
        "validation": ev.predictive_scores(mean, validation, history),
        "test": ev.predictive_scores(mean, test, history),
        "seconds": seconds,
        "cpu": cpu,
        "steps": steps,
        "elbo": fit.elbo[-200:].mean(),
    }
    if guide is mean_field and seed == 0:
        some = test.take(np.arange(0, len(test), 8))
        kept["plug-in, an eighth"] = ev.predictive_scores(mean, some, history).mean()
        kept["20 draws, an eighth"] = ev.predictive_scores(fit.sample(20), some, history).mean()
    if "prices" in options["terms"] and split == "last weeks" and seed == 0:
        u = {key: value[0] for key, value in mean.items()}
        changes = ev.share_changes(u, test, history, first_week=48)
        kept |= {f"moves, {key}": value for key, value in changes.items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    np.savez(path_of(name, split, seed), **kept)
    u = {f"u.{key}": value[0].numpy() for key, value in mean.items()}
    np.savez(path_of(name, split, seed).with_suffix(".latents.npz"), **u)
    value, error = ev.mean_and_error(kept["test"], test)
    print(f"{name}, {split}, seed {seed}: {value:.4f} +- {error:.4f}, {seconds:.0f} s", flush=True)


def ablation() -> None:
    """The paper's terms one after the other, thinking ahead, one-versus-each: 200 products."""
    train, _, test = load_trips(items=200).split()
    history = train.history()
    popular = (history.sum(0) + 0.5).log()
    scores = {"popularity": ev.score_of(lambda trip, item: popular.expand(len(trip), -1), test)}
    rows: list[tuple[str, dict, str]] = [
        ("I", {"terms": PAPER[:1]}, "popularity"),
        ("I+U", {"terms": PAPER[:2]}, "I"),
        ("I+U+S", {"terms": PAPER[:3]}, "I+U"),
        ("I+U+S+P", {"terms": PAPER}, "I+U+S"),
        ("I+U+S+P by one-versus-each, 50", {"terms": PAPER, "negatives": 50}, "I+U+S+P"),
        ("I+U+S+P, thinking ahead", {"terms": PAPER, "look_ahead": True}, "I+U+S+P"),
        ("I+U+S+P, habit", {"terms": TERMS}, "I+U+S+P"),
    ]
    print(f"{train}; 120 steps of 1,000 trips, embeddings of 20")
    for name, options, before in rows:
        began = time.process_time()
        options = {"size": 20, "price_prior": (2.0, 5.0)} | options
        fit = fit_trips(train, mean_field, steps=120, rate=0.05, progress=False, **options)
        seconds = time.process_time() - began
        look_ahead = options.get("look_ahead", False)
        scores[name] = ev.predictive_scores(plug_in(fit), test, history, look_ahead=look_ahead)
        value, error = ev.mean_and_error(scores[name], test)
        gain, gain_error = ev.mean_and_error(scores[name] - scores[before], test)
        print(
            f"{name:32} {value:.4f} +- {error:.4f}, over {before}: {gain:+.4f} +- "
            f"{gain_error:.4f}; {seconds:.0f} CPU s",
            flush=True,
        )
        if name == "I+U+S+P":
            one_versus_each(fit, train)


def one_versus_each(fit, train) -> None:
    """Bias and noise of the one-versus-each bound at a fit, per choice."""
    some = train.take(np.arange(500))
    u = {name: value[0] for name, value in plug_in(fit).items()}
    options = {key: value for key, value in fit.data.items() if key not in some.arguments()}
    arguments = some.arguments() | options | {"history": train.history(), "shuffle": False}
    choices = int((some.baskets >= 0).sum()) + len(some)

    def value(**more) -> float:
        trace = poutine.trace(poutine.condition(fast_model, data=u)).get_trace(**arguments | more)
        site: Any = trace.nodes["baskets"]
        with torch.no_grad():
            return float(site["fn"].log_prob(site["value"]).sum()) / choices

    exact, bound = value(), value(negatives=10_000)
    print(f"    log p per choice {exact:.3f}, one-versus-each bound {bound:.3f}", end="")
    for count in (10, 50, 100):
        draws = [value(negatives=count) for _ in range(50)]
        print(f"; {count} drawn: {np.mean(draws):.3f}, sd {np.std(draws):.3f}", end="")
    print(" (500 trips)", flush=True)


def speed(batch: int) -> None:
    """Seconds per step, compared with the bare matrix products in it; peak memory."""
    pyro.enable_validation(False)
    everything, _, _ = load_trips().split()
    types, _, _ = load_trips(items=None, of="types").split()
    quarter = everything.take(np.arange(0, len(everything), 4))
    given_the_rest = {"rest": True, "checkout": False}
    for label, train, options in (
        ("1,000 products, the paper's model", everything, {"terms": PAPER}),
        ("the same, each given the rest", everything, given_the_rest | {"terms": PAPER}),
        ("the same with habits", everything, given_the_rest),
        ("a quarter of the trips", quarter, given_the_rest),
        ("1,000 products in random order, with habits", everything, {}),
        ("2,221 product types, each given the rest", types, given_the_rest),
    ):
        data = train.arguments(**({"terms": TERMS} | LOOSE | options))
        pyro.clear_param_store()
        guide = AutoNormal(fast_model, init_loc_fn=start, init_scale=0.1)
        estimator, optimizer = vi.Reparam(analytic_kl=True), None
        rows = int((train.baskets >= 0).sum()) / len(train) * batch
        items, checkout = len(train.items), "rest" not in options
        pairs = [(torch.randn(int(rows) + checkout * batch, 50), torch.randn(items, 50))]
        pairs.append((torch.randn(batch, 60), torch.randn(items, 60)))  # tastes and seasons
        pairs.append((torch.randn(batch, 10), torch.randn(items, 10)))  # prices
        steps, bare = [], []
        # Five steps back to back, as in a fit, then the bare products of five steps.
        for some in torch.randperm(len(train))[: 15 * batch].split(5 * batch):
            for chosen in some.split(batch):
                cut = data | {name: data[name][chosen] for name in ("household", "week", "baskets")}
                began = time.perf_counter()
                estimator.loss_and_grads(fast_model, guide, **cut)
                if optimizer is None:
                    optimizer = torch.optim.Adam(
                        guide.parameters(), lr=0.02, betas=(0.9, 0.99), fused=True
                    )
                optimizer.step()
                optimizer.zero_grad()
                steps.append(time.perf_counter() - began)
            for _ in range(5):
                began = time.perf_counter()
                for x, y in pairs:
                    for part in x.split(256):  # forward, and the two products of the gradient
                        product = part @ y.T
                        product @ y
                        product.T @ part
                bare.append(time.perf_counter() - began)
        step, products = float(np.median(steps[3:])), float(np.median(bare[3:]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{label}: {len(train):,} trips, {step:.3f} s a step of {batch} trips, "
            f"{rows / step:,.0f} purchases/s, {step / products:.1f} times the bare products "
            f"({products:.3f} s); peak memory so far {peak:.2f} GiB",
            flush=True,
        )


def whole(steps: int, batch: int) -> None:
    """One fit to all purchases of the data, by product type: time and peak memory."""
    pyro.enable_validation(False)
    trips = load_trips(items=None, of="types")
    purchases = int((trips.baskets >= 0).sum())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began, worked = time.time(), time.process_time()
    options: dict[str, Any] = {"terms": TERMS, "rest": True, "checkout": False} | LOOSE
    fit = fit_trips(trips, mean_field, steps, batch, progress=False, **options)
    seconds, cpu = time.time() - began, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seen = steps * batch / len(trips) * purchases
    print(
        f"{trips}\n{steps} steps of {batch} trips, {seen / purchases:.1f} epochs: {seconds:.0f} s, "
        f"{cpu:.0f} CPU s, {seen / cpu:,.0f} purchases per CPU second; peak memory {peak:.2f} GiB "
        f"({before:.2f} GiB once the data were read); ELBO {fit.elbo[:20].mean():.4g} at first, "
        f"{fit.elbo[-20:].mean():.4g} at the end"
    )


def baselines(train, test) -> dict[str, np.ndarray]:
    history = train.history()
    count = history.sum(0)
    share = (count + 0.5) / (count + 0.5).sum()
    household = test.household

    def smoothed(strength):
        def utility(trip, item):
            return (history[household[trip]] + strength * share).log()

        return utility

    popular = share.log()
    return {
        "global popularity": ev.score_of(lambda t, i: popular.expand(len(t), -1), test),
        "household-smoothed popularity": ev.score_of(smoothed(200.0), test),
    }


def kept(name: str, split: str) -> dict[int, dict[str, np.ndarray]]:
    seeds = {}
    for seed in range(10):
        path = path_of(name, split, seed)
        if path.exists():
            with np.load(path) as file:
                seeds[seed] = {key: file[key] for key in file.files}
    return seeds


def slices(train, test) -> dict[str, list[tuple[str, np.ndarray]]]:
    trip, item = (x.numpy() for x in ev.each_item(test))
    history = train.history().numpy()
    bought, of_item = history.sum(1)[test.household.numpy()[trip]], history.sum(0)[item]
    move = np.abs(test.log_price.numpy()[test.week.numpy()[trip], item])
    out: dict[str, list[tuple[str, np.ndarray]]] = {}
    for title, amount in (("household's purchases", bought), ("item's purchases", of_item)):
        edges = [0, *np.quantile(amount, [0.1, 0.25, 0.5, 0.75]), np.inf]
        out[title] = [
            (f"{low:.0f} to {high:.0f}", (amount >= low) & (amount < high))
            for low, high in itertools.pairwise(edges)
        ]
    out["price off its mean by"] = [
        (f"at least {least:.1%}", move >= np.log1p(least)) for least in (0, 0.025, 0.05, 0.15, 0.3)
    ]
    return out


def table() -> None:
    trips = load_trips()
    for column, split in enumerate(("random", "last weeks")):
        train, _, test = trips.split(split)
        print(f"\n== {split}: {int((test.baskets >= 0).sum()):,} purchases of {len(test):,} trips")
        print(f"{'nats per item':46} {'score':>8} {'se':>6}  seeds, minutes of one thread")
        scores = {}
        for name, score in baselines(train, test).items():
            value, error = ev.mean_and_error(score, test)
            print(f"{name:46} {value:8.4f} {error:6.4f}")
        for name, values in KNOWN.items():
            print(f"{name:46} {values[column]:8.3f}         (as measured before)")
        for name in CONFIGURATIONS:
            found = kept(name, split)
            if not found:
                continue
            scores[name] = np.mean([one["test"] for one in found.values()], axis=0)
            value, error = ev.mean_and_error(scores[name], test)
            each = ", ".join(f"{one['test'].mean():.4f}" for one in found.values())
            minutes = np.mean([one["cpu"] for one in found.values()]) / 60
            print(f"{'Shopper ' + name:46} {value:8.4f} {error:6.4f}  {each}; {minutes:.1f}")
            one = found[min(found)]
            if "20 draws, an eighth" in one:
                change = float(one["20 draws, an eighth"] - one["plug-in, an eighth"])
                print(f"{'    20 draws averaged, instead of the mean':46} {change:+8.4f}")
        for better, worse in (
            ("VI", "point"),
            ("VI, rest", "point, rest"),
            ("VI, rest", "VI, no prices, rest"),
            ("VI, habit, rest", "point, habit, rest"),
        ):
            if better not in scores or worse not in scores:
                continue
            gain = scores[better] - scores[worse]
            value, error = ev.mean_and_error(gain, test)
            print(f"\n{better} over {worse}: {value:+.4f} +- {error:.4f}")
            for title, parts in slices(train, test).items():
                print(f"  by {title}")
                for label, rows in parts:
                    if rows.sum() < 100:
                        continue
                    value, error = ev.mean_and_error(gain, test, rows)
                    print(f"    {label:22} {rows.sum():7,} {value:+.4f} +- {error:.4f}")
    print("\n== price moves of at least 15 %, weeks 49 to 53 (fits to the weeks before 48)")
    for name in CONFIGURATIONS:
        found = kept(name, "last weeks").get(0, {})
        if "moves, move" not in found:
            continue
        observed, predicted = found["moves, observed"], found["moves, predicted"]
        print(name)
        for least in (1, 20, 50):
            rows = found["moves, purchases"] >= least
            right = (np.sign(observed) == np.sign(predicted))[rows].mean()
            slope = (observed * predicted)[rows].sum() / (predicted**2)[rows].sum()
            explained = 1 - ((observed - predicted)[rows] ** 2).sum() / (observed[rows] ** 2).sum()
            print(
                f"  at least {least:2d} purchases: {rows.sum():5,} moves, right way {right:.1%}, "
                f"observed on predicted {slope:.2f}, squared error less by {explained:.1%} than "
                "without prices (no change)"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fit", "table", "ablation", "speed", "whole"])
    parser.add_argument("name", nargs="?")
    parser.add_argument("--split", default="random", choices=["random", "last weeks"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.what == "table":
        table()
    elif asked.what == "ablation":
        ablation()
    elif asked.what == "speed":
        speed(asked.batch)
    elif asked.what == "whole":
        whole(asked.steps, asked.batch)
    else:
        for one in [asked.name] if asked.name else CONFIGURATIONS:
            run(one, asked.split, asked.seed, asked.steps, asked.batch)
