import math

import numpy as np
import pytest
import torch

from pcrl_nnunet.losses import (
    classification_loss,
    comparison_loss,
    contrastive_loss,
    known_class_loss,
    local_comparison_loss,
    restoration_loss,
)


def test_restoration_is_the_mean_squared_difference():
    assert restoration_loss(torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[3.0, 4.0]]])) == pytest.approx(2.0)


def test_identical_embeddings_give_exactly_minus_one():
    v = torch.randn(5, 16)
    assert comparison_loss(v, v, v, v) == pytest.approx(-1.0, abs=1e-6)


def test_comparison_agrees_with_cosines_by_hand():
    # cos(v_u, p_w) = cos 60 degrees, cos(p_u, v_w) = cos 90 degrees
    v_u, p_w = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 3**0.5 / 2]])
    p_u, v_w = torch.tensor([[0.0, 7.0]]), torch.tensor([[1.0, 0.0]])
    assert comparison_loss(v_u, p_u, v_w, p_w) == pytest.approx(-0.25)


def test_no_gradient_reaches_v():
    v_u, p_u, v_w, p_w = (torch.randn(4, 8, requires_grad=True) for _ in range(4))
    comparison_loss(v_u, p_u, v_w, p_w).backward()
    assert v_u.grad is None
    assert v_w.grad is None
    assert p_u.grad.abs().sum() > 0
    assert p_w.grad.abs().sum() > 0


def test_comparison_is_float32_under_half_precision():
    v = torch.randn(4, 8).half()
    assert comparison_loss(v, v, v, v).dtype == torch.float32


def test_the_local_term_is_the_mean_over_all_pairs_of_views():
    v_l, p_l = torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    v_g, p_g = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    pairs = [comparison_loss(v_l[:, k], p_l[:, k], v_g[:, m], p_g[:, m]) for k in range(6) for m in range(2)]
    assert local_comparison_loss(v_l, p_l, v_g, p_g) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)


NAN = float("nan")


def test_only_known_labels_count():
    logits = torch.tensor([[1.5, -2.0], [0.3, 4.0], [-1.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, NAN], [0.0, 0.0], [NAN, 1.0]])
    p = torch.sigmoid(logits.detach())
    known = [-p[0, 0].log(), -(1 - p[1, 0]).log(), -(1 - p[1, 1]).log(), -p[2, 1].log()]
    loss = classification_loss(logits, target, False)
    assert loss.item() == pytest.approx(float(sum(known)) / 4, rel=1e-5)
    loss.backward()
    assert (logits.grad != 0).tolist() == (~target.isnan()).tolist()


def test_exclusive_classes_have_the_cross_entropy_of_known_samples():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 0.0], [3.0, 1.0, 1.0]])
    target = torch.tensor([[0.0, 1.0, 0.0], [NAN, NAN, NAN], [1.0, 0.0, 0.0]])
    log_p = logits.log_softmax(1)
    expected = -(log_p[0, 1] + log_p[2, 0]) / 2
    loss = classification_loss(logits, target, True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("exclusive", [True, False])
def test_unknown_labels_alone_give_zero_loss_and_gradient(exclusive):
    logits = torch.randn(4, 2, requires_grad=True)
    loss = classification_loss(logits, torch.full((4, 2), NAN), exclusive)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_contrastive_loss_agrees_with_a_loop_over_samples() -> None:
    rng = np.random.default_rng(0)
    query, key, negatives = (rng.normal(size=(n, 5)) for n in (3, 3, 4))
    allowed = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    tensors = [torch.from_numpy(x) for x in (query, key, negatives, allowed)]
    for positive_below in (True, False):
        losses = []
        for q, k, others in zip(query, key, allowed, strict=True):
            cosine = [float(q @ x / np.linalg.norm(q) / np.linalg.norm(x)) / 0.2 for x in (k, *negatives[others])]
            below = sum(math.exp(c) for c in (cosine if positive_below else cosine[1:]))
            losses.append(-math.log(math.exp(cosine[0]) / below) if others.any() else None)
        expected = np.mean([loss for loss in losses if loss is not None])  # the last sample has no negative
        assert contrastive_loss(*tensors, 0.2, positive_below) == pytest.approx(float(expected), rel=1e-5)


def test_known_class_loss_is_the_mean_over_samples_with_a_class():
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(6, 5)), np.array([2, -1, 4, 0, -1, 2])
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -np.mean([logs[i, c] for i, c in enumerate(classes) if c >= 0])
    given, share = (torch.tensor(logits), torch.tensor(classes)), torch.tensor(4 / 6)
    assert known_class_loss(*given, share).item() == pytest.approx(expected, rel=1e-5)
    parts = [known_class_loss(given[0][part], given[1][part], share) for part in (slice(0, 2), slice(2, 6))]
    assert (parts[0] * 2 / 6 + parts[1] * 4 / 6).item() == pytest.approx(expected, rel=1e-5)
    assert known_class_loss(given[0], torch.full((6,), -1), torch.tensor(0.0)) == 0
