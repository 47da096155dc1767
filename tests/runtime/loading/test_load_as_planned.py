"""`load()` plans as `plan()` does: what each refuses, the budget that each takes, and one plan for each load."""

import json
import re
from dataclasses import asdict

import pytest
import torch

import qwen_vram as qv
from qwen_vram.checkpoints import machine_file
from qwen_vram.checkpoints.adapters import keys
from qwen_vram.checkpoints.cpu_info import cpu_name
from qwen_vram.demo import ADAPTER
from qwen_vram.planning.search.search import Search
from qwen_vram.spec.machine import DEFAULT
from tests.runtime.loading.test_visible_gpus import FIRST, GIB, SECOND, SEVEN, Driver, cuda, drive  # noqa: F401

NO_SIZES = [
    0, -1, -8 * GIB, 8, 0.5, 8e9, True, False, "", " ", "0", "8", "GiB", "-8GiB", "8 apples", "lots", b"8GiB", [], (),
    {0: 0}, {0: ""}, {0: None}, {0: "-8GiB"}, {0: "8GiB", 1: "8"}, {-1: "8GiB"}, {"0": "8GiB"}, {True: "8GiB"},
    {None: "8GiB"}, {0.0: "8GiB"},
]  # fmt: skip
CALLS = {
    "load": lambda model, **given: qv.load(model, progress=False, **given),
    "load on the CPU": lambda model, **given: qv.load(model, device="cpu", progress=False, **given),
    "offload_map": qv.offload_map,
    "max_context": qv.max_context,
    "max_batch": qv.max_batch,
}


def refusal(call, model, **given):
    with pytest.raises(qv.UnitError) as caught:
        call(model, **given)
    return str(caught.value), caught.value.got


@pytest.fixture
def asked(monkeypatch):
    """The starting profile and the workload of every search."""
    asked, run = [], Search.run

    def counted(search, prefer):
        asked.append((search.start, search.workload))
        return run(search, prefer)

    monkeypatch.setattr(Search, "run", counted)
    return asked


# what is refused


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "a GPU"])
@pytest.mark.parametrize("name", CALLS)
def test_a_vram_that_is_no_size_is_the_same_error_everywhere(demo, name, gpu, request):
    if gpu:
        driver = Driver([24, 12])
        request.getfixturevalue("drive")(driver)
        request.getfixturevalue("cuda")(driver, [0, 1])
    elif name == "load" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for vram in NO_SIZES:
        text, got = refusal(qv.plan, demo, vram=vram)
        assert text.startswith("vram")
        assert f"got {got!r}" in text
        assert refusal(CALLS[name], demo, vram=vram) == (text, got)


@pytest.mark.parametrize("name", ["ram", "reserve"])
@pytest.mark.parametrize("size", [-1, 8, 0.5, "", "8", "lots", True, {}, {0: "8GiB"}], ids=repr)
def test_other_sizes_that_are_none_are_the_same_error_too(demo, name, size):
    text = refusal(qv.plan, demo, **{name: size})
    assert re.match(rf"{name} is (a bare number|not a size): got ", text[0])
    for call in ("load on the CPU", "offload_map") if name == "reserve" else CALLS:
        if call != "load" or not torch.cuda.is_available():
            assert refusal(CALLS[call], demo, **{name: size}) == text


# the budget


@pytest.mark.parametrize("given", [{"vram": {}}, {}], ids=str)
def test_without_a_gpu_all_take_what_the_host_has_now(demo, monkeypatch, given):
    if not given and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr("qwen_vram.planning.capacity.budget.available_ram", lambda: 300 * 2**20)
    planned = qv.plan(demo, **given)
    assert (planned.budget.vram, planned.budget.ram, planned.on_cpu) == (None, 300 * 2**20, True)
    with qv.load(demo, progress=False, **given) as llm:
        assert llm.plan == planned
    with qv.load(demo, device="cpu", vram="8GiB", progress=False) as llm:
        assert llm.plan == planned  # a size that the CPU has no use for
    assert set(qv.offload_map(demo, **given).values()) == {"cpu"}
    asked = {"max_new_tokens": 64, "profile": "default"}
    found = qv.max_batch(demo, **given, prompt_len=448, **asked)
    assert 0 < found == qv.max_batch(demo, {}, ram=300 * 2**20, prompt_len=448, **asked)
    with pytest.raises(qv.DoesNotFitError):
        qv.load(demo, progress=False, **given, prompt_len=448, **asked, batch_size=found + 1)


@pytest.mark.parametrize("free", [0, 2**-21, 2**-11, 2**-3], ids=["nothing", "512 bytes", "512 KiB", "128 MiB"])
def test_a_gpu_with_next_to_nothing_free_is_one_error(demo, drive, cuda, free):  # noqa: F811
    driver = Driver([24], free={f"GPU-{FIRST}": free})
    drive(driver)
    cuda(driver, [0])
    texts = []
    for call in (qv.plan, CALLS["load"]):
        with pytest.raises(qv.DoesNotFitError) as caught:
            call(demo)
        texts.append(str(caught.value))
        assert caught.value.budget_bytes == 0
    assert texts[0] == texts[1]


# one plan


@pytest.mark.parametrize(
    "knobs", [{}, {"profile": "default"}, {"weights": "nf4", "adapter": True}, {"prefer": "memory"}], ids=str
)
def test_a_load_plans_once(demo, asked, knobs):
    knobs = {**knobs, "adapter": ADAPTER} if "adapter" in knobs else knobs
    planned = qv.plan(demo, vram={}, ram="8GiB", **knobs)
    if "adapter" in knobs:
        pytest.importorskip("peft")
    with qv.load(demo, device="cpu", ram="8GiB", progress=False, **knobs) as llm:
        assert llm.plan == planned
    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_a_load_resolves_and_reads_an_adapter_on_the_hub_once(demo, monkeypatch):
    pytest.importorskip("peft")
    resolved, read = [], []
    monkeypatch.setattr(
        "qwen_vram.checkpoints.adapters.folder.hub_snapshot", lambda repo: resolved.append(repo) or ADAPTER
    )
    headers = keys.read_header
    monkeypatch.setattr(keys, "read_header", lambda path: read.append(path) or headers(path))
    with qv.load(demo, adapter="someone/adapter", device="cpu", progress=False) as llm:
        assert llm.plan.adapter == "someone/adapter"
        assert "adapter='someone/adapter'" in llm.plan.call
        assert llm.chat("What is 12 + 30?", max_new_tokens=2)
    assert resolved == ["someone/adapter"]
    assert read == [ADAPTER / "adapter_model.safetensors"]


class Loads:
    """Plans that `load()` made for GPUs that are not here: it is stopped before it touches one."""

    def __init__(self, monkeypatch):
        self.made = []
        monkeypatch.setattr("qwen_vram.runtime.loading.load.check", self._stop)

    def _stop(self, chosen, backend, device):
        self.made.append(chosen)
        raise qv.BackendUnavailableError("stopped by the test", backend="test")

    def __call__(self, model, **asked):
        before = len(self.made)
        with pytest.raises(qv.BackendUnavailableError, match="stopped by the test"):
            qv.load(model, progress=False, **asked)
        assert len(self.made) == before + 1
        return self.made[-1]


@pytest.fixture
def planned_by_load(monkeypatch):
    return Loads(monkeypatch)


@pytest.fixture
def measured(monkeypatch):
    """A machine with one GPU whose CPU was measured, under a name."""

    def place(host):
        rates = {"host_product_rate": 100_000_000_000, "host_4bit_rate": 100_000_000_000}
        machine = DEFAULT._replace(
            source="measured", pinned_copy_rate=25_000_000_000, host=host, host_bandwidth=1, **rates
        )
        machine_file.store(machine)

    yield place
    machine_file.reset()


TIGHT = {"vram": "3GiB", "ram": "64GiB", "weights": "nf4", "prefer": "speed", "prompt_len": 2_000}


@pytest.fixture
def one_gpu(drive, cuda):  # noqa: F811
    driver = Driver([24])
    drive(driver)
    cuda(driver, [0])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "no kernel"])
@pytest.mark.parametrize("host", ["this one", "", "Another CPU"])
def test_layers_compute_on_the_cpu_that_was_measured(
    one_gpu, measured, planned_by_load, asked, monkeypatch, host, kernel
):
    """A CPU of another name has other rates; one without the kernel streams, and is asked before the plan is made."""
    monkeypatch.setattr("qwen_vram.runtime.backends.bnb.kernel_library", lambda: object() if kernel else None)
    measured(f"{cpu_name()}, 8 cores" if host == "this one" else host and f"{host}, 8 cores")
    planned = qv.plan(SEVEN, **TIGHT)
    loaded = planned_by_load(SEVEN, **TIGHT)
    assert len(asked) == 2
    assert (planned.profile.host_layers > 0) is (host != "Another CPU")
    assert (loaded.profile.host_layers > 0) is (host != "Another CPU" and kernel)
    assert loaded.profile.streamed_layers > 0
    if kernel:
        assert loaded == planned
    elif host != "Another CPU":
        assert loaded == qv.plan(SEVEN, **TIGHT, host_layers=0)


def test_layers_that_another_packages_backend_cannot_compute_stream(
    one_gpu, measured, planned_by_load, asked, monkeypatch
):
    class Plugged:
        name = "plugged"

    measured("")
    monkeypatch.setattr("qwen_vram.runtime.loading.preflight.get_backend", lambda name: Plugged())
    loaded = planned_by_load(SEVEN, **TIGHT)
    assert len(asked) == 1
    assert loaded.profile.streamed_layers > 0 == loaded.profile.host_layers


def test_layers_that_the_caller_has_compute_are_refused_by_name(one_gpu, monkeypatch):
    monkeypatch.setattr("qwen_vram.runtime.backends.bnb.kernel_library", lambda: None)
    with pytest.raises(qv.BackendUnavailableError, match="host_layers=2 with weights='nf4'"):
        qv.load(SEVEN, **TIGHT, streamed_layers=28, host_layers=2)


# old GPUs

OLD, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)
CARDS = {
    "an old one": ([OLD], None, {"vram": "20GiB"}),
    "what it has free": ([OLD], None, {}),
    "the old one of two": ([OLD, HOPPER], [1, 0], {"vram": {1: "20GiB"}}),
    "the new one of two": ([OLD, HOPPER], [0, 1], {"vram": {1: "20GiB"}}),
    "both": ([OLD, HOPPER], None, {"vram": {0: "20GiB", 1: "20GiB"}}),
    "the oldest of new ones": ([AMPERE, HOPPER], None, {"vram": {0: "20GiB", 1: "20GiB"}}),
    "a new one": ([HOPPER], None, {"vram": "20GiB"}),
}


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("torch_runs", [False, True], ids=["by the driver", "by torch"])
def test_a_plan_is_for_the_kernels_of_the_gpus_here(drive, cuda, planned_by_load, monkeypatch, name, torch_runs):  # noqa: F811
    generations, order, given = CARDS[name]
    driver = Driver([24] * len(generations), generations=generations)
    drive(driver)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    order = list(order or range(len(generations)))
    if order != sorted(order) and not torch_runs:
        driver.cards.reverse()
        order.reverse()
    if torch_runs:
        cuda(driver, order)
    planned = qv.plan(SEVEN, ram="64GiB", **given)
    cuda(driver, order)
    loaded = planned_by_load(SEVEN, ram="64GiB", **given)
    is_old = name in ("an old one", "what it has free", "the old one of two", "both")
    assert planned.profile.attention == ("sdpa" if is_old else "fused")
    assert planned.profile == loaded.profile
    assert planned.budget.capability == loaded.budget.capability
    assert planned.steps == loaded.steps
    line = "compute capability 7.5 is below 8.0 (Ampere): attention='sdpa', fp16 in place of bf16, in the same size"
    for text in (str(planned), planned._repr_html_().replace("&#x27;", "'"), str(qv.Plan.from_dict(planned.to_dict()))):
        assert (line in text) is is_old
    assert ("sdpa attention" in planned.steps[0].change) is is_old


def test_the_inverse_questions_are_for_the_same_kernels(drive):  # noqa: F811
    asked = {"weights": "nf4", "kv_cache": "bf16", "kv_device": "device", "streamed_layers": 0, "max_new_tokens": 16}
    asked |= {"prefill_chunk_size": 1024}
    least = {}
    for generation in (OLD, HOPPER):
        drive(Driver([24], generations=[generation]))
        least[generation] = qv.min_vram(SEVEN, prompt_len=3_000, **asked)
        smallest = qv.plan(SEVEN, vram=least[generation], ram="64GiB", prompt_len=3_000, **asked)
        assert smallest.estimate.needed_bytes <= least[generation]
    assert least[OLD] > least[HOPPER]  # a mask for every chunk, and heads that are expanded
    for generation, batches in ((OLD, 0), (HOPPER, 1)):
        drive(Driver([24], generations=[generation]))
        assert qv.max_batch(SEVEN, least[HOPPER], ram="64GiB", prompt_len=3_000, **asked) == batches


def test_what_the_caller_asks_of_an_old_gpu_stays(drive):  # noqa: F811
    drive(Driver([24], generations=[OLD]))
    asked = {"vram": "20GiB", "ram": "64GiB"}
    assert qv.plan(SEVEN, **asked, attention="fused").profile.attention == "fused"
    plain = qv.plan(SEVEN, **asked, profile="int4-flash")
    assert plain.profile == qv.PROFILES["int4-flash"]
    assert "compute capability 7.5 is below 8.0 (Ampere): fp16 in place of bf16, in the same size" in str(plain)
    assert "Ampere" not in str(qv.plan(SEVEN, **asked, profile="default", weights="fp16"))


@pytest.mark.parametrize(
    "given", [{"vram": "20GiB"}, {"vram": {3: "20GiB"}}, {"vram": {}}], ids=["no driver", "not here", "no GPU"]
)
def test_a_gpu_that_is_not_here_is_planned_as_a_new_one(drive, given):  # noqa: F811
    mute = ("nvmlInit",) if given["vram"] == "20GiB" else ()
    drive(Driver([24], generations=[OLD], mute=mute))
    planned = qv.plan(SEVEN, ram="64GiB", **given)
    assert planned.budget.capability is None
    assert planned.profile.attention == "fused"
    assert "Ampere" not in str(planned)


def test_an_old_gpus_plan_is_the_same_after_json(drive):  # noqa: F811
    drive(Driver([24, 24], generations=[OLD, OLD]), f"GPU-{SECOND}")
    planned = qv.plan(SEVEN, vram="20GiB", ram="64GiB")
    again = qv.Plan.from_dict(json.loads(json.dumps(planned.to_dict())))
    assert again.budget == planned.budget
    assert again.budget.capability == OLD
    before = {name: value for name, value in asdict(planned.budget).items() if name != "capability"}
    data = {**planned.to_dict(), "budget": before}  # as a version without it wrote
    assert qv.Plan.from_dict(data).budget.capability is None
    for broken in ("7.5.1", [7], 7, {"major": 7}):
        with pytest.raises(qv.ConfigError, match="this is no plan"):
            qv.Plan.from_dict({**data, "budget": {**before, "capability": broken}})
