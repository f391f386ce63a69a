"""Methods of distillation: an aligned row for each, of what teaches the student and what it goes with.

A student learns by the sum of up to three losses, each with a weight of `Objective`: `scm_weight`, sCM along the
teacher's trajectories (losses/scm.py); `score_weight`, the difference between the teacher's score and that of a fake
network, which learns how the student's samples are distributed (losses/score.py); `ladd_weight`, the critic
(losses/ladd.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHTS = ("scm_weight", "score_weight", "ladd_weight")
SCORE_ALONE = {"scm_weight": 0.0, "score_weight": 1.0, "ladd_weight": 0.0}
# A gradient of the critic a few times as long as that of the score, as in DMD2's and NVlabs/FastGen's configurations.
SCORE_AND_CRITIC = SCORE_ALONE | {"ladd_weight": 0.5, "ladd_from": 0}
# rCM's ratio, 100 sCM to 1 DMD, is one of sums over 2 million elements: 29 times as much for the lengths of ours.
BOTH = {"form": "cosine", "scm_weight": 0.2, "score_weight": 5.8, "ladd_weight": 0.0}


@dataclass(frozen=True)
class Method:
    """A row of METHODS."""

    paper: str  # arXiv
    needs: tuple[str, ...]  # of WEIGHTS, those above 0
    may: tuple[str, ...] = ()  # and those that may be
    score: str = ""  # which loss of the score: a row of losses/score.py
    times: str = ""  # where scores are compared, and the fake network learns: a row there
    fakes: int = 0  # updates of the fake network for each of the student's
    fake_rate: float = 1.0  # its learning rate over the student's
    fake_guided: bool = False  # whether it learns, and is asked, under classifier-free guidance
    warms_up: bool = False  # whether sCM is alone while its tangent warms up
    sets: Mapping[str, Any] = field(default_factory=dict)  # of an Objective, where it is chosen

    def takes(self, weights: Mapping[str, float]) -> bool:
        """Whether it goes with these weights, of WEIGHTS."""
        above = {name for name, weight in weights.items() if weight}
        return set(self.needs) <= above <= {*self.needs, *self.may}


# fmt: off
SCM, SCORE, LADD = ((name,) for name in WEIGHTS)
METHODS = {
    #               paper         needs         may         score  times     fakes rate
    "scm":  Method("2503.09641", (),           SCM + LADD),
    "dmd":  Method("2311.18828", SCORE,        (),         "dmd", "shifted", 5,   1.0, sets=SCORE_ALONE),
    "dmd2": Method("2405.14867", SCORE + LADD, (),         "dmd", "shifted", 5,   1.0, sets=SCORE_AND_CRITIC),
    "sid":  Method("2509.25127", SCORE,        LADD,       "sid", "normal",  1,   1.0, True, sets=SCORE_ALONE),
    "rcm":  Method("2510.08431", SCM + SCORE,  LADD,       "dmd", "shifted", 4,   0.2, warms_up=True, sets=BOTH),
    "emd":  Method("2405.16852", SCORE,        LADD,       "emd", "shifted", 1,   5.0, sets=SCORE_ALONE),
}
# fmt: on


def listed() -> str:
    """For people: every method and its weights, in brackets those that it can do without."""
    return ", ".join(f"{name} ({_weights(row)})" for name, row in METHODS.items())


def _weights(row: Method) -> str:
    return ", ".join([*row.needs, *(f"[{name}]" for name in row.may)])
