"""CAME against its authors' package, over shapes, clipping, decay and resuming."""

import io

import came_pytorch
import pytest
import torch
from oracles import randn, relative_error

from sprint_core.distill.engine.came import CAME

LR = 1.0  # so large that what is compared, the change, is no small difference of large numbers
# Of each tensor: its shape, and the shape in which came-pytorch does what SANA's own optimiser does with it.
SHAPES = {
    "scalar": ((), (1,)),
    "bias": ((7,), (7,)),
    "linear": ((6, 5), (6, 5)),
    "row": ((1, 9), (1, 9)),
    "conv1x1": ((6, 5, 1, 1), (6, 5)),
    "conv3x3": ((4, 3, 3, 3), (108,)),
    "depthwise": ((6, 1, 3, 3), (54,)),
    "conv1d": ((4, 3, 1), (12,)),
}


def start(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(randn(*shape, dtype=dtype)) for name, (shape, _) in SHAPES.items()}


def give_gradients(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    """They share a direction, so that confidence differs, and swing in size, so that some steps are clipped."""
    for name, p in parameters.items():
        shape = SHAPES[name][0]
        noise = randn(*shape, seed=10 + step) + 2 * randn(*shape, seed=2)
        p.grad = (noise * 10.0 ** (step % 3)).to(p.dtype).view(p.shape)


def test_first_step_is_the_closed_form():
    """Equal gradients: u^ = 1, m = 0.1 and, for matrices, S = 1e-4 * 0.9^2."""
    matrix, vector = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))
    matrix.grad, vector.grad = torch.full((3, 4), -7.0), torch.full((5,), 1e-6)
    CAME([matrix, vector], lr=1.0).step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 4), 0.1 / 0.009))
    torch.testing.assert_close(vector.detach(), torch.full((5,), -0.1))


def test_epsilons_in_closed_form():
    """1e-30 beside a squared gradient of the same size; 1e-16 alone, where the update is its own running mean."""
    vector, matrix = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(3, 4))
    vector.grad, matrix.grad = torch.full((5,), 1e-15), torch.full((3, 4), 1.0)
    CAME([vector], lr=1.0, clip_threshold=100.0).step()
    torch.testing.assert_close(vector.detach(), torch.full((5,), -0.1 / (2 * 1e-3) ** 0.5))
    CAME([matrix], lr=1.0, betas=(0.0, 0.999, 0.9999)).step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 4), -1 / (1e-16 * 1e-4) ** 0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.2}, {"clip_threshold": 0.3, "betas": (0.8, 0.9, 0.95)}])
def test_equals_the_authors_package(settings):
    ours = start()
    theirs = {name: torch.nn.Parameter(ours[name].detach().reshape(seen).clone()) for name, (_, seen) in SHAPES.items()}
    optimizers = CAME(ours.values(), lr=LR, **settings), came_pytorch.CAME(theirs.values(), lr=LR, **settings)
    for step in range(8):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(parameters, step)
            optimizer.step()
        for name, initial in start().items():
            changes = [(p[name].detach().view_as(initial) - initial.detach()) for p in (ours, theirs)]
            assert relative_error(*changes) <= 1e-6, (name, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_equals_uninterrupted_bit_for_bit(dtype):
    whole, parts = start(dtype), start(dtype)
    first, second = CAME(whole.values(), lr=LR), CAME(parts.values(), lr=LR)
    for step in range(6):
        for parameters, optimizer in ((whole, first), (parts, second)):
            give_gradients(parameters, step)
            optimizer.step()
        if step == 2:
            file = io.BytesIO()
            torch.save(second.state_dict(), file)
            file.seek(0)
            second = CAME(parts.values(), lr=0.5)
            second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(whole[name], parts[name]) for name in SHAPES)
    for name, p in parts.items():
        assert p.dtype == dtype and {value.dtype for value in second.state[p].values()} == {torch.float32}, name


def test_a_loaded_state_is_a_copy():
    parameters = start()
    first, second = CAME(parameters.values(), lr=LR), CAME(start().values(), lr=LR)
    give_gradients(parameters, 0)
    first.step()
    second.load_state_dict(first.state_dict())
    before = second.state_dict()["state"][2]["r"].clone()
    first.step()
    assert torch.equal(second.state_dict()["state"][2]["r"], before)


def test_a_parameter_without_gradient_is_skipped():
    """It does not even decay, has no state, saves and loads, and begins when its gradient comes."""
    parameters = start()
    parameters["linear"].grad, before = None, parameters["linear"].detach().clone()
    optimizer = CAME(parameters.values(), lr=LR, weight_decay=0.5)
    for _ in range(2):
        give_gradients(parameters, 0)
        parameters["linear"].grad = None
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(parameters["linear"].detach(), before) and parameters["linear"] not in optimizer.state
    give_gradients(parameters, 1)
    optimizer.step()
    assert not torch.equal(parameters["linear"].detach(), before)


def test_zero_gradients_move_nothing():
    parameters = start()
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    CAME(parameters.values(), lr=LR).step()
    assert all(torch.equal(p, initial) for p, initial in zip(parameters.values(), start().values(), strict=True))


def test_the_closure_has_gradients_and_its_value_returns():
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = CAME([p], lr=LR)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6 and (p < 1).all()


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"lr": 1.0, "betas": (0.9, 0.95)}, {"lr": 1.0, "betas": (0, 0, 1)}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="three betas"):
        CAME(start().values(), **settings)
