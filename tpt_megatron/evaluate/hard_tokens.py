"""What token losses say: means by part, source and difficulty, and which tokens one model has learned that are hard for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.datasets import PART_NAMES
from tpt_megatron.evaluate.token_losses import Documents

GROUPS = 10
LISTED = 20

Losses = Mapping[str, npt.NDArray[np.float32]]
Chosen = npt.NDArray[np.bool_]


def difficulty(reference: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the group [n] of each token, 0 (easiest) to 9: as many tokens in each, up to one. Of equal losses the first token counts as the easier."""
    group = np.empty(len(reference), np.int64)
    group[np.argsort(reference, kind="stable")] = np.arange(len(reference)) * GROUPS // max(1, len(reference))
    return group


def summarise(documents: Documents, losses: Losses, reference: str, learned_below: float) -> dict[str, Any]:
    """Return losses.json: for each model the mean loss, in nats, of all tokens, of each part, source and group of difficulty; and what was learned.

    Groups are of the documents' own tokens and the thoughts' alike. `learned`: of the tokens that the reference has not learned, the share that a model has;
    `forgotten`: of those that it has, the share that the model has not. `tokens`: the ids whose losses a model lowers most in sum, in those documents.
    """
    group = difficulty(losses[reference])
    everything = np.ones(len(group), bool)
    named = {
        "all": {"all": everything},
        "part": {PART_NAMES[part]: documents.part == part for part in np.unique(documents.part).tolist()},
        "source": {name or "(none)": documents.source == number for number, name in enumerate(documents.sources)},
        "difficulty": {str(number + 1): group == number for number in range(GROUPS)},
    }
    hard = losses[reference] >= learned_below
    return {
        "format": 1,
        "tokens": len(group),
        "documents": len(documents.whole),
        "documents_cut": documents.cut,
        "reference": reference,
        "learned_below": learned_below,
        "means": {kind: _means(places, losses) for kind, places in named.items()},
        "learned": {
            kind: {
                name: {
                    model: {"learned": _share(of < learned_below, place & hard), "forgotten": _share(of >= learned_below, place & ~hard)}
                    for model, of in others(losses, reference)
                }
                for name, place in places.items()
            }
            for kind, places in named.items()
            if kind != "difficulty"
        },
        "lowered": {model: _lowered(documents, losses[reference], of) for model, of in others(losses, reference)},
    }


def others(losses: Losses, reference: str) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Return the models that are held against the reference."""
    return [(name, of) for name, of in losses.items() if name != reference]


def _means(places: Mapping[str, Chosen], losses: Losses) -> dict[str, Any]:
    return {
        name: {"tokens": int(place.sum()), **{model: float(of[place].mean(dtype=np.float64)) for model, of in losses.items()}}
        for name, place in places.items()
        if place.any()
    }


def _share(what: Chosen, among: Chosen) -> float | None:
    return float(what[among].mean()) if among.any() else None


def _lowered(documents: Documents, reference: npt.NDArray[np.float32], losses: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return the ids by what a model's loss of them is lower than the reference's, in sum; those that it lowers only."""
    ids, which = np.unique(documents.token, return_inverse=True)
    count = np.bincount(which)
    gains = np.bincount(which, weights=reference.astype(np.float64) - losses)
    first = np.argsort(-gains, kind="stable")[:LISTED]
    return [{"id": int(ids[i]), "tokens": int(count[i]), "nats": float(gains[i]), "nats_each": float(gains[i] / count[i])} for i in first if gains[i] > 0]
