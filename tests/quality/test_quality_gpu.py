"""The check on a GPU: captured plans, and a reference that does not fit and is streamed."""

import pytest

import qwen_vram as qv

pytestmark = pytest.mark.gpu

SMALL = {"measure": "distance", "texts": 3, "text_tokens": 300}


def test_the_same_model_is_identical_with_the_plans_own_cache(demo, tmp_path):
    found = qv.check(demo, weights="bf16", logits=tmp_path, **SMALL)
    assert found.distance.verdict == "identical"
    eight = qv.check(demo, weights="int8-wo", logits=tmp_path, **SMALL)
    assert 0 < eight.distance.mean_kl.high < 0.01


def test_a_reference_that_does_not_fit_is_streamed(wide, tmp_path):
    work = {"vram": "8GiB", "prompt_len": 300, "max_new_tokens": 256, "captured": False}
    eight, whole = (qv.plan(wide, weights=weights, **work).estimate.process_total for weights in ("int8-wo", "bf16"))
    budget = eight + 16 * 2**20
    assert budget < whole
    asked = {**SMALL, "weights": "int8-wo", "logits": tmp_path}
    found = qv.check(wide, **asked, vram=budget)
    assert found.reference_settings["streamed_layers"] > 0
    assert found.reference_settings["weights"] == "bf16"
    assert found.settings["streamed_layers"] == 0
    resident = qv.check(wide, **{**asked, "logits": tmp_path / "resident"})
    assert resident.reference_settings["streamed_layers"] == 0
    assert resident.distance.mean_kl.value == pytest.approx(found.distance.mean_kl.value, rel=0.05)


def test_the_questions_are_answered(demo):
    found = qv.check(demo, measure="questions", questions=4, weights="bf16").questions
    right, asked = found.counts()["total"]
    assert asked == 20
    assert right >= 17
