"""What holds for every schedule and every size, tried on many: hypothesis looks for the one for which it does not."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sprint_core import trigflow
from sprint_core.images import sizes

ANGLES = st.floats(1e-6, trigflow.T_LARGEST_ACCEPTED)
FALLING = st.lists(ANGLES, min_size=1, max_size=12, unique_by=lambda t: round(min(t, trigflow.T_MAX), 4)).map(
    lambda angles: sorted(angles, reverse=True)
)
NAMED = st.one_of(
    st.tuples(st.just("paper"), st.integers(1, 4)), st.tuples(st.just("app"), st.integers(1, 40)),
    st.tuples(FALLING, st.just(2)), st.tuples(FALLING.map(lambda angles: ", ".join(map(repr, angles))), st.just(2)),
)  # fmt: skip


# --- schedules --------------------------------------------------------------------------------------


@given(NAMED, st.floats(0.01, 1))
def test_a_schedule_falls_to_zero(named, strength):
    """As angles within the quarter turn, and as flow times within 0 to 1; strength multiplies every angle."""
    whole, angles = trigflow.schedule(*named), trigflow.schedule(*named, strength)
    assert whole[0] <= trigflow.T_MAX and angles[-1] == 0.0
    assert angles == [t * strength for t in whole]
    for values in (angles, sigmas := trigflow.sigmas(*named, strength)):
        assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert sigmas[0] <= 1 and sigmas[-1] == 0
    assert sigmas == pytest.approx(
        [math.tan(t) / (1 + math.tan(t)) if t < 1.5 else trigflow.s_from_t(t) for t in angles]
    )


@given(FALLING)
def test_a_schedule_is_the_same_as_text_and_as_numbers(angles):
    for text in (
        ", ".join(map(repr, angles)),
        "  ".join(map(repr, [*angles, 0.0])),
        f" {','.join(map(repr, angles))},",
    ):
        assert trigflow.schedule(text) == trigflow.schedule(angles)


@given(
    st.lists(
        st.one_of(st.floats(), st.sampled_from([0.0, -0.0, math.nan, math.inf, 1.5708, 1.571, 1.5711])), max_size=5
    )
)
@example([])
@example([0.0])
@example([1.0, 1.0])
def test_any_other_schedule_is_refused(angles):
    """What is accepted falls strictly, from pi/2 at most to above 0, with or without a last 0; else ValueError."""
    before_zero = angles[:-1] if angles and angles[-1] == 0 else angles
    clamped = [min(t, trigflow.T_MAX) if t <= trigflow.T_LARGEST_ACCEPTED else math.nan for t in before_zero]
    valid = bool(clamped) and all(t > 0 for t in clamped) and all(a > b for a, b in itertools.pairwise(clamped))
    if valid:
        assert trigflow.schedule(angles) == [*clamped, 0.0]
    else:
        with pytest.raises(ValueError):
            trigflow.schedule(angles)


@given(st.text(max_size=20), st.integers(-5, 60), st.floats())
def test_a_schedule_of_any_name_is_right_or_refused(name, steps, strength):
    try:
        angles = trigflow.schedule(name, steps, strength)
    except ValueError as error:
        assert "\n" not in str(error) or "\n" in name
    else:
        assert angles[-1] == 0 and all(0 < t <= trigflow.T_MAX for t in angles[:-1])


@given(st.floats(0, trigflow.T_MAX))
def test_angle_and_flow_time_are_inverse(t):
    assert trigflow.t_from_s(trigflow.s_from_t(t)) == pytest.approx(t, abs=1e-12)
    tensor = torch.tensor([t], dtype=torch.float64)
    assert trigflow.t_from_s(trigflow.s_from_t(tensor)).item() == pytest.approx(t, abs=1e-12)


@given(st.floats(0, 1), st.floats(0.1, 20), st.floats(0.1, 20))
def test_shifts_multiply_and_undo(s, factor, other):
    assert 0 <= trigflow.shift(s, factor) <= 1 + 1e-12
    assert trigflow.shift(trigflow.shift(s, factor), other) == pytest.approx(
        trigflow.shift(s, factor * other), abs=1e-9
    )
    assert trigflow.shift(trigflow.shift(s, factor), 1 / factor) == pytest.approx(s, abs=1e-9)


# --- sizes ------------------------------------------------------------------------------------------

SIDE = st.integers(-10, 9000)


@given(SIDE, SIDE)
@example(64, 8192)
@example(63, 64)
@example(64, 8193)
def test_sizes_are_the_nearest_that_a_model_makes(width, height):
    if not all(64 <= side <= 8192 for side in (width, height)):
        with pytest.raises(ValueError, match=rf"size {width}x{height}"):
            sizes.round_size(width, height)
        return
    rounded = sizes.round_size(width, height)
    for side, other in zip((width, height), rounded, strict=True):
        assert other % 32 == 0 and 64 <= other <= 8192 and abs(other - side) <= 16
    assert sizes.round_size(*rounded) == rounded
    assert sizes.round_size(height, width) == rounded[::-1]


@given(st.sampled_from(sizes.BINS), st.sampled_from([512, 1024, 2048, 4096]))
def test_published_sizes_keep_their_shape(size, own_px):
    """Within half a cell on each side; the models' own sizes stay."""
    for side, published in zip(sizes.scaled(*size, own_px), size, strict=True):
        assert side % 32 == 0 and abs(side - published * own_px / 1024) <= 16
    assert sizes.scaled(*size, 1024) == size
