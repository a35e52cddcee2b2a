"""Derivatives of a step along a direction by differences, against second derivatives."""

from dataclasses import replace

import pytest
import torch
from test_replay import Training

from whence.gradients.exact import sequences_of
from whence.training import step_differences
from whence.training.replay import replay
from whence.training.step_derivatives import RecordedStep, RowLosses, StepSlope
from whence.training.step_differences import DifferencedStep, error_of_differences
from whence.training.step_log import StepRecorder, open_log

PASSES = {"one pass": [[0, 3, 5]], "two passes": [[0, 3], [5, 1]]}


def losses_of(architecture="llama", dtype=torch.float64):
    training = Training(architecture, dtype=dtype)
    return RowLosses(training.model, training.weights, training.rows)


def directions(losses, count=2, scale=1.0):
    """Random ones [q ...], each of its own length."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.logspace(0, 3, count) * scale
    return {name: (torch.randn(count, *weight.shape, generator=generator, dtype=torch.float64)
                   * lengths.view(-1, *[1] * weight.dim())).to(weight.dtype)
            for name, weight in losses.weights.items()}  # fmt: skip


def apart(found, expected):
    """Error of each direction, relative."""
    names = expected if isinstance(expected, dict) else {"": expected}
    found = found if isinstance(found, dict) else {"": found}
    flat = [torch.cat([each[name].flatten(1).double() for name in names], 1) for each in (found, names)]
    return float(((flat[0] - flat[1]).norm(dim=1) / flat[1].norm(dim=1)).max())


def differenced(losses, passes, along, lengths):
    with losses.thawed():
        return DifferencedStep(losses, passes, losses.slope(passes), lengths).derivatives(along)


def second(losses, passes, along):
    with losses.thawed():
        return RecordedStep(losses, passes).derivatives(along)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 0.02)])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("architecture", ["llama", "lora", "gpt2"])
def test_they_equal_second_derivatives(architecture, passes, dtype, most):
    losses = losses_of(architecture, dtype)
    along = directions(losses)
    expected, found = second(losses, PASSES[passes], along), differenced(losses, PASSES[passes], along, [0.0, 0.0])
    assert apart(found[0], expected[0]) < most
    assert apart(found[1], expected[1].double()) < most


@pytest.mark.parametrize("length", [1e-9, 1e-2, 1e3])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_length_that_does_not_fit_is_mended(length, scale):
    losses = losses_of()
    along, lengths = directions(losses, scale=scale), [length, length]
    found = differenced(losses, PASSES["one pass"], along, lengths)
    assert apart(found[0], second(losses, PASSES["one pass"], along)[0]) < 1e-5
    again = [*lengths]
    differenced(losses, PASSES["one pass"], along, again)
    assert again == pytest.approx(lengths, rel=1.0), "the next step begins with a length that fits"


def test_the_weights_are_what_they_were_and_a_direction_of_zeros_changes_nothing():
    losses = losses_of(dtype=torch.float32)
    before = {name: weight.detach().clone() for name, weight in losses.weights.items()}
    along = {name: torch.zeros_like(each) for name, each in directions(losses).items()}
    by_weights, by_rows = differenced(losses, PASSES["one pass"], along, [0.0, 0.0])
    assert not by_rows.any() and not any(each.any() for each in by_weights.values())
    without_end = {name: torch.full_like(each, torch.inf) for name, each in along.items()}
    by_weights, by_rows = differenced(losses, PASSES["one pass"], without_end, [0.0, 0.0])
    assert by_rows.isnan().all() and all(each.isnan().all() for each in by_weights.values())
    differenced(losses, PASSES["one pass"], directions(losses), [0.0, 0.0])
    assert all(torch.equal(weight, before[name]) for name, weight in losses.weights.items())
    with losses.thawed(), pytest.MonkeyPatch.context() as patch:
        step = DifferencedStep(losses, [[0]], losses.slope([[0]]), [0.0, 0.0])
        patch.setattr(RowLosses, "slope", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step.derivatives(directions(losses))
        assert all(torch.equal(weight, before[name]) for name, weight in losses.weights.items())


def interrupted(self, passes):
    raise KeyboardInterrupt


def test_how_far_they_are_is_known():
    losses = losses_of()
    with losses.thawed():
        assert error_of_differences(losses, [0, 3, 5], directions(losses)) < 1e-6
    rounded = losses_of(dtype=torch.bfloat16)
    with rounded.thawed():
        assert error_of_differences(rounded, [0, 3, 5], directions(rounded)) > step_differences.LARGEST_ERROR


def asked(training, directory, **options):
    training.train([1.0] * 8, StepRecorder(training.weights, directory, training.every, training.clip))
    losses = RowLosses(training.model, training.weights, training.rows)
    targets = [[sequences_of(query)] for query in training.queries]
    return replay(losses, open_log(directory), targets, progress=False, **options)


@pytest.mark.parametrize("is_back", [False, True])
def test_a_step_of_zeros_or_without_a_gradient_has_its_derivatives(is_back):
    losses = losses_of()
    along = directions(losses)
    with losses.thawed():
        for weight in losses.weights.values():
            weight.data.zero_()  # a saddle: of the gradients nothing is left but the rows' own
        slope = losses.slope([[0, 3, 5]])
        exact = RecordedStep(losses, [[0, 3, 5]]).derivatives(along)
        for each in (slope, StepSlope({name: 0 * g for name, g in slope.gradient.items()}, slope.shares)):
            found = DifferencedStep(losses, [[0, 3, 5]], each, [0.0, 0.0], is_back).derivatives(along)
            assert torch.allclose(found[1], exact[1].double(), atol=1e-6 * float(along["lm_head.weight"].norm()))


def test_what_is_left_out_has_another_sign_at_every_second_step():
    """Half of e times mu' H_i mu: a sum over steps would gather it, for a question and its opposite alike."""
    losses = losses_of()
    along = directions(losses, count=1)
    exact = second(losses, [[0, 3, 5]], along)[1].double()
    errors = []
    with losses.thawed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_differences, "CHANGE", 1e6)
        for is_back in (False, True):
            step = DifferencedStep(losses, [[0, 3, 5]], losses.slope([[0, 3, 5]]), [0.0], is_back)
            errors.append(step.derivatives(along)[1] - exact)
    assert errors[0].norm() > 1e-4 * exact.norm()
    assert (errors[0] + errors[1]).norm() < 0.1 * errors[0].norm()


def test_the_scores_of_a_question_and_of_its_opposite_add_up_to_nothing(tmp_path):
    training = Training("llama", dtype=torch.float32, steps=12, rate=1e-2)
    training.train([1.0] * 8, StepRecorder(training.weights, tmp_path, training.every, training.clip))
    losses = RowLosses(training.model, training.weights, training.rows)
    query = sequences_of(training.queries[0])
    opposite = [replace(sequence, sign=-sequence.sign) for sequence in query]
    found = replay(losses, open_log(tmp_path), [[query], [opposite]], progress=False)
    assert found.error is not None and found.error < 0.05
    assert found.scores.sum(0).norm() < 0.01 * found.scores[0].norm()


def test_where_they_are_far_second_derivatives_are_taken(tmp_path, caplog):
    """Weights of bfloat16 have no room for a small step."""
    training = Training("llama", dtype=torch.bfloat16)
    found = asked(training, tmp_path / "a")
    assert found.error > 0.05
    assert "at step 7 differences of gradients are" in caplog.text
    exact = asked(training, tmp_path / "b", differences=False).scores
    assert (found.scores - exact).norm() < 0.05 * exact.norm(), "the last step's gradient is another kernel's, rounded"


def test_they_are_given_up_in_the_midst(tmp_path, caplog, monkeypatch):
    training = Training("llama", every=3)
    exact = asked(training, tmp_path / "a", differences=False).scores
    errors = iter([0.01, 0.01, 0.2])
    monkeypatch.setattr("whence.training.replay.error_of_differences", lambda *_: next(errors))
    found = asked(training, tmp_path / "b")
    assert found.error == 0.2 and "at step 5" in caplog.text and "20% off" in caplog.text
    assert torch.allclose(found.scores, exact, rtol=1e-4, atol=1e-9)
