"""Utilities and log probabilities of many choices at once, with the gradient written out.

The formulas are those of `recipes.shopper.model`; the arrangement is for catalogues of thousands of
items, where a minibatch has millions of utilities. A matrix of that size spends its time on the way
to memory and back, so a large set of choices is computed in blocks that stay in the processor's
cache, and each block's gradient with it, before the next block overwrites it.
"""

import torch
from torch.nn.functional import pad

from .model import ALL_SITES

MOST_UTILITIES = 2**21  # at once; more are computed in blocks of half as many, which stay in cache
RARE = 1e-30  # below this probability, take the log from the utilities: the softmax may underflow
IN_UTILITIES = tuple(name for name in ALL_SITES if name != "habit_mean")


def baseline(u, household, week, log_price, history, own=None):
    """psi: (trips, items [and checkout]), the utilities before anything is in the basket.

    u: one value of every latent. own: (trip, item) numbers of purchases that `history` counts and
    this function should not. Checkout has no price and no habit.
    """
    psi = u["intercept"].expand(len(household), -1)
    left, right = [], []
    if "preference" in u:
        left.append(u["preference"].index_select(0, household))
        right.append(u["attributes"])
    if "season" in u:
        left.append(u["season"].index_select(0, week))
        right.append(u["season_effect"])
    if left:
        psi = torch.addmm(psi, torch.cat(left, -1), torch.cat(right, -1).T)
    catalogue = log_price.shape[1]
    rest = 0.0
    if "price_sensitivity" in u:
        sensitivity = u["price_sensitivity"].index_select(0, household)
        rest = rest - (sensitivity @ u["price_effect"][:catalogue].T) * log_price[week]
    if "habit" in u:
        loyalty = u["loyalty"].index_select(0, household)
        past = past_purchases(history, household, own)
        rest = rest + (u["habit"][:catalogue] + loyalty[:, None]) * torch.log1p(
            u["habit_rate"][:catalogue] * past
        )
    if torch.is_tensor(rest):
        psi = psi + pad(rest, (0, psi.shape[1] - catalogue))
    return psi


def past_purchases(history, household, own, out=None):
    """How often each of the households bought each item, without the purchases `own`."""
    past = torch.index_select(history, 0, household, out=out)
    if own is not None:
        past[own] = (past[own] - 1).clamp_(min=0)
    return past


def best_next(now, attributes, interaction, places, rows_at_once=8):
    """Utility of the best item that could follow each item: (rows, items).

    now: (rows, items), psi_c' + interaction_c' . sum of the basket / (places + 1) for each next
    item c', and -inf where c' cannot come. places: (rows,), how many items are in the basket. Item
    c before c' adds interaction_c' . attributes_c / (places + 1), and no item follows itself. The
    search over all pairs of items runs without gradients, a few rows at a time; only the utility of
    the winner has a gradient.
    """
    pairs = attributes @ interaction.T  # (item, the one after it)
    after = torch.empty(now.shape, dtype=torch.long)
    with torch.no_grad():
        barred = pairs.clone()
        barred.fill_diagonal_(-torch.inf)
        for rows in torch.arange(len(now)).split(rows_at_once):
            table = torch.addcdiv(now[rows, None], barred, (places[rows] + 1.0)[:, None, None])
            after[rows] = table.argmax(-1)
    item = torch.arange(now.shape[1])
    return now.gather(1, after) + pairs[item, after] / (places + 1.0)[:, None]


def choice_log_prob(u, mean, trips, own, choices):
    """log softmax of psi + mean interaction' at each choice's item: (choices,).

    u: one value of every latent. mean: (choices, size), the mean attributes of what each choice's
    basket holds, or None. trips: household, week, log_price and history, see `baseline`. own:
    (trip, item) numbers of purchases that `history` counts and this function should not, the trips
    ascending. choices: the trip of each choice, ascending, and its item; then the pairs (choice,
    item) that are barred, the choices ascending.

    More than MOST_UTILITIES utilities are never in memory at once: they are computed some trips at
    a time, together with their gradient.
    """
    trip, target, out_row, out_item = choices
    if len(trip) * len(u["intercept"]) > MOST_UTILITIES:
        values = {name: u[name] for name in IN_UTILITIES if name in u}
        values |= {} if mean is None else {"mean": mean}
        return _InBlocks.apply((*trips, own, *choices), tuple(values), *values.values())
    utility = baseline(u, *trips, own)[trip]
    if mean is not None:
        utility = torch.addmm(utility, mean, u["interaction"].T)
    utility = utility.index_put((out_row, out_item), utility.new_tensor(-torch.inf))
    return utility.log_softmax(-1).gather(1, target[:, None])[:, 0]


class _InBlocks(torch.autograd.Function):
    """`choice_log_prob`, in blocks. The forward pass also computes the gradient of the values' sum.

    If the choices turn out to have unequal weights, the backward pass goes through the blocks
    again.
    """

    @staticmethod
    def forward(ctx, data, names, *values):
        chosen, ctx.gradients = _values_and_gradient(data, dict(zip(names, values, strict=True)))
        ctx.save_for_backward(*values)
        ctx.data, ctx.names = data, names
        return chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None  # overwritten below, so good only once
        if gradients is not None and (grad == grad[0]).all():
            factor = -float(grad[0])  # often 1
            return None, None, *(g if factor == 1.0 else g.mul_(factor) for g in gradients.values())
        u = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        return None, None, *_values_and_gradient(ctx.data, u, -grad)[1].values()


def _values_and_gradient(data, u, weight=None):
    """The log probability of each choice, and the gradient of minus their weighted sum.

    data: the arguments of `choice_log_prob` but for the latents. u: the latents, and the mean
    attributes as "mean". weight: (choices,), or None for ones. Returns (choices,) and {name:
    gradient} with the names of u. A name with `grad_` before it is the gradient in that variable.
    """
    household, week, log_price, history, own, trip, target, out_row, out_item = data
    items, catalogue = len(u["intercept"]), log_price.shape[1]
    gradient = {name: torch.zeros_like(value) for name, value in u.items()}
    new = u["intercept"].new_empty
    chosen = new(len(target))
    log_price, history = log_price.to(chosen), history.to(chosen)

    # The terms that are products of a row of the trip's and a row of the item's, side by side.
    pairs = [("preference", household, "attributes"), ("season", week, "season_effect")]
    pairs = [pair for pair in pairs if pair[0] in u]
    right = torch.cat([u[name] for _, _, name in pairs], 1) if pairs else None
    grad_right = None if right is None else torch.zeros_like(right)
    effect, habit, rate = (
        u[name][:catalogue] if name in u else None
        for name in ("price_effect", "habit", "habit_rate")
    )

    # A block is some trips with all of their choices. Where it begins and ends in each list:
    at_once = max(1, MOST_UTILITIES // (2 * items) * len(household) // len(trip))  # trips
    edges = torch.arange(0, len(household) + at_once, at_once, device=trip.device)
    rows = torch.searchsorted(trip, edges)
    barred = torch.searchsorted(out_row, rows).tolist()
    out_place = out_row * items + out_item
    bought = None if own is None else torch.searchsorted(own[0].contiguous(), edges).tolist()
    longest = int(rows.diff().max())
    rows, edges = rows.tolist(), edges.tolist()
    # Fresh memory is slow, so all blocks write into the same buffers.
    utility_buffer, share_buffer = new(2, longest, items)
    psi_buffer, grad_psi_buffer = new(2, at_once, items)
    price_buffer, past_buffer, scaled_buffer, log_buffer, strength_buffer = new(
        5, at_once, catalogue
    )
    for k in range(len(edges) - 1):
        here, these = slice(edges[k], edges[k + 1]), slice(rows[k], rows[k + 1])
        who, when = household[here], week[here]
        n = len(who)

        # psi, as in `baseline`.
        psi = psi_buffer[:n].copy_(u["intercept"])
        if pairs:
            left = [u[name].index_select(0, index[here]) for name, index, _ in pairs]
            left = torch.cat(left, 1)
            psi.addmm_(left, right.T)
        if effect is not None:
            sensitivity = u["price_sensitivity"].index_select(0, who)
            price = torch.index_select(log_price, 0, when, out=price_buffer[:n])
            slope = torch.mm(sensitivity, effect.T, out=log_buffer[:n])
            psi[:, :catalogue].addcmul_(slope, price, value=-1)
        if habit is not None:
            mine = None
            if own is not None:
                mine = slice(bought[k], bought[k + 1])
                mine = own[0][mine] - here.start, own[1][mine]
            past = past_purchases(history, who, mine, out=past_buffer[:n])
            scaled = torch.mul(past, rate, out=scaled_buffer[:n])
            log_past = torch.log1p(scaled, out=log_buffer[:n])
            loyalty = u["loyalty"].index_select(0, who)[:, None]
            strength = torch.add(habit, loyalty, out=strength_buffer[:n])
            psi[:, :catalogue].addcmul_(log_past, strength)

        # The utility of each choice, its softmax, and the log probability of the chosen item.
        local, picked = trip[these] - here.start, target[these, None]
        utility = torch.index_select(psi, 0, local, out=utility_buffer[: len(local)])
        if "mean" in u:
            utility.addmm_(u["mean"][these], u["interaction"].T)
        out = out_place[barred[k] : barred[k + 1]] - these.start * items
        utility.view(-1).index_fill_(0, out, -torch.inf)
        share = torch.softmax(utility, 1, out=share_buffer[: len(local)])
        probability = share.gather(1, picked)
        torch.log(probability[:, 0], out=chosen[these])
        rare = probability[:, 0] < RARE
        if rare.any():
            few = utility[rare]
            chosen[these][rare] = few.gather(1, picked[rare])[:, 0] - few.logsumexp(1)

        # Minus the log probability has the gradient softmax minus choice in the utilities.
        grad_utility = share.scatter_(1, picked, probability - 1)
        if weight is not None:
            grad_utility.mul_(weight[these, None])
        grad_psi = grad_psi_buffer[:n].zero_().index_add_(0, local, grad_utility)
        if "mean" in u:
            torch.mm(grad_utility, u["interaction"], out=gradient["mean"][these])
            gradient["interaction"].addmm_(grad_utility.T, u["mean"][these])
        gradient["intercept"] += grad_psi.sum(0)
        if pairs:
            grad_right.addmm_(grad_psi.T, left)
            grad_left = (grad_psi @ right).split([u[name].shape[1] for name, _, _ in pairs], 1)
            for (name, index, _), part in zip(pairs, grad_left, strict=True):
                gradient[name].index_add_(0, index[here], part)
        grad_psi = grad_psi[:, :catalogue]
        if effect is not None:
            price.mul_(grad_psi)
            gradient["price_sensitivity"].index_add_(0, who, price @ effect, alpha=-1)
            gradient["price_effect"][:catalogue].addmm_(price.T, sensitivity, alpha=-1)
        if habit is not None:
            log_past.mul_(grad_psi)
            gradient["habit"][:catalogue] += log_past.sum(0)
            gradient["loyalty"].index_add_(0, who, log_past.sum(1))
            grad_rate = past.mul_(grad_psi).mul_(strength).div_(scaled.add_(1)).sum(0)
            gradient["habit_rate"][:catalogue] += grad_rate
    if pairs:
        widths = [u[name].shape[1] for _, _, name in pairs]
        for (_, _, name), part in zip(pairs, grad_right.split(widths, 1), strict=True):
            gradient[name] += part
    return chosen, gradient
