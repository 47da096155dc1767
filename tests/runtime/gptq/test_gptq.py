"""GPTQ by the real library: made, loaded as stored, in AutoGPTQ's clothes, in AWQ's layout, merged, and refused."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_vram as qv
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.demo import ADAPTER
from qwen_vram.demo.tasks import SKILL, examples
from qwen_vram.lora.gptq import dequantized
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.backends.gptq import KERNEL
from qwen_vram.runtime.gptq import process as gptq_process
from qwen_vram.runtime.measure import weight_storages
from tests.helpers.command import qwen_vram
from tests.helpers.forked import Forked, python
from tests.helpers.gptq_files import as_auto_gptq, as_awq, as_plain, change_config

QUESTION, ANSWER = "What is 12 + 30?", "12 + 30 = 42"
TEXTS = ["one sample", "and another one"]


def load(folder, **knobs):
    return qv.load(folder, profile="default", device="cpu", prompt_len=600, progress=False, **knobs)


def bytes_of(llm):
    """Real bytes, held against the prediction and the report."""
    real = sum(weight_storages(llm.model, get_backend(llm.plan.profile.weights)).values())
    assert real == llm.plan.estimate.weights == llm.report().measured["weights"]
    return real


def right(llm, *categories, count=12):
    """How many of the answers are right, in one batch: each step decodes all matrices, however many rows there are."""
    asked = [one for name in categories for one in examples(name, "held_out", seed=3, count=count)]
    chats = [[{"role": "user", "content": one.prompt}] for one in asked]
    prompts = [llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    answers = llm.generate(prompts, do_sample=False, max_new_tokens=64)
    return sum(answer == one.answer for answer, one in zip(answers, asked))


def refused(error, text, call):
    with pytest.raises(error, match=text) as caught:
        call()
    return caught.value


# made and loaded


def test_it_loads_with_no_knob_and_takes_the_bytes_that_were_counted(demo, gptq_demo):
    before = dict(os.environ)
    with load(gptq_demo) as llm:
        assert bytes_of(llm) == qv.estimate_vram(demo, weights="gptq-int4").weights
        assert llm.plan.profile.weights == "gptq"
        assert llm.chat(QUESTION, do_sample=False) == ANSWER
        assert right(llm, "math", "code", "chinese") == 3 * 12
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert changed <= {"TORCHINDUCTOR_CACHE_DIR", "PYTEST_CURRENT_TEST"}


@pytest.mark.full  # `make test` has 8 bits and several files of a merge
@pytest.mark.parametrize(("bits", "group_size"), [(8, 128), (4, 32)])
def test_other_bits_and_groups(demo, gptqmodel, calibration, tmp_path, bits, group_size):
    out = tmp_path / "out"
    report = qv.quantize_gptq(
        demo, out, calibration=calibration[:5], bits=bits, group_size=group_size, device="cpu",
        max_shard_size="2MB", progress=False,
    )  # fmt: skip
    assert report.weights == f"gptq-int{bits}"
    assert len(report.files) > 1
    assert {path.name for path in out.glob("*.safetensors")} == set(report.files)
    with load(out) as llm:
        assert bytes_of(llm) == report.total_bytes
        if group_size == 128:
            assert report.total_bytes == qv.estimate_vram(demo, weights=f"gptq-int{bits}").weights
        assert llm.chat(QUESTION, do_sample=False) == ANSWER


DROPPED = """
import gc, sys, weakref
import qwen_vram as qv

def load(folder, adapter):
    return qv.load(folder, progress=False, **({"adapter": adapter} if adapter else {}))

for asked in zip(sys.argv[1::2], sys.argv[2::2]):
    llm = load(*asked)
    first = weakref.ref(llm.model)
    llm = load(*asked)
    gc.collect()
    second = weakref.ref(llm.model)
    del llm
    gc.collect()
    print(first() is None, second() is None)
"""


@pytest.mark.parametrize(
    "kinds",
    [
        ["gptq with an adapter", "awq"],
        *(pytest.param([kind], marks=pytest.mark.full) for kind in ("awq", "gptq with an adapter", "gptq", "adapter")),
    ],
    ids=str,
)
def test_the_first_model_of_a_process_is_collected_once_it_is_dropped(demo, gptq_demo, awq_demo, kinds):
    folders = {"awq": awq_demo, "adapter": demo}
    asked = [(folders.get(kind, gptq_demo), ADAPTER if "adapter" in kind else "") for kind in kinds]
    result = python(DROPPED, *(word for pair in asked for word in pair))
    assert result.stdout.split() == ["True", "True"] * len(kinds), result.stderr


def test_the_folder_says_nothing_of_this_machine(gptq_demo):
    names = {path.name for path in gptq_demo.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {path.name for path in gptq_demo.parent.iterdir()} - {gptq_demo.name}
    config = json.loads((gptq_demo / "config.json").read_text())
    assert (config["quantization_config"]["bits"], config["quantization_config"]["group_size"]) == (4, 128)
    assert "/" not in json.dumps(config).replace("https://github.com/modelcloud/gptqmodel", "")


def test_matrices_are_decoded_as_the_library_decodes_them(gptq_demo):
    tensors = load_file(gptq_demo / "model.safetensors")
    with load(gptq_demo) as llm:
        for name in ("model.layers.0.mlp.down_proj", "model.layers.4.self_attn.k_proj"):
            module = llm.model.get_submodule(name)
            parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            ours = dequantized(parts, 4, 32, 96)
            assert ours.dtype == torch.float32
            assert torch.equal(ours.half(), module.dequantize_weight().T[32:96].half())


def test_the_checkpoint_loads_with_plain_transformers(gptq_demo):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map={'': 'cpu'})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__module__)"
    )
    run = python(code, gptq_demo, env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"})
    assert run.stdout.splitlines()[-1].startswith("gptqmodel."), run.stderr


# other libraries' checkpoints


def logits(folder, **knobs):
    with load(folder, **knobs) as llm:
        size = bytes_of(llm)
        with torch.inference_mode():
            return llm.model(torch.arange(5, 60)[None]).logits, size


@pytest.mark.parametrize("shards", [1, 2])
def test_auto_gptqs_names_settings_and_biases(gptq_demo, tmp_path, shards):
    folder = as_auto_gptq(gptq_demo, tmp_path / "auto", shards=shards)
    assert not {path.name for path in folder.iterdir()} & {"model.safetensors", "model.safetensors.index.json"}
    expected, size = logits(gptq_demo)
    found, same = logits(folder)
    assert torch.equal(found, expected)
    assert same == size == qv.estimate_vram(folder).weights


def test_awq_in_its_own_layout(gptq_demo, awq_demo, tmp_path):
    """The same codes, so the same weights; 4 bytes a column less, and a sum in another order.

    How far two orders of bf16 sums are apart depends on the CPU. Both are therefore held against the same weights in
    float32: AWQ's logits are no further from those than twice GPTQ's.
    """
    expected, size = logits(gptq_demo)
    found, less = logits(awq_demo)
    columns = 5 * (6 * 256 + 768)
    assert less == size - 4 * columns
    exact, _ = logits(as_plain(gptq_demo, tmp_path / "plain"), weights="fp32")
    errors = [(one.float() - exact).abs() for one in (found, expected)]
    assert errors[0].mean() < 2 * errors[1].mean() < 0.04 * exact.abs().mean()
    assert errors[0].max() < 2 * errors[1].max()
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_auto_gptq_is_a_name_for_it(demo, gptq_demo, caplog):
    for knobs in ({"backend": "auto-gptq"}, {"weights": "autogptq"}):
        caplog.clear()
        assert qv.estimate_vram(gptq_demo, **knobs).profile.weights == "gptq"
        assert qv.estimate_vram(demo, **knobs).profile.weights == "gptq-int4"
        assert "auto-gptq does not import under transformers 5; GPTQModel reads its checkpoints" in caplog.text
    with load(gptq_demo, backend="auto-gptq") as llm:
        assert llm.chat(QUESTION, do_sample=False) == ANSWER
    refused(
        qv.UnknownNameError, "unknown backend 'bnb'; choose from gptq, gptqmodel", lambda: load(demo, backend="bnb")
    )


def test_another_kernel_by_name(gptq_demo, monkeypatch):
    monkeypatch.setenv(KERNEL, "torch")
    with load(gptq_demo) as llm:
        assert type(llm.model.model.layers[0].mlp.up_proj).__name__ == "TorchLinear"
    monkeypatch.setenv(KERNEL, "cuda")
    refused(
        qv.UnknownNameError, f"unknown kernel in {KERNEL} 'cuda'; choose from auto, .*torch", lambda: load(gptq_demo)
    )


@pytest.mark.parametrize("kind", ["gptq", pytest.param("awq", marks=pytest.mark.full)])
def test_an_adapter_runs_beside_it(request, kind):
    pytest.importorskip("peft")
    with load(request.getfixturevalue(f"{kind}_demo"), adapter=ADAPTER) as llm:
        bytes_of(llm)
        assert right(llm, SKILL) >= 10


def test_an_adapter_beside_awq_gives_what_it_gives_beside_gptq(gptq_demo, awq_demo):
    """The same weights, up to sums in another order: less than a tenth of what the adapter changes."""
    pytest.importorskip("peft")
    found, expected = (logits(folder, adapter=ADAPTER)[0].float() for folder in (awq_demo, gptq_demo))
    without, _ = logits(gptq_demo)
    changed = (expected - without.float()).abs()
    assert (found - expected).abs().mean() < 0.1 * changed.mean()
    assert (found - expected).abs().max() < changed.max()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "kernel", "dtype"),
    [("gptq", "TritonV2Linear", torch.bfloat16), ("awq", "AwqGEMMTritonLinear", torch.float16)],
)
def test_on_a_gpu_it_takes_the_bytes_that_were_counted(gptq_demo, tmp_path, kind, kernel, dtype):
    folder = gptq_demo if kind == "gptq" else as_awq(gptq_demo, tmp_path / "awq")
    knobs = {"embeddings": "host", "attention": "fused", "cache": "preallocated", "prompt_len": 600}
    with qv.load(folder, profile="default", device="cuda", progress=False, **knobs) as llm:
        bytes_of(llm)
        assert llm.model.dtype == dtype
        linear = llm.model.model.layers[0].mlp.up_proj
        assert (type(linear).__name__, linear.qweight.device.type) == (kernel, "cuda")
        assert llm.report().measured["load_peak"] <= llm.plan.estimate.load_peak
        assert right(llm, "math") == 12


@pytest.mark.gpu
def test_on_a_gpu_it_is_made_as_well(demo, gptqmodel, calibration, tmp_path):
    qv.quantize_gptq(demo, tmp_path / "out", calibration=calibration, device="cuda", progress=False)
    with load(tmp_path / "out") as llm:
        assert right(llm, "math") == 12


# merged


@pytest.fixture
def in_fp16(demo, tmp_path_factory):
    """The bundled checkpoint in float16."""
    folder = tmp_path_factory.mktemp("fp16") / "fp16"
    shutil.copytree(demo, folder)
    tensors = {name: tensor.half() for name, tensor in load_file(demo / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, dtype="float16")
    return folder


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.full)])
def test_a_merge_ends_in_gptq_with_its_proof(demo, in_fp16, gptqmodel, calibration, tmp_path, bits):
    """In several files. What is not quantized, biases too, stays what it is in float16."""
    out, weights = tmp_path / "merged", f"gptq-int{bits}"
    skill = ["\n".join(f"{one.prompt}\n{one.answer}" for one in examples(SKILL, "train", seed=1, count=24))]
    report = qv.merge_lora_then_quantize(
        in_fp16, ADAPTER, out, quantize=weights, calibration=calibration[:1] + skill, device="cpu",
        max_shard_size="2MB", progress=False,
    )  # fmt: skip
    assert {module.format for module in report.modules} == {weights}
    assert len(report.modules) == 35
    assert all(0.9 < module.share < 1.1 for module in report.modules)
    assert json.loads((out / "merge_report.json").read_text()) == json.loads(report.to_json())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    with load(out) as llm:
        assert bytes_of(llm) == report.total_bytes == qv.estimate_vram(demo, weights=weights).weights
        assert right(llm, SKILL) >= 10
    files = list(out.glob("*.safetensors"))
    assert len(files) > 1
    made = {name: tensor for file in files for name, tensor in load_file(file).items()}
    kept = {name: tensor for name, tensor in load_file(in_fp16 / "model.safetensors").items() if name in made}
    assert len(kept) == 3 + 3 * 5 + 2 * 5
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())


# refused


@pytest.mark.parametrize("weights", ["gptq-int4", "gptq-int8"])
def test_quantizing_on_load_is_refused_with_the_command(untied, weights):
    text = (
        f"weights='{weights}': GPTQ's codes cannot be made of a 16-bit checkpoint while it loads.*: qwen-vram quantize "
        f"MODEL OUT --weights {weights} --calibration texts.txt, or qv.quantize_gptq\\(MODEL, OUT, calibration=texts, "
        f"bits={weights[-1]}\\); then load OUT"
    )
    assert refused(qv.NotSupportedError, text, lambda: load(untied, weights=weights)).knob == "weights"


@pytest.mark.parametrize("missing", ["gptqmodel", "optimum"])
def test_a_missing_library_is_named_with_the_install_line(untied, tmp_path, monkeypatch, missing):
    for name in ("gptqmodel", "optimum"):
        monkeypatch.setitem(sys.modules, name, None)
    if missing == "optimum":
        monkeypatch.setitem(sys.modules, "gptqmodel", json)  # any module that has a spec
    text = rf'needs {missing}.* not installed; run: pip install "qwen-vram\[gptq\]" \(auto-gptq does not import'
    calls = (
        lambda: qv.quantize_gptq(untied, tmp_path / "out", calibration=TEXTS),
        lambda: get_backend("awq").check(qv.Profile(weights="awq"), torch.device("cpu")),
    )
    for call in calls:
        assert refused(qv.BackendUnavailableError, text, call).install == 'pip install "qwen-vram[gptq]"'
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_quantized_too(gptq_demo):
    architecture = replace(resolve_model(gptq_demo)[1], stored_head=True)
    text = "lm_head='gptq' with weights='gptq': a head that gptq quantized too is not loaded by transformers"
    refused(qv.NotSupportedError, text, lambda: qv.plan(architecture, vram={}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"dynamic": {"+:.*down.*": {"bits": 8}}},
            r"bits or groups of their own for some modules \('dynamic'\) by its quant",
        ),
        ({"checkpoint_format": "marlin"}, "its codes in the layout 'marlin' .* in the layout gptq or gptq_v2"),
        (
            {"bits": 5},
            "codes of 5 bits by its .* use a checkpoint of GPTQ with one setting for all, 2 or 3 or 4 or 8 bits",
        ),
        ({"quant_method": "awq", "checkpoint_format": "gemv"}, "its codes in the layout 'gemv' .* in the layout gemm"),
    ],
    ids=str,
)
def test_settings_that_no_kernel_here_reads(gptq_demo, tmp_path, change, text):
    folder = tmp_path / "changed"
    shutil.copytree(gptq_demo, folder)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**settings, **change})
    refused(qv.CheckpointError, text, lambda: load(folder))


def write(path, text):
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        (None, "GPTQ needs sample texts; pass a list of them, or a file with one on each line"),
        ([], "no sample has any text"),
        (["a", "  "][1:], "no sample has any text"),
        (["a", 3], "sample 2 is a int, not a text"),
        ("nowhere.txt", "cannot read 'nowhere.txt' .*; pass a text file with one sample on each line"),
        (b"\xff\xfe", "cannot read .*samples.jsonl"),
        (b'"a"\n{', "has a line that is not JSON"),
        (b'"a"\n{"body": "b"}', "sample 2 is a NoneType, not a text"),
    ],
)
def test_calibration_that_is_none(untied, tmp_path, calibration, text):
    if isinstance(calibration, bytes):
        calibration = write(tmp_path / "samples.jsonl", calibration)
    out = tmp_path / "new" / "out"
    error = refused(qv.WorkloadError, text, lambda: qv.quantize_gptq(untied, out, calibration=calibration))
    assert error.name == "calibration"
    assert not out.parent.exists()


def test_samples_are_read_line_by_line(tmp_path):
    from qwen_vram.runtime.gptq.sample_texts import calibration_texts

    assert calibration_texts(write(tmp_path / "a.txt", "一\n\ntwo three\n".encode())) == ["一", "two three"]
    assert calibration_texts(str(write(tmp_path / "a.jsonl", b'"a\\nb"\n\n{"text": "c"}\n'))) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("knobs", "error", "text"),
    [
        ({"bits": 3}, qv.UnknownNameError, "unknown bits 3; choose from 4, 8"),
        ({"group_size": 100}, qv.UnknownNameError, "unknown group_size 100; choose from 32, 64, 128"),
        ({"max_shard_size": 4}, qv.UnitError, "max_shard_size is a bare number"),
        ({"device": "tpu"}, qv.UnknownNameError, "unknown device 'tpu'"),
    ],
)
def test_settings_that_are_none(untied, gptqmodel, tmp_path, knobs, error, text):
    refused(error, text, lambda: qv.quantize_gptq(untied, tmp_path / "out", calibration=TEXTS, **knobs))
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_cannot_be_quantized(gptq_demo, tmp_path):
    from tests.conftest import make_checkpoint

    def quantize(folder, **knobs):
        return lambda: qv.quantize_gptq(folder, tmp_path / "out", calibration=TEXTS, **knobs)

    refused(qv.CheckpointError, "is stored as 'gptq' already; pass the 16-bit checkpoint", quantize(gptq_demo))
    narrow = make_checkpoint(tmp_path / "narrow", intermediate_size=704)
    text = r"mlp.down_proj.weight' is 256 x 704: .* multiples of group_size, got group_size=128; use a smaller group"
    refused(qv.ConfigError, text, quantize(narrow))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    refused(
        qv.CheckpointError, "exists; choose another folder, or pass overwrite=True", quantize(narrow, group_size=64)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"narrow", "out"}


def test_merging_with_texts_that_are_missing_or_not_needed(untied, adapter, tmp_path):
    def merge(**knobs):
        return lambda: qv.merge_lora_then_quantize(untied, adapter, tmp_path / "out", **knobs)

    refused(qv.WorkloadError, "GPTQ needs sample texts", merge(quantize="gptq-int4"))
    refused(qv.WorkloadError, "quantize='nf4' needs no sample texts, GPTQ does", merge(calibration=TEXTS))
    assert not list(tmp_path.iterdir())


# failures on the way


def test_a_crash_shows_the_end_of_the_log_and_leaves_nothing(untied, gptqmodel, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "1")  # what GPTQModel takes on two processors, and does not run with
    out = tmp_path / "out"
    error = refused(
        qv.QuantizationFailedError,
        "GPTQModel ended with exit status 1, and nothing was written; the end of its log:\n(.*\n)+ValueError: Virtual",
        lambda: qv.quantize_gptq(untied, out, calibration=["word " * 800], device="cpu", progress=False),
    )
    assert error.returncode == 1
    assert "model_loader:cpu" in error.log
    assert "\x1b" not in error.log
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_when_it_fails(untied, gptqmodel, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(untied, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(gptq_process, "_WORKER", "qwen_vram.no_such_module")
    with pytest.warns(UserWarning, match="calibration has .* tokens in 2 samples, fewer than the 768 columns"):
        with pytest.raises(qv.QuantizationFailedError, match="No module named qwen_vram.no_such_module"):
            qv.quantize_gptq(untied, out, calibration=TEXTS, device="cpu", overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("how", "written"),
    [
        (signal.SIGINT, 0),
        (signal.SIGKILL, 0),
        *(pytest.param(how, 5000, marks=pytest.mark.full) for how in (signal.SIGINT, signal.SIGKILL)),
    ],
    ids=["interrupted", "killed", "interrupted later", "killed later"],
)
def test_stopped_on_the_way_it_leaves_no_process_and_no_output(demo, gptqmodel, calibration, tmp_path, how, written):
    """As the process of GPTQModel starts, and behind its imports, after some bytes of its log."""
    texts = write(tmp_path / "texts.jsonl", "\n".join(map(json.dumps, calibration * 2)).encode())
    out = tmp_path / "out"
    command = ["quantize", demo, out, "--weights", "gptq-int4", "--calibration", texts]
    parent = Forked("from qwen_vram.cli import main\nmain()", *command)
    work = tmp_path / ".out.partial" / "work"
    log = work / "log.txt"
    while not (log.exists() and log.stat().st_size >= written and psutil.Process(parent.pid).children()):
        assert not parent.ended
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 1
    os.kill(parent.pid, how)
    parent.wait(timeout=60)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not out.exists()
    if how == signal.SIGINT:
        assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


# on the command line


GPTQ_INT4 = ("--weights", "gptq-int4")


def test_the_command_line_quantizes_with_a_file_of_samples(demo, gptq_demo, gptq_said):
    report = json.loads((gptq_said / "out").read_text())
    assert report["weights"] == "gptq-int4"
    assert report["total_bytes"] == qv.estimate_vram(gptq_demo).weights
    assert report["files"] == ["model.safetensors"]
    assert (gptq_said / "err").read_text() == ""


def test_the_command_line_refuses_samples_that_are_missing_or_not_needed(demo, gptqmodel, tmp_path):
    texts = write(tmp_path / "texts.jsonl", b'"one sample"\n')
    command = ["quantize", demo, tmp_path / "out"]
    without = qwen_vram(*command, *GPTQ_INT4)
    assert without.returncode == 2
    assert "calibration: GPTQ needs sample texts" in without.stderr
    other = qwen_vram(*command, "--weights", "nf4", "--calibration", texts)
    assert "weights='nf4' needs no sample texts" in other.stderr
    head = qwen_vram(*command, *GPTQ_INT4, "--lm-head", "gptq-int4")
    assert "GPTQ leaves the head in 16 bits; leave --lm-head out" in head.stderr
