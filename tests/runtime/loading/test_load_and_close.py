"""A process that loads and closes: it holds no more after the last time than after the 2nd, nor after a failed load."""

import gc
import itertools
import os
import shutil
import threading
from dataclasses import replace

import psutil
import pytest
import torch
from transformers.utils import logging as transformers_logging

import qwen_vram as qv
from qwen_vram.demo import ADAPTER
from qwen_vram.runtime.loading import load as loader
from qwen_vram.runtime.measure import process_bytes

MIB = 2**20
SLACK = 16 * MIB
ROOM = {"attention": "fused", "kernels": "fused", "cache": "preallocated"}
KINDS = {
    "nf4, all of compact": {
        **ROOM, "weights": "nf4", "lm_head": "nf4", "embeddings": "host", "dequantization": "tiled", "kv_cache": "int8",
        "prefill_chunk_size": 16,
    },
    "streamed from host and disk, cache on the host": {
        **ROOM, "streamed_layers": 5, "disk_layers": 3, "kv_device": "host",
    },
    "int8 streamed, static cache": {"weights": "int8", "streamed_layers": 3, "cache": "static"},
    "adapter over streamed layers": {"adapter": ADAPTER, "streamed_layers": 4},
}  # fmt: skip
GREEDY = {"do_sample": False, "max_new_tokens": 4}
QUESTION = "What is 12 + 30?"


def load(folder, **knobs):
    settings = {"profile": "default", "progress": False, "prompt_len": 100, "max_new_tokens": 20}
    return qv.load(folder, **{**settings, **knobs})


def resident():
    return psutil.Process().memory_info().rss


def opened(folder):
    """Open files, and mapped ones of a checkpoint."""
    with open("/proc/self/maps") as maps:
        mapped = sum(str(folder) in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped


def held():
    """Bytes of the storages of all tensors, and threads of ours."""
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if not one.is_meta}
    return sum(storages.values()), [one.name for one in threading.enumerate() if one.name.startswith("qwen-vram")]


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", KINDS)
def test_many_times_leave_what_the_second_left(demo, kind, times):
    after = []
    for _ in range(times):
        with load(demo, **KINDS[kind]) as llm:
            assert llm.chat(QUESTION, **GREEDY)
        del llm
        after.append((resident(), opened(demo), held()))
    assert after[-1][0] <= after[1][0] + SLACK
    assert after[-1][1:] == after[1][1:]
    assert after[-1][1][1] == 0
    assert set(after[-1][2][1]) <= {"qwen-vram runner"}  # which waits for the next generation


class CtrlC:
    """A hook of transformers' bars, of the loader's and of theirs: the `count`-th step of all is interrupted."""

    def __init__(self, count):
        self.left = count

    def __call__(self, factory, args, kwargs):
        for one in args[0]:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            yield one


def refused(folder, **knobs):
    """The error of a load; it keeps its traceback."""
    with pytest.raises((qv.QwenVramError, KeyboardInterrupt)) as caught:
        load(folder, **knobs)
    return caught.value


def check_nothing_left(folder, fail, knobs, expected):
    """Let loads fail, and keep the errors: there is no more than before, and the next load works."""
    errors = []
    for number in range(6):
        if number == 2:
            before = resident(), opened(folder), held()
        errors.append(fail())
    assert all(error.__traceback__ is not None for error in errors)
    after = resident(), opened(folder), held()
    assert after[0] <= before[0] + SLACK
    assert after[1:] == before[1:]
    with load(folder, **knobs) as llm:
        assert llm.chat(QUESTION, **GREEDY) == expected
    return errors


@pytest.fixture(scope="module")
def shards(demo, tmp_path_factory):
    """The bundled checkpoint in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("shards")
    AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="3MB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, folder)
    return folder


def answer(folder, knobs):
    with load(folder, **knobs) as llm:
        return llm.chat(QUESTION, **GREEDY)


@pytest.mark.parametrize("kind", list(KINDS)[:2])
def test_ctrl_c_while_loading_leaves_nothing(shards, monkeypatch, kind):
    knobs, expected = KINDS[kind], answer(shards, KINDS[kind])
    steps = itertools.cycle([1, 3, 6])

    def fail():
        with monkeypatch.context() as patch:
            patch.setattr(transformers_logging, "_tqdm_hook", CtrlC(next(steps)))
            return refused(shards, **knobs)

    assert {type(error) for error in check_nothing_left(shards, fail, knobs, expected)} == {KeyboardInterrupt}


def test_ctrl_c_after_layers_were_packed_ends_their_thread_too(demo, monkeypatch):
    knobs = {**KINDS["adapter over streamed layers"], "disk_layers": 2}
    expected = answer(demo, knobs)

    def interrupt(*_):
        assert "qwen-vram disk reader" in held()[1]
        raise KeyboardInterrupt

    def fail():
        with monkeypatch.context() as patch:
            patch.setattr(loader, "add_adapter", interrupt)
            return refused(demo, **knobs)

    check_nothing_left(demo, fail, knobs, expected)


@pytest.mark.parametrize("broken", ["missing", "cut short"])
def test_a_broken_shard_leaves_nothing(shards, tmp_path, broken):
    folder = shutil.copytree(shards, tmp_path / "copy")
    knobs = KINDS["nf4, all of compact"]
    expected = answer(folder, knobs)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()

    def fail():
        if broken == "missing":
            shard.unlink()
        else:
            shard.write_bytes(whole[:-100])
        error = refused(folder, **knobs)
        shard.write_bytes(whole)
        return error

    for error in check_nothing_left(folder, fail, knobs, expected):
        assert isinstance(error, qv.CheckpointError)
        assert shard.name in str(error)


def test_a_plan_that_does_not_hold_leaves_nothing(demo, monkeypatch):
    knobs = KINDS["streamed from host and disk, cache on the host"]
    expected, verify = answer(demo, knobs), loader.check_plan

    def with_too_little_promised(llm):
        real = llm.plan.estimate
        llm._generations.prediction = lambda: replace(real, weights=real.weights - 5_000_000)
        return verify(llm)

    def fail():
        with monkeypatch.context() as patch:
            patch.setattr(loader, "check_plan", with_too_little_promised)
            return refused(demo, verify=True, **knobs)

    for error in check_nothing_left(demo, fail, knobs, expected):
        assert isinstance(error, qv.PlanNotHeldError)


# on a GPU

ON_GPU = {
    **KINDS,
    "plain": {},
    "cache on the host": {**ROOM, "kv_device": "host"},
    "int8 by tiles": {**ROOM, "weights": "int8", "dequantization": "tiled"},
    "int4 with compiled steps": {"weights": "int4", "lm_head": "int4", **ROOM, "cache": "static", "compiled": True},
}


def on_gpu():
    """Allocated, reserved and pinned bytes, and the process's bytes by the driver."""
    device = torch.device("cuda", 0)
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return allocated, reserved, pinned, process_bytes(device) or 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ON_GPU)
def test_on_a_gpu_twenty_times_leave_what_the_second_left(demo, kind):
    after = []
    for _ in range(20):
        with load(demo, **ON_GPU[kind]) as llm:
            assert llm.chat(QUESTION, **GREEDY)
            assert next(llm.stream(QUESTION, **GREEDY))
        del llm
        after.append(on_gpu())
    for first, last in zip(after[1], after[-1]):
        assert last <= first + SLACK, (after[1], after[-1])
    assert after[-1][0] <= after[1][0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(KINDS)[:2])
def test_on_a_gpu_ctrl_c_while_loading_leaves_nothing(shards, monkeypatch, kind):
    knobs, expected, steps = KINDS[kind], answer(shards, KINDS[kind]), itertools.cycle([1, 3, 6])
    before, errors = None, []
    for number in range(6):
        if number == 2:
            before = on_gpu()
        with monkeypatch.context() as patch:
            patch.setattr(transformers_logging, "_tqdm_hook", CtrlC(next(steps)))
            errors.append(refused(shards, **knobs))
    for first, last in zip(before, on_gpu()):
        assert last <= first + SLACK
    assert answer(shards, knobs) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [1, 8])
def test_on_a_gpu_threads_share_one_workspace(demo, threads):
    with load(demo, **ROOM) as llm:
        llm.chat(QUESTION, **GREEDY)
        alone = torch.cuda.memory_allocated()
        running = [threading.Thread(target=lambda: llm.chat(QUESTION, **GREEDY)) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert "".join(llm.stream(QUESTION, **GREEDY))
        assert torch.cuda.memory_allocated() <= alone + MIB
