"""What reports of a run need: packages that are there, ranks and steps that there are."""

from __future__ import annotations

from importlib.util import find_spec

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import Rule


def _bad_profile_steps(facts: Facts) -> bool:
    steps, last = facts.run.track.profile_steps, facts.run.schedule.steps
    return steps is not None and not 1 <= steps[0] <= steps[1] <= (last or steps[1])


RULES = (
    Rule(
        "tensorboard", "track.also",
        lambda f: "tensorboard" in f.run.track.also and f.cluster.here and find_spec("tensorboard") is None,
        "the package tensorboard isn't installed", "pip install tensorboard, or leave it out",
    ),
    Rule(
        "profile-steps", "track.profile_steps", _bad_profile_steps,
        "steps i to j are counted from 1 and lie within the run",
        "write [5,7], or two other steps of the run (in a shell in quotes)",
    ),
    Rule(
        "profile-ranks", "track.profile_ranks",
        lambda f: f.run.track.profile_steps is not None
        and not all(0 <= rank < f.cluster.ranks for rank in f.run.track.profile_ranks),
        lambda f: f"there are ranks 0 to {f.cluster.ranks - 1}", "name ranks that there are",
    ),
)  # fmt: skip
