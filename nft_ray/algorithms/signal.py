"""Is there anything to learn from an epoch's rewards? NumPy, on the driver."""

import numpy as np


def constant_in_groups(rewards: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """Which groups' rewards are all equal, bool (groups,), in the order of their ids.

    rewards (N,), NaN = missing; group_ids (N,). Groups without any reward are left out. Equal means to the last bit: a
    standard deviation, which is a sum of roundings, would call hardly any group constant.
    """
    present = ~np.isnan(rewards)
    members = [rewards[present & (group_ids == group)] for group in np.unique(group_ids[present])]
    return np.array([values.min() == values.max() for values in members], dtype=bool)
