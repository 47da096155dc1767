import os

from qwen_vram.tools.fresh_process import call_each


def answer(item):
    if item == "wrong":
        raise ValueError("this one is wrong")
    if item == "dead":
        os._exit(7)
    return os.getpid(), item * 2


def test_every_call_has_a_process_of_its_own_and_failures_stay_apart():
    ended = {one.item: one for one in call_each(answer, [1, 2, "wrong", "dead"], jobs=2)}
    (first, one), (second, two) = ended[1].value, ended[2].value
    assert (one, two) == (2, 4)
    assert len({first, second, os.getpid()}) == 3
    assert "ValueError: this one is wrong" in ended["wrong"].error
    assert ended["dead"].error == "the process ended without a word, exit code 7"
