"""Prompts as version 0.1.0 wrote them: all inputs of a choice beside it, whatever the choice."""

import io

import numpy as np
import pytest
from api_prompts import graph
from PIL import Image


def image(server, prompt: dict) -> np.ndarray:
    """[h, w, 3], 0 to 255: what a prompt saves."""
    (saved,) = server.images(server.run(prompt, timeout=120))
    return np.asarray(Image.open(io.BytesIO(server.view(saved))).convert("RGB"))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("node", "older", "today"),
    [
        (
            "sampler",
            {"schedule": "custom", "angles": "1.5, 0.4"},
            {"schedule": "custom", "schedule.angles": "1.5, 0.4"},
        ),
        ("sampler", {"schedule": "paper", "angles": "0.1", "steps": 2}, {"schedule": "paper", "steps": 2}),
    ],
    ids=["angles", "unread"],
)
def test_older_prompts_give_the_same_image(server, node, older, today):
    first = image(server, graph(**{node: older}))
    assert np.array_equal(first, image(server, graph(**{node: today})))
    other = image(server, graph(sampler={"seed": 1}))
    assert other.shape != first.shape or not np.array_equal(first, other)
