"""Streamed layers that stay in the checkpoint's files: the resident model's tokens, read for every one of them."""

import gc
import json
import os
import random
import shutil
import signal
import struct
import threading
import time
import weakref
from functools import cache

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qwen_vram as qv
from qwen_vram.arithmetic.timing.bytes_moved import decode_floor_ms, disk_bytes, link_bytes
from qwen_vram.arithmetic.weights import SMALLEST_READ, block_bytes, streaming_slots
from qwen_vram.runtime.offload.blocks import DiskBlock
from qwen_vram.runtime.offload.disk_reader import Buffer, DiskReader
from qwen_vram.runtime.tensors import file_extents as image
from qwen_vram.runtime.tensors.file_extents import Extent, FileExtents, WeightsFile
from qwen_vram.spec.catalog import find
from qwen_vram.spec.machine import DEFAULT
from qwen_vram.spec.workload import Workload
from tests.conftest import make_checkpoint
from tests.helpers.tiers import thinned
from tests.runtime.offload.test_streaming import (
    GREEDY,
    PROMPTS,
    check_after_broken_forwards,
    load,
    logits,
    resident_layers,
    run_layer,
    tokens,
)
from tests.runtime.offload.test_streaming_stored import NEW, ON_TOP

SEVEN = "Qwen2.5-7B-Instruct"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A call that gives a checkpoint in a format: the quantized copy, made once, or itself."""

    @cache
    def save(model, weights):
        if weights == "bf16":
            return model
        out = tmp_path_factory.mktemp("saved") / weights
        with load(model, weights=weights, lm_head=weights) as llm:
            llm.save_quantized(out, max_shard_size="1MB", progress=False)
        return out

    return save


@cache
def resident(folder):
    with load(folder) as llm:
        return logits(llm), tokens(llm, PROMPTS[:1], NEW), tokens(llm, PROMPTS[:3], NEW)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "qwen-vram disk reader"]


@pytest.fixture(autouse=True)
def no_reader_is_left():
    if readers():  # of a dropped model
        gc.collect()
    yield
    if readers():
        gc.collect()
    until = time.monotonic() + 10
    while readers() and time.monotonic() < until:
        time.sleep(0.01)
    assert readers() == []


# tokens and bytes


@pytest.mark.parametrize(
    *thinned(1, layers=[(1, 1), (3, 2), (5, 3), (5, 5), (4, 4), (5, 2)], weights=["bf16", "nf4", "nf4-plain", "int8"])
)
def test_logits_tokens_and_bytes_are_those_of_the_resident_model(saved, demo, weights, layers):
    streamed, on_disk = layers
    folder = saved(demo, weights)
    before, one, three = resident(folder)
    with load(folder, streamed_layers=streamed, disk_layers=on_disk) as llm:
        estimate, engine = llm.plan.estimate, llm._streamer
        for _ in range(3):
            assert torch.equal(logits(llm), before)
        assert torch.equal(tokens(llm, PROMPTS[:1], NEW), one)
        assert torch.equal(tokens(llm, PROMPTS[:3], NEW), three)
        assert llm.report().measured["weights"] == estimate.weights
        block = block_bytes(estimate.architecture, estimate.profile)
        away = [one for one in engine.blocks if isinstance(one, DiskBlock)]
        buffers = engine._reader._ring.buffers
        assert (len(away), len(buffers)) == (on_disk, min(on_disk, 2))
        assert {buffer.memory.nbytes for buffer in buffers} == {block}
        kept = [len(part) for one in away for part in one._parts.values() if isinstance(part, bytes)]
        read = [part.nbytes for one in away for part in one._parts.values() if isinstance(part, Extent)]
        assert max(kept) < SMALLEST_READ <= min(read)
        assert estimate.disk == sum(read)
        assert estimate.host == (streamed - on_disk + len(buffers)) * block + sum(kept)


@pytest.mark.parametrize(*thinned(1, model=["tied", "qwen3", "sharded"], weights=["nf4", "bf16"]))
def test_other_models_and_files_are_read_too(request, saved, model, weights):
    folder = saved(request.getfixturevalue(model), weights)
    with load(folder, streamed_layers=3, disk_layers=3) as llm:
        for _ in range(2):
            assert torch.equal(logits(llm), resident(folder)[0])


def test_tensors_may_begin_at_any_byte(demo, tmp_path):
    """Headers of any length, as other writers leave them; and every other tensor in a second file."""
    folder = shutil.copytree(demo, tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        entries, data = {"__metadata__": {"format": "pt" + "!" * (1 + number)}}, b""
        for name in list(tensors)[number::2]:
            raw = tensors[name].view(torch.uint8).numpy().tobytes()
            begin = len(data)
            entries[name] = {
                "dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [begin, begin + len(raw)]
            }  # fmt: skip
            data += raw
            weight_map[name] = f"part-{number}.safetensors"
        header = json.dumps(entries).encode()
        header += b" " * (8 - len(header) % 8 + 3)
        (folder / f"part-{number}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with load(folder, streamed_layers=5, disk_layers=5) as llm:
        assert any(
            part.offset % 2 for one in llm._streamer.blocks for part in one._parts.values() if type(part) is Extent
        )
        for _ in range(2):
            assert torch.equal(logits(llm), resident(demo)[0])


@pytest.mark.parametrize(("skipped", "even"), [("o_proj", True), ("model.layers.2.mlp", False)])
def test_modules_that_were_left_in_16_bits_are_read_as_they_are(untied, tmp_path, skipped, even):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head", skipped],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    transformers.AutoTokenizer.from_pretrained(untied).save_pretrained(tmp_path)
    with load(tmp_path, streamed_layers=3, disk_layers=3) as llm:
        for _ in range(2):
            assert torch.equal(logits(llm), resident(tmp_path)[0])
        parts = [part for one in llm._streamer.blocks for part in one._parts.values()]
        read = sum(part.nbytes for part in parts if isinstance(part, Extent))
        taken = sum(len(part) for part in parts if isinstance(part, bytes))
        taken += sum(buffer.memory.nbytes for buffer in llm._streamer._reader._ring.buffers)
        estimate = llm.plan.estimate
        assert (read, taken) == (estimate.disk, estimate.host) if even else read <= estimate.disk
        assert taken <= estimate.host


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_a_token_reads_a_disk_layer_once_and_loading_only_reads_ahead(saved, demo, monkeypatch, weights):
    folder, read = saved(demo, weights), []

    class Counting(WeightsFile):
        def read_into(self, target, offset):
            read.append(len(target))
            super().read_into(target, offset)

    monkeypatch.setattr("qwen_vram.runtime.tensors.mapped_checkpoint.WeightsFile", Counting)
    with load(folder, streamed_layers=4, disk_layers=4) as llm:
        one = llm.plan.estimate.disk // 4
        settle(llm)
        ahead = sum(read)  # buffers, and slots where they were ready
        assert 2 * one <= ahead <= 4 * one
        for _ in range(10):
            logits(llm)
            settle(llm)
        # A slot that waits for the disk keeps what it has, which may be used again.
        assert 10 * 2 * one <= sum(read) - ahead <= 10 * 4 * one + 2 * one


def forwards(llm, then=lambda: None):
    """So many that every disk layer is read again."""
    for _ in range(10):
        logits(llm)
    then()


def settle(llm):
    """Wait until the reader has read as far ahead as it may."""
    ring = llm._streamer._reader._ring
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with ring.changed:
            wanted = {(ring._next + step) % len(ring.images) for step in range(len(ring.buffers))}
            if {buffer.number for buffer in ring.buffers if buffer.ready} == wanted:
                return
        time.sleep(0.001)
    pytest.fail("the reader stands still")


def test_nothing_moves_from_step_to_step(demo):
    with load(demo, streamed_layers=5, disk_layers=4) as llm:
        engine = llm._streamer
        places = [one.memory.data_ptr() for one in (*engine.slots, *engine._reader._ring.buffers)]
        tokens(llm, PROMPTS[:3], 6)
        assert [one.memory.data_ptr() for one in (*engine.slots, *engine._reader._ring.buffers)] == places
        assert len(readers()) == 1


# what runs on top


@pytest.mark.parametrize("knobs", ON_TOP, ids=str)
def test_caches_chunks_and_tiles_work_as_without(saved, demo, knobs):
    answers = []
    for layers in (0, 4):
        knobs = {**knobs, "streamed_layers": layers, "disk_layers": layers}
        with load(saved(demo, "nf4"), batch_size=4, **knobs) as llm:
            answers.append(
                [llm.generate(prompts, max_new_tokens=NEW, **GREEDY) for prompts in (PROMPTS[3], PROMPTS[:3])]
            )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_an_adapter_stays_on_the_device(saved, untied, adapter, weights):
    pytest.importorskip("peft")
    folder = saved(untied, weights)
    with load(folder, adapter=adapter) as llm:
        expected = logits(llm)
    with load(folder, adapter=adapter, streamed_layers=3, disk_layers=3) as llm:
        for _ in range(2):
            assert torch.equal(logits(llm), expected)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights


@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_its_state_dict_is_what_the_files_hold(saved, demo, weights):
    folder = saved(demo, weights)
    with load(folder) as llm:
        expected = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    with load(folder, streamed_layers=5, disk_layers=4) as llm:
        logits(llm)
        found = llm.model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert torch.equal(logits(llm), resident(folder)[0])


@pytest.mark.parametrize("weights", ["nf4", "nf4-plain", "int8"])
def test_it_is_saved_again_as_it_was(saved, demo, tmp_path, weights):
    folder = saved(demo, weights)
    with load(folder, streamed_layers=3, disk_layers=3) as llm:
        llm.generate("hello", max_new_tokens=3, **GREEDY)
        llm.save_quantized(tmp_path / "again", max_shard_size="1MB", progress=False)
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


# what happens between


@pytest.mark.parametrize(*thinned(1, weights=["bf16", "nf4"], error=[RuntimeError, KeyboardInterrupt]))
def test_the_ring_is_right_after_a_forward_that_broke_off(saved, demo, weights, error):
    folder = saved(demo, weights)
    with load(folder, streamed_layers=4, disk_layers=3) as llm:
        check_after_broken_forwards(llm, resident(folder)[0], error)


@pytest.mark.parametrize("where", ["take", "passed"])
def test_the_ring_is_right_after_an_interrupt_of_its_own_work(demo, monkeypatch, where):
    real = getattr(DiskReader, where)
    with load(demo, streamed_layers=5, disk_layers=5) as llm:
        for number in range(5):

            def interrupted(self, nth, number=number):
                if nth == number:
                    raise KeyboardInterrupt
                return real(self, nth)

            with monkeypatch.context() as patch:
                patch.setattr(DiskReader, where, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    forwards(llm)
            assert torch.equal(logits(llm), resident(demo)[0])


def test_an_interrupt_while_the_disk_is_waited_for_leaves_the_ring_usable(demo, monkeypatch):
    with load(demo, streamed_layers=5, disk_layers=5) as llm:
        expected = logits(llm)
        settle(llm)
        slow, go = FileExtents.read_into, threading.Event()
        monkeypatch.setattr(FileExtents, "read_into", lambda self, target: go.wait(10) and slow(self, target))
        main = threading.main_thread().ident
        timer = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            forwards(llm, then=timer.join)
        go.set()
        assert torch.equal(logits(llm), expected)


@pytest.mark.parametrize("on_disk", [1, 2, 3, 5])
def test_layers_may_run_in_any_order(demo, on_disk):
    draw = random.Random(on_disk)
    with load(demo, streamed_layers=5, disk_layers=on_disk) as llm:
        for number in [draw.randrange(5) for _ in range(60)]:
            assert torch.equal(run_layer(llm, number), resident_layers(demo, "bf16")[number])


def test_two_models_do_not_disturb_each_other(saved, demo):
    folders = [demo, saved(demo, "nf4")]
    models = [load(folder, streamed_layers=5, disk_layers=count) for folder, count in zip(folders, (3, 5))]
    for _ in range(3):
        for folder, llm in zip(folders, models):
            assert torch.equal(logits(llm), resident(folder)[0])
    models[0].close()
    assert torch.equal(logits(models[1]), resident(folders[1])[0])
    models[1].close()


def test_a_file_that_became_shorter_is_named_in_the_forward_and_may_be_restored(demo, tmp_path):
    folder = shutil.copytree(demo, tmp_path / "copy")
    file, outer = folder / "layers.safetensors", folder / "outer.safetensors"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # What is resident on the CPU is mapped from its file, which must stay whole.
    weight_map = {name: file.name if ".layers." in name else outer.name for name in tensors}
    for one in (file, outer):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == one.name}, one, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole = file.read_bytes()
    with load(folder, streamed_layers=5, disk_layers=5) as llm:
        expected = logits(llm)
        os.truncate(file, len(whole) // 3)
        for _ in range(2):
            with pytest.raises(
                qv.CheckpointError, match=r"layers\.safetensors' ends at byte .* restore the file"
            ) as got:
                forwards(llm)
            assert got.value.path == str(file)
        file.write_bytes(whole)  # the same file, whole again
        for _ in range(2):
            assert torch.equal(logits(llm), expected)


def test_a_disk_that_fails_is_named_in_the_forward(demo, monkeypatch):
    with load(demo, streamed_layers=5, disk_layers=5) as llm:
        expected = logits(llm)
        with monkeypatch.context() as patch:
            patch.setattr(image.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(qv.CheckpointError, match=r"cannot read a disk layer from .*Input/output error; check"):
                forwards(llm)
        assert torch.equal(logits(llm), expected)


def test_a_file_that_is_replaced_or_deleted_is_still_read(demo, tmp_path):
    folder = shutil.copytree(demo, tmp_path / "copy")
    with load(folder, streamed_layers=5, disk_layers=5) as llm:
        expected = logits(llm)
        shutil.rmtree(folder)
        assert torch.equal(logits(llm), expected)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    data = random.Random(0).randbytes(1_000)
    (tmp_path / "file").write_bytes(data)
    real = os.preadv
    monkeypatch.setattr(image.os, "preadv", lambda file, rooms, offset: real(file, [rooms[0][:7]], offset))
    target = bytearray(990)
    WeightsFile(tmp_path / "file").read_into(memoryview(target), 5)
    assert target == data[5:995]


def test_closing_ends_the_thread_and_gives_everything_back_at_once(demo):
    gc.collect()
    open_before = os.listdir("/proc/self/fd")
    llm = load(demo, streamed_layers=5, disk_layers=4)
    model, _ = llm
    llm.generate("hello", max_new_tokens=3)
    engine = llm._streamer
    memory = [weakref.ref(one.memory) for one in (*engine.slots, *engine._reader._ring.buffers)]
    assert len(readers()) == 1
    gc.disable()
    try:
        engine.close()
        assert readers() == []
        assert not any(one() is not None for one in memory)
    finally:
        gc.enable()
    llm.close()
    with pytest.raises(qv.QwenVramError, match="this model is closed; load it again"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    del llm, model, engine
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(open_before)


def test_a_model_that_is_dropped_unclosed_ends_its_thread(demo):
    llm = load(demo, streamed_layers=5, disk_layers=4)
    memory = [weakref.ref(one.memory) for one in llm._streamer._reader._ring.buffers]
    thread = readers()[0]
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert not any(one() is not None for one in memory)


def test_a_thread_that_is_gone_is_said_and_not_waited_for(tmp_path):
    (tmp_path / "file").write_bytes(bytes(64))
    whole = FileExtents({0: Extent(WeightsFile(tmp_path / "file"), 0, 64)})
    reader = DiskReader([whole], [Buffer(torch.empty(64, dtype=torch.uint8), None)])
    reader.take(0)
    reader.close()
    with pytest.raises(qv.QwenVramError, match="the thread that reads disk layers is gone"):
        reader.take(0)


# refusals


def test_layers_that_are_quantized_on_load_are_in_no_file(demo):
    with pytest.raises(qv.NotSupportedError, match=r"disk_layers=2 with weights='nf4': .* in no file; quantize it "
                       r"once \(qwen-vram quantize MODEL OUT --weights nf4\) and load OUT") as caught:  # fmt: skip
        load(demo, weights="nf4", streamed_layers=3, disk_layers=2)
    assert caught.value.knob == "disk_layers"


def test_layers_in_another_dtype_are_refused_before_anything_is_loaded(demo, tmp_path):
    with pytest.raises(
        qv.NotSupportedError,
        match="disk_layers=1 with weights='fp32': a layer is stored as BF16 and runs in fp32; what",
    ):
        load(demo, weights="fp32", streamed_layers=3, disk_layers=1)
    folder = shutil.copytree(demo, tmp_path / "wide")
    wide = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(wide, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(qv.NotSupportedError, match="is stored as F32 and runs in bf16"):
        load(folder, streamed_layers=3, disk_layers=1)
    with load(folder, weights="fp32") as llm:
        expected = logits(llm)
    with load(folder, weights="fp32", streamed_layers=3, disk_layers=3) as llm:
        assert torch.equal(logits(llm), expected)


def test_counts_out_of_range():
    with pytest.raises(qv.WorkloadError, match="disk_layers must be a number of layers from 0, got -1"):
        qv.estimate_vram(SEVEN, streamed_layers=3, disk_layers=-1)
    with pytest.raises(qv.WorkloadError, match="disk_layers 4 is more than streamed_layers 3, of which it is a part"):
        qv.estimate_vram(SEVEN, streamed_layers=3, disk_layers=4)


# estimates and plans


def test_bytes_of_a_published_model():
    block, small = 466_115_584, 3 * 7_168 + 2 * 1_024  # two norms and the bias of q, those of k and v
    kept = qv.estimate_vram(SEVEN, streamed_layers=28)
    read = qv.estimate_vram(SEVEN, streamed_layers=28, disk_layers=20)
    assert (kept.host, kept.disk) == (28 * block, 0)
    assert (read.host, read.disk) == (10 * block + 20 * small, 20 * (block - small))
    assert (read.weights, read.needed_bytes, read.moments) == (kept.weights, kept.needed_bytes, kept.moments)
    assert "read from disk" in str(read)
    assert "read from disk" not in str(kept)
    assert json.loads(json.dumps(read.to_dict()))["disk"] == read.disk


def test_the_disk_sets_the_floor_of_a_token_unless_buffers_hold_all():
    for on_disk in (0, 1, 2, 3, 28):
        known = qv.estimate_vram(SEVEN, streamed_layers=28, disk_layers=on_disk)
        shape = known.architecture, known.profile, known.workload
        from_disk = known.disk if on_disk > 2 else 0
        assert disk_bytes(*shape) == from_disk
        expected = 1_000 * max(link_bytes(*shape) / DEFAULT.pinned_copy_rate, from_disk / DEFAULT.disk_read_rate)
        assert decode_floor_ms(*shape, machine=DEFAULT) == pytest.approx(expected)


def test_disk_layers_that_have_the_slots_to_themselves_stay_there():
    work = Workload(prompt_len=512, max_new_tokens=512)
    for computing, moves in ((24, True), (25, False)):
        profile = qv.Profile(weights="nf4", streamed_layers=28, disk_layers=3, host_layers=computing)
        assert streaming_slots(find(SEVEN), profile) == 3
        assert bool(disk_bytes(find(SEVEN), profile, work)) == bool(link_bytes(find(SEVEN), profile, work)) == moves


def quantized():
    """config.json of an NF4 copy of Qwen2.5-7B, as far as bytes go."""
    return {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "quantization_config": {
            "quant_method": "bitsandbytes", "llm_int8_skip_modules": [], "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        },
    }  # fmt: skip


def test_a_plan_keeps_as_many_streamed_layers_in_memory_as_fit():
    work = {"vram": "3GiB", "prompt_len": 2_000}
    plenty = qv.plan(quantized(), **work, ram="16GiB")
    assert plenty.profile.disk_layers == 0 < plenty.profile.streamed_layers
    tight = qv.plan(quantized(), **work, ram="2GiB")
    layers = tight.profile.disk_layers
    assert 2 < layers < tight.profile.streamed_layers == plenty.profile.streamed_layers
    assert tight.estimate.host <= tight.budget.ram
    assert any(f"disk_layers={layers}" in step.change for step in tight.steps)
    assert f"disk_layers={layers}" in tight.call
    assert tight.steps[-1].decode_floor_ms == pytest.approx(1_000 * tight.estimate.disk / DEFAULT.disk_read_rate)
    assert [where for name, where in tight.device_map.items() if "layers" in name].count("disk") == layers
    tiers = list(tight.placement.tiers.values())
    assert [tiers.count(tier) for tier in ("disk", "stream", "host")] == [
        layers, tight.profile.streamed_layers - layers, 1
    ]  # fmt: skip
    assert set(qv.plan(SEVEN, vram={}, ram="64GiB").placement.tiers.values()) == {"host"}
    one_less = tight.profile.replace(disk_layers=layers - 1)
    with pytest.raises(qv.DoesNotFitError, match="of host memory; 2.00 GiB are allowed") as caught:
        qv.plan(quantized(), profile=one_less, **work, ram="2GiB")
    assert caught.value.needed_bytes == caught.value.estimate.host > tight.budget.ram
    assert qv.plan(quantized(), profile=tight.profile, **work, ram="2GiB").estimate.host == tight.estimate.host
    assert qv.Plan.from_dict(json.loads(json.dumps(tight.to_dict()))).profile == tight.profile
    longer = qv.max_context(quantized(), "3GiB", ram="2GiB")
    assert qv.plan(quantized(), vram="3GiB", ram="2GiB", prompt_len=longer - 512).profile.disk_layers


@pytest.mark.parametrize(
    ("pinned", "ram", "allowed"), [({"embeddings": "host"}, "1GiB", "1.00"), ({}, "0.2GiB", "0.20")]
)
def test_a_plan_that_not_even_the_disk_saves_says_what_it_needs(pinned, ram, allowed):
    work = {"vram": "3GiB", "prompt_len": 2_000, **pinned}
    with pytest.raises(qv.DoesNotFitError, match=f"of host memory; {allowed} GiB are allowed") as caught:
        qv.plan(quantized(), **work, ram=ram)
    smallest = caught.value.estimate
    assert smallest.profile.disk_layers == smallest.profile.streamed_layers > 0
    assert caught.value.needed_bytes == smallest.host
    assert qv.plan(quantized(), **work, ram=smallest.host).profile == smallest.profile


def test_the_token_table_stays_on_the_gpu_where_the_host_has_no_room_for_it():
    work = {"vram": "3GiB", "prompt_len": 2_000}
    ample, short = (qv.plan(quantized(), **work, ram=ram) for ram in ("2GiB", "1GiB"))
    assert (ample.profile.embeddings, short.profile.embeddings) == ("host", "device")
    assert short.profile.disk_layers > ample.profile.disk_layers
    assert short.estimate.host <= short.budget.ram


def test_layers_that_are_made_while_loading_need_memory_and_plain_ones_come_from_the_files():
    """Where the host is too short for quantized layers, whole ones are read from the disk: slower, and nothing lost."""
    for model, budget in ((SEVEN, {"vram": "3GiB", "ram": "2GiB"}), ("Qwen3-14B", {"vram": {}, "ram": "6GiB"})):
        chosen = qv.plan(model, **budget, prompt_len=128)
        profile, layers = chosen.profile, chosen.estimate.architecture.num_hidden_layers
        assert (profile.weights, profile.lm_head, profile.streamed_layers) == ("bf16", None, layers)
        assert layers - 1 <= profile.disk_layers <= layers
        assert chosen.estimate.host <= chosen.budget.ram
        costs = [step.cost for step in chosen.steps]
        assert any(
            "read from the disk for every token; of a quantized copy (qwen-vram quantize)" in one for one in costs
        )
        assert "weights='bf16'" in "".join(step.change for step in chosen.steps[1:])
        assert qv.max_context(model, **budget) > 1_024
    with pytest.raises(
        qv.DoesNotFitError, match=r"once the checkpoint is quantized \(qwen-vram quantize\), its layers"
    ):
        qv.plan(SEVEN, vram="3GiB", ram="0.5GiB")
    assert qv.plan(SEVEN, vram="6GiB", ram="5GiB", weights="bf16").profile.disk_layers > 0


def test_plain_layers_are_on_the_disk_in_their_own_dtype_alone():
    plain = {name: value for name, value in quantized().items() if name != "quantization_config"}
    budget = {"vram": "6GiB", "ram": "5GiB"}
    for key, name, own in (("dtype", "float16", "fp16"), ("torch_dtype", "bfloat16", "bf16")):
        other = {"fp16": "bf16", "bf16": "fp16"}[own]
        assert qv.plan({**plain, key: name}, **budget, weights=own).profile.disk_layers > 0
        with pytest.raises(
            qv.DoesNotFitError, match=f"; in {own}, as the files hold them, layers can stay on the disk"
        ):
            qv.plan({**plain, key: name}, **budget, weights=other)


def test_what_the_caller_set_stays():
    with pytest.raises(qv.DoesNotFitError):
        qv.plan(quantized(), vram="3GiB", ram="2GiB", prompt_len=2_000, disk_layers=0)
    chosen = qv.plan(quantized(), vram="5GiB", ram="2GiB", streamed_layers=28).profile
    assert chosen.streamed_layers == 28 > chosen.disk_layers > 0
    chosen = qv.plan(quantized(), vram="5GiB", ram="16GiB", streamed_layers=28, disk_layers=9).profile
    assert (chosen.streamed_layers, chosen.disk_layers) == (28, 9)


def test_without_a_gpu_layers_are_resident_or_on_the_disk():
    chosen = qv.plan(quantized(), vram={}, ram="4GiB")
    assert 0 < chosen.profile.disk_layers == chosen.profile.streamed_layers < 28
    assert chosen.steps[-1].needed_bytes <= chosen.budget.ram < chosen.steps[-2].needed_bytes
    with pytest.raises(qv.DoesNotFitError, match="of host memory; 1.00 GiB are allowed"):
        qv.plan(quantized(), vram={}, ram="1GiB")
    assert qv.max_context(quantized(), {}, ram="4GiB", max_new_tokens=64) > 0


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_a_plan_without_memory_for_all_layers_is_loaded_and_runs(saved, tmp_path, weights):
    folder = saved(make_checkpoint(tmp_path, num_hidden_layers=12), weights)
    work = {"weights": weights, "prompt_len": 64, "max_new_tokens": 32}
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan(folder, vram={}, ram="1MiB", **work)
    smallest = caught.value
    assert smallest.estimate.profile.disk_layers == 11  # all twelve would have a third slot
    for ram in (smallest.needed_bytes, smallest.needed_bytes + 2**22):
        with qv.load(folder, device="cpu", ram=ram, **work, progress=False, verify=True) as llm:
            assert (llm.plan.profile.disk_layers < 11) == (ram > smallest.needed_bytes)
            assert torch.equal(logits(llm), resident(folder)[0])


def test_a_map_names_what_is_on_the_disk():
    where = qv.offload_map(SEVEN, vram="10GiB", ram="4GiB")
    layers = [place for name, place in where.items() if "layers" in name]
    assert {0, "cpu", "disk"} == set(layers)
    with pytest.raises(qv.DoesNotFitError, match="of host memory"):
        qv.offload_map(SEVEN, vram="10GiB", ram="4GiB", disk_layers=0)


def test_transformers_takes_such_a_map(untied, tmp_path):
    from transformers import AutoModelForCausalLM

    where = {**qv.offload_map(untied, layers_on_cpu=2), "model.layers.1": "disk"}
    where = {name: "cpu" if place == 0 else place for name, place in where.items()}
    model = AutoModelForCausalLM.from_pretrained(untied, device_map=where, offload_folder=tmp_path, dtype="bfloat16")
    with load(untied) as llm:
        assert torch.equal(logits(llm), model(**llm.tokenizer(PROMPTS[1], return_tensors="pt")).logits)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("streamed", "on_disk"), [(3, 3), (12, 5), (12, 12)])
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
def test_on_a_gpu_tokens_and_bytes_are_those_that_were_promised(saved, wide, weights, streamed, on_disk):
    folder = saved(wide, weights)
    before, one, three = resident(folder)
    torch.cuda.empty_cache()
    with load(folder, streamed_layers=streamed, disk_layers=on_disk, cache="preallocated", batch_size=4) as llm:
        promised, measured = llm.plan.estimate, llm.report().measured
        assert measured["weights"] == promised.weights
        assert measured["load_peak"] <= 1.01 * promised.load_peak + 2**21
        assert all(buffer.memory.is_pinned() for buffer in llm._streamer._reader._ring.buffers)
        for _ in range(3):
            assert torch.equal(logits(llm), before)
        assert torch.equal(tokens(llm, PROMPTS[:1], NEW), one)
        assert torch.equal(tokens(llm, PROMPTS[:3], NEW), three)
        report = llm.probe()
        promised, measured = report.estimate.peak_allocated, report.measured["peak_allocated"]
        assert measured == pytest.approx(promised, rel=0.01, abs=2**21)
    assert readers() == []


@pytest.mark.gpu
def test_on_a_gpu_the_ring_is_right_after_a_forward_that_broke_off(saved, wide):
    folder = saved(wide, "nf4")
    with load(folder, streamed_layers=12, disk_layers=8) as llm:
        check_after_broken_forwards(llm, resident(folder)[0], KeyboardInterrupt)


@pytest.mark.gpu
def test_on_a_gpu_nothing_grows_over_200_tokens(wide):
    with load(wide, streamed_layers=12, disk_layers=8) as llm:
        cache_of = llm.new_cache(max_length=300)
        ids = torch.ones(1, 64, dtype=torch.long, device="cuda")
        allocated = []
        with torch.inference_mode():
            for _ in range(200):
                ids = llm.model(input_ids=ids, past_key_values=cache_of).logits[:, -1:].argmax(-1)
                allocated.append(torch.cuda.memory_allocated())
        assert len(set(allocated[3:])) == 1
