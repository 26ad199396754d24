"""temporary"""

from vi_toolkit.compiled.accelerator import LONG_RUN
from vi_toolkit.compiled.batched import BatchedFits

MOST_TOGETHER = 2**20


def batched_fits(fits, isolated, most_steps):
    return BatchedFits(fits, isolated)


def batching_pays(mode, steps, restarts, leaves):
    if restarts * sum(p.numel() for p in leaves) > MOST_TOGETHER:
        return False
    long = steps is None or steps * restarts >= LONG_RUN
    tried = all(p.device.type == "cpu" for p in leaves)
    return mode is True or (mode == "auto" and long and tried)


def compile_joint(joint, insist):
    joint.compile(insist)
