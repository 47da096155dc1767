"""The distance by other computations, and the order of formats on the bundled checkpoint."""

import math

import pytest
import torch

import qwen_vram as qv
from qwen_vram.quality.distance import _SHARES, _quantiles, compare, distance
from qwen_vram.quality.documents import documents


def logits(seed, rows=40, width=50):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def test_one_document_is_as_torch_computes_it():
    reference, found, targets = logits(1), logits(2), torch.arange(40)
    made = compare(reference, found, targets)
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(made.kl, kl.sum(-1))
    torch.testing.assert_close(made.loss, torch.nn.functional.cross_entropy(found, targets, reduction="none"))
    assert made.agrees.tolist() == (reference.argmax(-1) == found.argmax(-1)).float().tolist()


def test_the_figures_are_those_of_all_tokens_and_lie_in_their_intervals():
    targets = torch.arange(40)
    made = [compare(logits(seed), logits(seed) + 0.3 * logits(seed + 100), targets) for seed in range(6)]
    found = distance(made)
    kl = torch.cat([one.kl for one in made]).double()
    assert found.tokens == 240
    assert found.mean_kl.value == pytest.approx(kl.mean().item())
    assert found.median_kl.value == pytest.approx(kl.quantile(0.5).item())
    assert found.p999_kl.value == pytest.approx(kl.quantile(0.999).item())
    loss = sum((one.loss - one.reference_loss).double().mean().item() for one in made) / 6
    assert found.perplexity_ratio.value == pytest.approx(math.exp(loss))
    for one in found.figures().values():
        assert one.low <= one.value <= one.high
        assert one.low < one.high
    assert found.mean_kl.value < found.p99_kl.value < found.p999_kl.value


def test_documents_have_one_length_and_change_with_the_seed():
    made = [
        documents("general", seed, 5, 200, lambda text: list(text.encode()), lambda asked, answer: (asked, answer))
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1]
    assert made[0].digest != made[2].digest
    assert {len(ids) for ids in made[0].ids} == {200}
    assert (made[0].context, made[0].predicted) == (100, 100)


def test_intervals_of_percentiles_are_those_of_sorting_each_resample():
    kl = [torch.rand(size, generator=torch.Generator().manual_seed(size)).double() for size in (5, 40, 256, 100)]
    draws = torch.randint(4, (200, 4), generator=torch.Generator().manual_seed(0))
    for share, found in zip(_SHARES, _quantiles(kl, draws), strict=True):
        resampled = torch.stack(
            [torch.quantile(torch.cat([kl[one] for one in draw]), share) for draw in draws.tolist()]
        )
        low, high = resampled.quantile(0.025).item(), resampled.quantile(0.975).item()
        assert found.value == pytest.approx(torch.quantile(torch.cat(kl), share).item())
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("logits")


def check(demo, folder, texts=16, **knobs):
    return qv.check(
        demo, measure="distance", texts=texts, text_tokens=128, device="cpu", logits=folder, **knobs
    ).distance


def test_the_same_model_is_identical_streamed_too(demo, folder):
    found = check(demo, folder, 2, weights="bf16")
    assert found.verdict == "identical"
    assert found.top_1.value == found.perplexity_ratio.value == 1
    streamed = check(demo, folder, 2, profile="default", streamed_layers=2)
    assert streamed.verdict == "identical"
    four = check(demo, folder, 2, weights="nf4")
    assert four.mean_kl.value > 0
    assert four.verdict != "identical"


@pytest.mark.full
def test_formats_are_ranked_the_same_with_other_documents(demo, folder):
    for seed in (0, 1):
        eight, four = (check(demo, folder, weights=name, seed=seed).mean_kl for name in ("int8-wo", "nf4"))
        assert 0 < eight.high < four.low
        assert not eight.overlaps(four)


@pytest.mark.full
def test_a_quantized_kv_cache_shows_in_its_old_tokens(demo, folder):
    whole = {"texts": 3, "text_tokens": 640, "logits": folder, "measure": "distance", "device": "cpu"}
    eight, four = (
        qv.check(demo, **whole, kv_cache=name, cache="preallocated", weights="bf16").distance.mean_kl
        for name in ("int8", "int4")
    )
    assert 0 < eight.value < four.value


def test_the_bundled_model_is_scored_on_its_answers_alone():
    made = documents("demo", 0, 3, 400, lambda text: [len(text)] * 20, lambda asked, answer: (asked, answer))
    for ids, counts in zip(made.ids, made.counts):
        assert len(counts) == 200
        answers = [length for length, counted in zip(ids[200:], counts) if counted]
        assert 0 < len(answers) < 200


def test_documents_of_different_lengths_count_by_token():
    made = [compare(logits(seed, rows), logits(seed + 9, rows), torch.arange(rows)) for seed, rows in ((1, 5), (2, 40))]
    found = distance(made)
    assert found.tokens == 45
    assert found.mean_kl.value == pytest.approx(torch.cat([one.kl for one in made]).double().mean().item())


def test_the_documents_of_the_measured_table_are_unchanged():
    """Figures in docs/quality.md are of these documents: a change of the generators needs new figures."""
    made = documents("general", 0, 12, 2000, lambda text: list(text.encode()), lambda asked, answer: (asked, answer))
    assert made.digest.startswith("4abda876683cc154")
