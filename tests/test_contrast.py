"""pacl.contrast against §3.3, written once more as plain loops over float64 numbers; the oracles share no code with the package."""
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from pacl.contrast import (FILTERS, PairMasks, best_match_cluster, contrastive_loss, mask_quality, masked_info_nce, pacl_loss,
                           pair_masks, release_loss)

EQUATION = dict(strong=5, emotional=8, factual=11, weak=14)
partitions = pytest.mark.parametrize('partition', EQUATION, ids=lambda p: f'{p}-eq{EQUATION[p]}')
# torch's first call is slow, and so is a busy machine; the same draws everywhere
fixed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
temperatures = st.sampled_from([0.01, 0.07, 1.]) | st.floats(0.01, 1)


# The oracles. s[i][j]: image i, text j; y_f: clusters of the images; y_e: of the texts. Sets hold indices.

def argmax(values):
    best = 0
    for k in range(len(values)):
        if values[k] > values[best]:  # strictly: the lowest index of equal ones stays
            best = k
    return best


def phi_f(s, y_f, j):  # Eq. 6
    k = argmax([s[i][j] for i in range(len(s))])
    return {i for i in range(len(s)) if y_f[i] == y_f[k]}


def phi_f_inverse(s, y_f, i):  # Eq. 7
    return {j for j in range(len(s)) if i in phi_f(s, y_f, j)}


def phi_e(s, y_e, i):  # Eq. 9
    k = argmax([s[i][j] for j in range(len(s))])
    return {j for j in range(len(s)) if y_e[j] == y_e[k]}


def phi_e_inverse(s, y_e, j):  # Eq. 10
    return {i for i in range(len(s)) if j in phi_e(s, y_e, i)}


def positives_of_image(s, partition, i):  # Eq. 5; Eq. 12
    return {argmax([s[i][j] for j in range(len(s))])} if partition == 'weak' else {i}


def positives_of_text(s, partition, j):  # Eq. 5; Eq. 13
    return {argmax([s[i][j] for i in range(len(s))])} if partition == 'weak' else {j}


def dropped_of_image(s, partition, y_f, y_e, i):
    if partition == 'strong': return set()                                              # Eq. 5
    if partition == 'emotional': return phi_f_inverse(s, y_f, i)                        # Eq. 8
    if partition == 'factual': return phi_e(s, y_e, i)                                  # Eq. 11
    if partition == 'weak': return phi_f_inverse(s, y_f, i) | phi_e(s, y_e, i)          # Eq. 14


def dropped_of_text(s, partition, y_f, y_e, j):
    if partition == 'strong': return set()
    if partition == 'emotional': return phi_f(s, y_f, j)
    if partition == 'factual': return phi_e_inverse(s, y_e, j)
    if partition == 'weak': return phi_f(s, y_f, j) | phi_e_inverse(s, y_e, j)


def negatives_of_image(s, partition, y_f, y_e, i):
    return set(range(len(s))) - positives_of_image(s, partition, i) - dropped_of_image(s, partition, y_f, y_e, i)


def negatives_of_text(s, partition, y_f, y_e, j):
    return set(range(len(s))) - positives_of_text(s, partition, j) - dropped_of_text(s, partition, y_f, y_e, j)


def sets_of_image(s, partition, y_f, y_e, i, keep_positives=True):
    "P and N; reading a: without `keep_positives` the filter takes positives too."
    positives, negatives = positives_of_image(s, partition, i), negatives_of_image(s, partition, y_f, y_e, i)
    return positives if keep_positives else positives - dropped_of_image(s, partition, y_f, y_e, i), negatives


def sets_of_text(s, partition, y_f, y_e, j, keep_positives=True):
    positives, negatives = positives_of_text(s, partition, j), negatives_of_text(s, partition, y_f, y_e, j)
    return positives if keep_positives else positives - dropped_of_text(s, partition, y_f, y_e, j), negatives


def one_anchor(row, positives, negatives, temperature):
    "−log of the fraction of Eq. 3; the sums run over exp(s / τ ≤ 100), which float64 holds."
    def total(keep): return math.fsum(math.exp(row[k] / temperature) for k in keep)
    return -math.log(total(positives) / total(positives | negatives))


def one_direction(rows, sets, temperature, empty='zero'):
    "Reading c: an anchor without positives or without negatives counts as 0, or not at all."
    losses = [one_anchor(row, p, n, temperature) for row, (p, n) in zip(rows, sets, strict=True) if p and n]
    count = len(rows) if empty == 'zero' else len(losses)
    return math.fsum(losses) / count if losses else 0.


def equation_3(s, partition, y_f, y_e, temperature, keep_positives=True, empty='zero'):
    columns = [[s[i][j] for i in range(len(s))] for j in range(len(s))]
    of_images = [sets_of_image(s, partition, y_f, y_e, i, keep_positives) for i in range(len(s))]
    of_texts = [sets_of_text(s, partition, y_f, y_e, j, keep_positives) for j in range(len(s))]
    return one_direction(s, of_images, temperature, empty) / 2 + one_direction(columns, of_texts, temperature, empty) / 2


def cosines(images, texts):
    def cosine(u, v):
        length = math.sqrt(math.fsum(x * x for x in u)) * math.sqrt(math.fsum(x * x for x in v))
        return math.fsum(x * y for x, y in zip(u, v, strict=True)) / length
    return [[cosine(u, v) for v in texts] for u in images]


# The draws.

def clusters(n):
    every = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    return st.just([0] * n) | st.just(list(range(n))) | every  # all in one, each its own, anything


@st.composite
def sims(draw, most=12):
    "A matrix of cosines with many ties, clusters, a temperature."
    n = draw(st.integers(1, most))
    values = st.sampled_from([-1., 0., .5, 1.]) | st.floats(-1, 1)
    if draw(st.booleans()): values = st.sampled_from([-1., 0., .5, 1.])
    s = draw(hnp.arrays(np.float64, (n, n), elements=values))
    return s, draw(clusters(n)), draw(clusters(n)), draw(temperatures)


@st.composite
def exact_features(draw):
    "Rows of one or four ±1: lengths 1 and 2, so that cosines are exact in float64 and equal ones tie to the last bit."
    n, d = draw(st.integers(1, 12)), draw(st.sampled_from([4, 5, 8]))
    def rows():
        one = st.lists(st.sampled_from([1., -1.]), min_size=1, max_size=1)
        four = st.lists(st.sampled_from([1., -1.]), min_size=4, max_size=4)
        out = np.zeros((n, d))
        for row in out:
            signs = draw(one | four)
            row[draw(st.permutations(range(d)))[:len(signs)]] = signs
        return out
    return rows(), rows(), draw(clusters(n)), draw(clusters(n)), draw(temperatures)


@st.composite
def smooth_features(draw, largest=12, margin=1e-6, twins=True):
    """Any features whose best matches are clear by `margin`, or, with `twins`, tied only between equal rows of one cluster.

    A matrix product may round the columns of equal rows differently, so which of them wins is open; the loss must be the same.
    """
    n, d = draw(st.integers(1, largest)), draw(st.integers(2, 6))
    values = st.floats(-2, 2, width=16).filter(lambda x: abs(x) > .01)
    def rows(): return draw(hnp.arrays(np.float64, (n, d), elements=values))
    def source(): return draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)) if twins and draw(st.booleans()) else list(range(n))
    images, texts, of_image, of_text = rows(), rows(), source(), source()
    s = cosines(images[sorted(set(of_image))], texts[sorted(set(of_text))])
    assume(all(sum(max(line) - x < margin for x in line) == 1 for line in [*s, *zip(*s, strict=True)]))
    return images[of_image], texts[of_text], np.array(draw(clusters(n)))[of_image], np.array(draw(clusters(n)))[of_text], draw(temperatures)


def tensors(*arrays): return [torch.tensor(np.asarray(a)) for a in arrays]


# The equations.

@st.composite
def any_masks(draw, most=12):
    "Anchors without positives, without negatives, or with any."
    s, _, _, temperature = draw(sims(most))
    n, pairs = len(s), hnp.arrays(bool, (len(s), len(s)), fill=st.nothing())  # without a fill most entries would be equal
    positives, negatives = draw(pairs), draw(pairs)
    for i, kind in enumerate(draw(st.lists(st.sampled_from(['', 'no positives', 'no negatives']), min_size=n, max_size=n))):
        if kind == 'no positives': positives[i] = False
        if kind == 'no negatives': negatives[i] = False
    return s, positives, positives | negatives, temperature, draw(st.sampled_from(['zero', 'skip']))


@fixed
@given(any_masks())
def test_equation_3_one_direction_with_any_masks(batch):
    s, positives, candidates, temperature, empty = batch
    sets = [(set(p.nonzero()[0].tolist()), set((c & ~p).nonzero()[0].tolist())) for p, c in zip(positives, candidates, strict=True)]
    expected = one_direction(s, sets, temperature, empty)
    for dtype, rel in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        for turned in (False, True):  # anchors in rows; in columns
            logits, p, c = (x.T.contiguous() if turned else x for x in tensors(s / temperature, positives, candidates))
            logits = logits.to(dtype).requires_grad_()
            loss = masked_info_nce(logits, p, c, empty=empty, dim=0 if turned else 1)
            loss.backward()
            assert loss.dtype == dtype and loss.item() == pytest.approx(expected, rel=rel, abs=1e-9 if dtype == torch.float64 else 1e-4)
            assert logits.grad.isfinite().all()
            for i, (positive, negative) in enumerate(sets):
                assert positive and negative or not (logits.grad.T if turned else logits.grad)[i].any()  # exactly 0


@settings(fixed, max_examples=25)
@given(any_masks(most=5), st.sampled_from([0, 1]))
def test_gradient_of_one_direction_equals_finite_differences(batch, dim):
    s, positives, candidates, temperature, empty = batch
    logits, p, c = tensors(s / max(temperature, 0.05), positives, candidates)
    def loss(logits): return masked_info_nce(logits, p, c, empty=empty, dim=dim)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@partitions
@fixed
@given(sims(), st.booleans())
def test_masks_equal_the_sets_of_the_equations(partition, batch, keep_positives):
    s, y_f, y_e, _ = batch
    masks = pair_masks(*tensors(s), partition, *tensors(y_f, y_e), keep_positives=keep_positives)
    def members(row): return set(row.nonzero().flatten().tolist())
    for a in range(len(s)):
        positives, negatives = sets_of_image(s, partition, y_f, y_e, a, keep_positives)
        assert members(masks.image_positives[a]) == positives and members(masks.image_candidates[a]) == positives | negatives
        positives, negatives = sets_of_text(s, partition, y_f, y_e, a, keep_positives)
        assert members(masks.text_positives[a]) == positives and members(masks.text_candidates[a]) == positives | negatives


@fixed
@given(sims())
def test_phi_and_its_inverse(batch):
    s, y_f, y_e, _ = batch
    sim, f, e = tensors(s, y_f, y_e)
    of_text, of_image = best_match_cluster(sim.T, f), best_match_cluster(sim, e)
    for a in range(len(s)):
        assert set(of_text[a].nonzero().flatten().tolist()) == phi_f(s, y_f, a)
        assert set(of_text.T[a].nonzero().flatten().tolist()) == phi_f_inverse(s, y_f, a)
        assert set(of_image[a].nonzero().flatten().tolist()) == phi_e(s, y_e, a)
        assert set(of_image.T[a].nonzero().flatten().tolist()) == phi_e_inverse(s, y_e, a)


readings = st.fixed_dictionaries({}, optional=dict(keep_positives=st.booleans(), empty=st.sampled_from(['zero', 'skip'])))


@partitions
@fixed
@given(sims(), readings)
def test_loss_of_similarities_equals_the_equation(partition, batch, reading):
    s, y_f, y_e, temperature = batch
    sim, f, e = tensors(s, y_f, y_e)
    masks = pair_masks(sim, partition, f, e, **{k: v for k, v in reading.items() if k == 'keep_positives'})
    loss = contrastive_loss(sim, masks, temperature, **{k: v for k, v in reading.items() if k == 'empty'})
    assert loss.item() == pytest.approx(equation_3(s, partition, y_f, y_e, temperature, **reading), rel=1e-6, abs=1e-9)


@partitions
@fixed
@given(exact_features() | smooth_features(), readings)
def test_loss_of_features_equals_the_equation(partition, batch, reading):
    images, texts, y_f, y_e, temperature = batch
    loss = pacl_loss(*tensors(images, texts), partition, *tensors(y_f, y_e), temperature, **reading)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(equation_3(cosines(images, texts), partition, y_f, y_e, temperature, **reading), rel=1e-6, abs=1e-9)


@partitions
@settings(fixed, max_examples=25)
@given(smooth_features(largest=5, margin=1e-3, twins=False), readings)
def test_gradient_equals_finite_differences(partition, batch, reading):
    images, texts, y_f, y_e, temperature = batch
    v, t, f, e = tensors(images, texts, y_f, y_e)
    temperature = max(temperature, 0.05)  # at 0.01 the third derivative, τ⁻³, outweighs the difference
    def loss(v, t): return pacl_loss(v, t, partition, f, e, temperature, **reading)
    assert torch.autograd.gradcheck(loss, (v.requires_grad_(), t.requires_grad_()))


@partitions
@pytest.mark.parametrize('reading', [{}, dict(keep_positives=False, empty='skip')], ids=['decided', 'alternatives'])
def test_gradient_equals_the_equation_s(partition, reading):
    "Central differences of the oracle itself: value and gradient both come from the loops."
    rng = np.random.default_rng(0)
    images, texts, y_f, y_e = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), [0, 1, 0, 2, 1, 0], [1, 1, 0, 0, 2, 1]
    v, t = (x.requires_grad_() for x in tensors(images, texts))
    pacl_loss(v, t, partition, *tensors(y_f, y_e), 0.2, **reading).backward()
    for array, gradient in ((images, v.grad), (texts, t.grad)):
        for index in np.ndindex(array.shape):
            value, step = array[index], []
            for h in (1e-5, -1e-5):
                array[index] = value + h
                step.append(equation_3(cosines(images, texts), partition, y_f, y_e, 0.2, **reading))
            array[index] = value
            assert gradient[index].item() == pytest.approx((step[0] - step[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_gradient_is_scaled_and_may_be_asked_for_twice():
    torch.manual_seed(0)
    sim = torch.rand(6, 6, requires_grad=True)
    loss = contrastive_loss(sim, pair_masks(sim.detach(), 'weak', torch.arange(6) % 2, torch.arange(6) % 3))
    once, = torch.autograd.grad(loss, sim, retain_graph=True)
    twice, = torch.autograd.grad(loss, sim, torch.tensor(2.))
    torch.testing.assert_close(twice, 2 * once)
    assert once.any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('n', [1, 2, 64])
def test_strong_loss_is_open_clip(n, dtype):
    torch.manual_seed(n)
    v, t = torch.randn(n, 16, dtype=dtype, requires_grad=True), torch.randn(n, 16, dtype=dtype, requires_grad=True)
    ours = pacl_loss(v, t, 'strong', torch.randint(2, (n,)), torch.randint(2, (n,)), 0.05)
    theirs = ClipLoss()(F.normalize(v, dim=1), F.normalize(t, dim=1), 1 / 0.05)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (v, t)), torch.autograd.grad(theirs, (v, t)))


# The readings (a)–(e).

@partitions
@fixed
@given(sims())
def test_a_positive_is_never_dropped(partition, batch):
    s, y_f, y_e, _ = batch
    masks = pair_masks(*tensors(s), partition, *tensors(y_f, y_e))
    assert (masks.image_candidates | ~masks.image_positives).all() and (masks.text_candidates | ~masks.text_positives).all()
    assert (masks.image_positives.sum(1) == 1).all() and (masks.text_positives.sum(1) == 1).all()


def test_own_pair_stays_inside_its_dropped_cluster():
    sim = torch.full((3, 3), .1).fill_diagonal_(.9)  # each is its own best match, so its own cluster is dropped
    masks = pair_masks(sim, 'emotional', torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    assert masks.text_candidates.int().tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]
    masks = pair_masks(sim, 'factual', torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]))
    assert masks.image_candidates.int().tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_pseudo_positives_lie_in_the_dropped_cluster_always():
    "Why reading a is as it is: Eq. 12's best match is the k of Eq. 9, so that without it the weak partition trains on nothing."
    torch.manual_seed(0)
    v, t = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    y_f, y_e = torch.randint(3, (9,)), torch.randint(3, (9,))
    for empty in ('zero', 'skip'):
        loss = pacl_loss(v, t, 'weak', y_f, y_e, keep_positives=False, empty=empty)
        assert loss.item() == 0 and not torch.autograd.grad(loss, v)[0].any()
        assert pacl_loss(v, t, 'weak', y_f, y_e, empty=empty).item() > 0


DTYPES = [torch.float64, torch.float32, torch.bfloat16, 'autocast']


def loss_and_gradients(v, t, dtype, *args, **reading):
    v, t = (x.to(torch.float32 if dtype == 'autocast' else dtype).requires_grad_() for x in (v, t))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'autocast'):
        loss = pacl_loss(v, t, *args, **reading)
    loss.backward()
    return loss, v.grad, t.grad


@pytest.mark.parametrize('reading', [{}, dict(keep_positives=False), dict(empty='skip')], ids=['decided', 'dropped', 'skip'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('partition, n, one_cluster', [(p, n, c) for p in EQUATION for n, c in ((1, False), (1, True), (9, True))
                                                       if not (p == 'strong' and n > 1)])
def test_no_negatives_left_is_exactly_zero(partition, n, one_cluster, dtype, reading):
    torch.manual_seed(0)
    y = torch.zeros(n, dtype=torch.long) if one_cluster else torch.arange(n)
    loss, *gradients = loss_and_gradients(torch.randn(n, 8), torch.randn(n, 8), dtype, partition, y, y, 0.01, **reading)
    assert loss.item() == 0
    for gradient in gradients:
        assert (gradient == 0).all()  # nan == 0 is False


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_anchor_without_negatives_leaves_the_others_alone(dtype):
    logits = (torch.tensor([[9., 1., -3.], [2., 5., 4.], [-70., 70., 3.]])).to(dtype).requires_grad_()
    positives = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    candidates = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
    loss = masked_info_nce(logits, positives, candidates)
    loss.backward()
    assert loss.item() == pytest.approx(67 / 3) and (logits.grad[:2] == 0).all() and logits.grad[2].abs().sum() > 0


@partitions
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, 'autocast'], ids=str)
@pytest.mark.parametrize('temperature', [0.01, 0.07, 1.])
def test_low_precision_stays_finite_and_close(partition, dtype, temperature):
    torch.manual_seed(0)
    v, t, y_f, y_e = torch.randn(64, 32), torch.randn(64, 32), torch.randint(4, (64,)), torch.randint(4, (64,))
    t += 2 * v  # clear best matches: rounding must not change the masks
    loss, *gradients = loss_and_gradients(v, t, dtype, partition, y_f, y_e, temperature)
    expected = equation_3(cosines(v.tolist(), t.tolist()), partition, y_f.tolist(), y_e.tolist(), temperature)
    assert loss.dtype == torch.float32  # the sums are in float32 at least, whatever the features are in
    assert loss.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.03, abs=1e-4)
    assert all(g.isfinite().all() and g.dtype == (v.dtype if dtype == 'autocast' else dtype) for g in gradients)


@partitions
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_features_that_are_not_finite_show_in_the_loss(partition, value):
    "A training run stops by it: what is masked away or counted as 0 must not hide it."
    torch.manual_seed(0)
    v, t = torch.randn(6, 4), torch.randn(6, 4)
    v[3, 1] = value
    for y in (torch.zeros(6), torch.arange(6)):
        assert pacl_loss(v, t, partition, y, y).isnan()


def test_bfloat16_is_widened_before_it_is_divided_and_summed():
    torch.manual_seed(0)
    sim = (torch.rand(64, 64) * 2 - 1).bfloat16()
    masks = pair_masks(sim, 'strong', torch.zeros(64), torch.zeros(64))
    assert contrastive_loss(sim, masks, 0.07) == contrastive_loss(sim.float(), masks, 0.07)
    assert masked_info_nce(sim, *masks[:2]) == masked_info_nce(sim.float(), *masks[:2])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_index(dtype):
    torch.manual_seed(0)
    for n in [*range(1, 20), 31, 32, 33, 64, 100, 257]:  # whole and broken vector registers
        sim = torch.randint(0, 2, (n, n)).to(dtype)
        rows = sim.tolist()
        masks = pair_masks(sim, 'weak', torch.arange(n), torch.arange(n))
        assert masks.image_positives.int().argmax(1).tolist() == [argmax(row) for row in rows]
        assert masks.text_positives.int().argmax(1).tolist() == [argmax(column) for column in zip(*rows, strict=True)]
        for view, lines in ((sim, rows), (sim.T, zip(*rows, strict=True))):  # φ, too, reads rows and columns
            assert (best_match_cluster(view, torch.arange(n)).int().argmax(1).tolist()) == [argmax(line) for line in lines]


def test_masks_carry_no_gradient():
    sim = torch.rand(5, 5, requires_grad=True)
    for partition in EQUATION:
        for mask in pair_masks(sim, partition, torch.arange(5), torch.arange(5)):
            assert mask.dtype == torch.bool and not mask.requires_grad


# The authors' release. Its loss of anchor i: −log of exp(s / τ) of the target over the sum of what is not dropped.

def release_oracle(sims, y_f, y_e, temperature):
    losses = {}
    for partition, s in sims.items():
        n = len(s)
        best_text = [argmax([s[i][j] for j in range(n)]) for i in range(n)]
        best_image = [argmax([s[i][j] for i in range(n)]) for j in range(n)]
        total, infinite = [], 0
        for a in range(n):
            def logit(c): return (s[c][a] if partition == 'emotional' else s[a][c]) / temperature
            def same_fact(c): return y_f[partition][best_image[a]] == y_f[partition][best_image[c]]
            def same_emotion(c): return y_e[partition][best_text[a]] == y_e[partition][best_text[c]]
            if partition == 'strong': target, kept = a, set(range(n))
            if partition == 'emotional': target, kept = a, {c for c in range(n) if c == a or not same_fact(c)}
            if partition == 'factual': target, kept = a, {c for c in range(n) if c == a or not same_emotion(c)}
            if partition == 'weak':
                left_over = argmax([sims['factual'][a][c] for c in range(n)])
                target, kept = best_text[a], {c for c in range(n) if c == left_over or not (same_fact(c) or same_emotion(c))}
            total.append(math.log(math.fsum(math.exp(logit(c)) for c in kept)) - logit(target))
            infinite += target not in kept
        losses[partition] = dict(strong=1, emotional=.6, factual=.6, weak=.1)[partition] * math.fsum(total) / n, infinite
    return losses


@st.composite
def release_batches(draw, distinct=False):
    n = draw(st.integers(1, 8))
    values = draw(st.sampled_from([st.sampled_from([-1., 0., .5, 1.]), st.floats(-1, 1)]))
    s = hnp.arrays(np.float64, (n, n), elements=values)
    if distinct: s = st.permutations(range(n * n)).map(lambda order: np.array(order, float).reshape(n, n) * 2 / n**2 - 1)
    return tuple({p: draw(kind) for p in EQUATION} for kind in (s, clusters(n), clusters(n)))


def release_tensors(batch): return ({p: torch.tensor(x) for p, x in part.items()} for part in batch)


@fixed
@given(release_batches(), temperatures)
def test_release_loss_equals_loops(batch, temperature):
    losses = release_loss(*release_tensors(batch), temperature)
    assert list(losses) == list(EQUATION)
    for partition, (expected, _) in release_oracle(*batch, temperature).items():
        assert losses[partition].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(fixed, max_examples=25)
@given(release_batches(distinct=True))  # the best match stays the best
def test_release_gradient_equals_finite_differences(batch):
    sims, y_f, y_e = release_tensors(batch)
    def loss(*sims): return tuple(release_loss(dict(zip(EQUATION, sims, strict=True)), y_f, y_e, 0.2).values())
    assert torch.autograd.gradcheck(loss, tuple(s.requires_grad_() for s in sims.values()))


def test_release_drops_targets_of_its_weak_loss():
    "The case that is infinite in the release does occur, and is finite here: the pair 0 and 1 prefer each other's, all in one cluster."
    swapped, y = torch.tensor([[.1, .9], [.9, .1]], requires_grad=True), torch.zeros(2)
    sims, labels = dict(factual=torch.eye(2), weak=swapped), dict(factual=y, weak=y)
    assert release_oracle(*({k: v.tolist() for k, v in x.items()} for x in (sims, labels, labels)), 1.)['weak'] == (pytest.approx(-.08), 2)
    loss = release_loss(sims, labels, labels, 1.)['weak']
    loss.backward()
    assert loss.item() == pytest.approx(-.08) and swapped.grad.tolist() == [pytest.approx([.05, -.05]), pytest.approx([-.05, .05])]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_release_loss_widens_and_keeps_a_lone_pair_at_zero(dtype):
    torch.manual_seed(0)
    sims, y = {p: torch.randn(9, 9).clamp(-1, 1).to(dtype) for p in EQUATION}, dict.fromkeys(EQUATION, torch.arange(9) % 2)
    for partition, loss in release_loss(sims, y, y).items():
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss == release_loss({p: s.to(loss.dtype) for p, s in sims.items()}, y, y)[partition]
    one, y = {p: s[:1, :1] for p, s in sims.items()}, dict.fromkeys(EQUATION, torch.zeros(1))
    assert all(loss.item() == 0 for loss in release_loss(one, y, y).values())


# How often the masks are right.

@partitions
@settings(fixed, max_examples=50)
@given(sims(), st.data())
def test_mask_quality_counts(partition, batch, data):
    s, y_f, y_e, _ = batch
    n = len(s)
    image_object, image_emotion, text_emotion = (data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for _ in range(3))
    text_object = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    positives, dropped, kept = [], [], []  # (image, text), once for each direction
    for a in range(n):
        image, text = positives_of_image(s, partition, a), positives_of_text(s, partition, a)
        positives += [(a, j) for j in image] + [(i, a) for i in text]
        of_image, of_text = negatives_of_image(s, partition, y_f, y_e, a), negatives_of_text(s, partition, y_f, y_e, a)
        kept += [(a, j) for j in of_image] + [(i, a) for i in of_text]
        dropped += [(a, j) for j in range(n) if j not in image | of_image] + [(i, a) for i in range(n) if i not in text | of_text]
    def same_object(i, j): return image_object[i] == text_object[j]
    def same_emotion(i, j): return image_emotion[i] == text_emotion[j]
    def either(i, j): return same_object(i, j) or same_emotion(i, j)
    def share(pairs, true): return sum(true(i, j) for i, j in pairs) / len(pairs) if pairs else math.nan
    expected = {'dropped': len(dropped) / len(dropped + kept) if dropped + kept else math.nan}
    for kind, pairs in dict(dropped=dropped, kept=kept, negatives=dropped + kept).items():
        expected |= {f'{kind}_object': share(pairs, same_object), f'{kind}_emotion': share(pairs, same_emotion)}
        expected |= {f'{kind}_either': share(pairs, either)}
    expected |= {'positives_object': share(positives, same_object), 'positives_emotion': share(positives, same_emotion),
                 'positives_both': share(positives, lambda i, j: same_object(i, j) and same_emotion(i, j)),
                 'positives_own': share(positives, lambda i, j: i == j)}
    masks = pair_masks(*tensors(s), partition, *tensors(y_f, y_e))
    quality = mask_quality(masks, *tensors(image_object, text_object, image_emotion, text_emotion))
    assert quality == pytest.approx(expected, nan_ok=True)
    assert all(type(value) is float for value in quality.values())


# What is refused: names and shapes only, since reading values would make a GPU wait.

def test_unknown_partition_lists_the_four():
    with pytest.raises(ValueError, match='unknown partition "stong", expected one of strong, emotional, factual, weak'):
        pacl_loss(torch.rand(2, 3), torch.rand(2, 3), 'stong', torch.zeros(2), torch.zeros(2))
    assert list(FILTERS) == list(EQUATION)


@pytest.mark.parametrize('images, texts, factual, emotional', [
    ((4, 3), (5, 3), 4, 4), ((4, 3), (4, 2), 4, 4), ((4, 3), (4, 3), 3, 4), ((4, 3), (4, 3), 4, 1), ((4,), (4,), 4, 4),
    ((0, 3), (0, 3), 0, 0)])
@partitions
def test_shapes_that_differ_are_refused(partition, images, texts, factual, emotional):
    with pytest.raises(ValueError, match='shapes differ'):
        pacl_loss(torch.rand(images), torch.rand(texts), partition, torch.zeros(factual), torch.zeros(emotional))


def test_unknown_reading_lists_the_two():
    with pytest.raises(ValueError, match='unknown empty "none", expected zero or skip'):
        pacl_loss(torch.rand(2, 3), torch.rand(2, 3), 'weak', torch.zeros(2), torch.zeros(2), empty='none')


@pytest.mark.parametrize('others', [{}, {'factual': 3}])
def test_release_weak_needs_factual(others):
    sims = {p: torch.rand(n, n) for p, n in {**others, 'weak': 2}.items()}
    labels = {p: torch.zeros(len(s)) for p, s in sims.items()}
    with pytest.raises(ValueError, match='give both, of one N'):
        release_loss(sims, labels, labels)


def test_masks_of_a_wrong_shape_are_refused():
    eye = torch.eye(3).bool()
    with pytest.raises(ValueError, match='shapes differ'):
        masked_info_nce(torch.rand(3, 3), eye[0], eye)  # would broadcast
    with pytest.raises(ValueError, match='shapes differ'):
        pair_masks(torch.rand(3, 4), 'weak', torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match='one for each column'):
        best_match_cluster(torch.rand(3, 4), torch.zeros(3))
    assert PairMasks._fields == ('image_positives', 'image_candidates', 'text_positives', 'text_candidates')
