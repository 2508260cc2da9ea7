"""pacl.contrast against §3.3, written once more as plain loops over float64 numbers; the oracles share no code with the package."""
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from pacl import contrast
from pacl.contrast import masked_info_nce, pacl_loss, pair_masks

EQUATION = dict(strong=5, emotional=8, factual=11, weak=14)
partitions = pytest.mark.parametrize('partition', EQUATION, ids=lambda p: f'{p}-eq{EQUATION[p]}')
fixed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=60)
temperatures = st.sampled_from([0.01, 0.07, 1.]) | st.floats(0.01, 1)


# The oracles. s[i][j]: image i, text j; y_f: clusters of the images; y_e: of the texts. Sets hold indices.

def argmax(values):
    best = 0
    for k in range(len(values)):
        if values[k] > values[best]:  # strictly: the lowest index of equal ones stays
            best = k
    return best


def phi_f(s, y_f, j):  # Eq. 6
    k = argmax([row[j] for row in s])
    return {i for i in range(len(s)) if y_f[i] == y_f[k]}


def phi_f_inverse(s, y_f, i): return {j for j in range(len(s)) if i in phi_f(s, y_f, j)}  # Eq. 7


def phi_e(s, y_e, i):  # Eq. 9
    k = argmax(s[i])
    return {j for j in range(len(s)) if y_e[j] == y_e[k]}


def phi_e_inverse(s, y_e, j): return {i for i in range(len(s)) if j in phi_e(s, y_e, i)}  # Eq. 10


def sets_of_image(s, partition, y_f, y_e, i):  # P and N
    positives = {argmax(s[i])} if partition == 'weak' else {i}  # Eq. 12
    dropped = set()
    if partition in ('emotional', 'weak'): dropped |= phi_f_inverse(s, y_f, i)  # Eqs. 8, 14
    if partition in ('factual', 'weak'): dropped |= phi_e(s, y_e, i)  # Eqs. 11, 14
    return positives, set(range(len(s))) - positives - dropped


def sets_of_text(s, partition, y_f, y_e, j):
    positives = {argmax([row[j] for row in s])} if partition == 'weak' else {j}  # Eq. 13
    dropped = set()
    if partition in ('emotional', 'weak'): dropped |= phi_f(s, y_f, j)
    if partition in ('factual', 'weak'): dropped |= phi_e_inverse(s, y_e, j)
    return positives, set(range(len(s))) - positives - dropped


def one_direction(rows, sets, temperature):
    "Reading c: an anchor without negatives counts as 0."
    total = 0
    for row, (positives, negatives) in zip(rows, sets):
        e = [math.exp(x / temperature) for x in row]  # exp(s / τ ≤ 100), which float64 holds
        if negatives: total -= math.log(sum(e[k] for k in positives) / sum(e[k] for k in positives | negatives))
    return total / len(rows)


def equation_3(s, partition, y_f, y_e, temperature):
    s = [list(row) for row in s]
    columns = [list(column) for column in zip(*s)]
    of_images = [sets_of_image(s, partition, y_f, y_e, i) for i in range(len(s))]
    of_texts = [sets_of_text(s, partition, y_f, y_e, j) for j in range(len(s))]
    return one_direction(s, of_images, temperature) / 2 + one_direction(columns, of_texts, temperature) / 2


def cosines(images, texts):
    def unit(rows): return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit(np.asarray(images)) @ unit(np.asarray(texts)).T


# The draws.

def clusters(n):
    every = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    return st.just([0] * n) | st.just(list(range(n))) | every  # all in one, each its own, anything


@st.composite
def sims(draw, most=8):
    "A matrix of cosines with many ties, clusters, a temperature."
    n = draw(st.integers(1, most))
    few = st.sampled_from([-1., 0., .5, 1.])
    values = draw(st.sampled_from([few, few | st.floats(-1, 1)]))
    return draw(hnp.arrays(np.float64, (n, n), elements=values)), draw(clusters(n)), draw(clusters(n)), draw(temperatures)


@st.composite
def exact_features(draw):
    "Rows with one or four ±1: lengths 1 and 2, so that cosines are exact in float64 and equal ones tie to the last bit."
    n = draw(st.integers(1, 8))
    signs = draw(hnp.arrays(np.float64, (2, n, 4), elements=st.sampled_from([1., -1.])))
    alone = draw(hnp.arrays(bool, (2, n)))
    place = draw(hnp.arrays(np.int64, (2, n), elements=st.integers(0, 3)))
    images, texts = np.where(alone[..., None], signs * (np.arange(4) == place[..., None]), signs)
    return images, texts, draw(clusters(n)), draw(clusters(n)), draw(temperatures)


def tensors(*arrays): return [torch.tensor(np.asarray(a)) for a in arrays]


def random_batch(n=6, d=3):
    rng = np.random.default_rng(0)
    return *rng.normal(size=(2, n, d)), rng.integers(0, 3, n), rng.integers(0, 3, n)


# The equations.

@fixed
@given(sims(), st.data())
def test_equation_3_with_any_masks(batch, data):
    s, _, _, temperature = batch
    n = len(s)
    pairs = hnp.arrays(bool, (n, n), fill=st.nothing())
    negatives = data.draw(pairs) & data.draw(hnp.arrays(bool, (n, 1)))  # some anchors have none
    positives = np.eye(n, dtype=bool) | data.draw(pairs)
    sets = [({*p.nonzero()[0]}, {*(q & ~p).nonzero()[0]}) for p, q in zip(positives, negatives)]
    expected = one_direction(s, sets, temperature)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        logits = torch.tensor(s / temperature, dtype=dtype, requires_grad=True)
        loss = masked_info_nce(logits, *tensors(positives, positives | negatives))
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-6, abs=tolerance)
        assert logits.grad.isfinite().all()
        for i, (_, kept) in enumerate(sets): assert kept or not logits.grad[i].any()  # exactly 0


@partitions
@fixed
@given(sims())
def test_masks_equal_the_sets_of_the_equations(partition, batch):
    s, y_f, y_e, _ = batch
    masks = pair_masks(*tensors(s), partition, *tensors(y_f, y_e))
    def members(row): return {*row.nonzero().flatten().tolist()}
    for a in range(len(s)):
        positives, negatives = sets_of_image(s, partition, y_f, y_e, a)
        assert members(masks.image_positives[a]) == positives and members(masks.image_candidates[a]) == positives | negatives
        positives, negatives = sets_of_text(s, partition, y_f, y_e, a)
        assert members(masks.text_positives[a]) == positives and members(masks.text_candidates[a]) == positives | negatives


@pytest.mark.parametrize('name', ['phi_f', 'phi_f_inverse', 'phi_e', 'phi_e_inverse'])
@fixed
@given(sims())
def test_phi_and_its_inverse(name, batch):
    s, y_f, y_e, _ = batch
    labels = y_e if 'phi_e' in name else y_f
    relation = getattr(contrast, name)(*tensors(s, labels))
    for a in range(len(s)): assert {*relation[a].nonzero().flatten().tolist()} == globals()[name](s, labels, a)


@partitions
@fixed
@given(exact_features())
def test_loss_of_features_equals_the_equation(partition, batch):
    images, texts, y_f, y_e, temperature = batch
    loss = pacl_loss(*tensors(images, texts), partition, *tensors(y_f, y_e), temperature)
    assert loss.item() == pytest.approx(equation_3(cosines(images, texts), partition, y_f, y_e, temperature), rel=1e-6, abs=1e-9)


@partitions
def test_gradient_equals_the_equation_s(partition):
    "Central differences of the oracle itself: value and gradient both come from the loops."
    images, texts, y_f, y_e = random_batch()
    v, t = (x.requires_grad_() for x in tensors(images, texts))
    pacl_loss(v, t, partition, *tensors(y_f, y_e), 0.2).backward()
    for array, gradient in ((images, v.grad), (texts, t.grad)):
        for index in np.ndindex(array.shape):
            value, ends = array[index], []
            for h in (1e-5, -1e-5):
                array[index] = value + h
                ends.append(equation_3(cosines(images, texts), partition, y_f, y_e, 0.2))
            array[index] = value
            assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize('n', [1, 2, 64])
def test_strong_loss_is_open_clip(n):
    torch.manual_seed(n)
    v, t = torch.randn(n, 16, requires_grad=True), torch.randn(n, 16, requires_grad=True)
    ours = pacl_loss(v, t, 'strong', torch.randint(2, (n,)), torch.randint(2, (n,)), 0.05)
    theirs = ClipLoss()(F.normalize(v, dim=1), F.normalize(t, dim=1), 1 / 0.05)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (v, t)), torch.autograd.grad(theirs, (v, t)))


# The readings (a)–(e).

def test_own_pair_stays_inside_its_dropped_cluster():
    sim = torch.full((3, 3), .1).fill_diagonal_(.9)  # each is its own best match, so its own cluster is dropped
    two, each, expected = torch.tensor([0, 0, 1]), torch.arange(3), [[1, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert pair_masks(sim, 'emotional', two, each).text_candidates.int().tolist() == expected
    assert pair_masks(sim, 'factual', each, two).image_candidates.int().tolist() == expected


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('partition, n', [(p, n) for p in EQUATION for n in (1, 9) if p != 'strong' or n == 1])
def test_no_negatives_left_is_exactly_zero(partition, n, dtype):
    torch.manual_seed(0)
    v, t = (torch.randn(n, 8).to(dtype).requires_grad_() for _ in range(2))
    loss = pacl_loss(v, t, partition, torch.zeros(n), torch.zeros(n), 0.01)
    loss.backward()
    assert loss.item() == 0 and (v.grad == 0).all() and (t.grad == 0).all()  # nan == 0 is False


@partitions
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('temperature', [0.01, 0.07, 1.])
def test_low_precision_stays_finite_and_close(partition, dtype, temperature):
    torch.manual_seed(0)
    v, t, y_f, y_e = torch.randn(64, 32), torch.randn(64, 32), torch.randint(4, (64,)), torch.randint(4, (64,))
    t += 2 * v  # clear best matches: rounding must not change the masks
    low = [x.to(dtype, copy=True).requires_grad_() for x in (v, t)]
    loss = pacl_loss(*low, partition, y_f, y_e, temperature)
    loss.backward()
    expected = equation_3(cosines(v, t).tolist(), partition, y_f.tolist(), y_e.tolist(), temperature)
    assert loss.dtype == torch.float32  # the sums are in float32 at least, whatever the features are in
    assert loss.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.03, abs=1e-4)
    assert all(x.grad.isfinite().all() for x in low)


@partitions
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_features_that_are_not_finite_show_in_the_loss(partition, value):
    "A training run stops by it: what is masked away or counted as 0 must not hide it."
    torch.manual_seed(0)
    v, t = torch.randn(6, 4), torch.randn(6, 4)
    v[3, 1] = value
    for y in (torch.zeros(6), torch.arange(6)): assert pacl_loss(v, t, partition, y, y).isnan()


# What is refused: names and shapes only, since reading values would make a GPU wait.

@pytest.mark.parametrize('call, says', [
    (lambda: pacl_loss(torch.rand(2, 3), torch.rand(2, 3), 'stong', torch.zeros(2), torch.zeros(2)),
     'unknown partition "stong", expected one of strong, emotional, factual, weak'),
    (lambda: masked_info_nce(torch.rand(3, 3), torch.eye(3).bool()[0], torch.eye(3).bool()), 'shapes differ')])  # would broadcast
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(ValueError, match=says): call()
