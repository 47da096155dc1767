"""The faults. Each is a change of one line, and a test that fails with it."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        mechanism: What is wrong then.
        file: Below `qwen_vram/`.
        old, new: Text that is there once, and what takes its place.
        test: The test of `make test` that finds it, as pytest names it.
        before: The same test in the flat suite of 2026-11-30, before products were thinned; empty if the mechanism is
            newer.
    """

    mechanism: str
    file: str
    old: str
    new: str
    test: str
    before: str = ""


MUTATIONS = (
    Mutation(
        "bytes of storage formats",
        "spec/formats.py",
        "_CODE_TABLE = 16 * FP32.nbytes\n_NESTED",
        "_CODE_TABLE = 15 * FP32.nbytes\n_NESTED",
        "tests/arithmetic/test_measured_loader.py",
        "test_measured_loader.py",
    ),
    Mutation(
        "the allocator's replay",
        "arithmetic/replay/allocator.py",
        "else rest > self.unsplit:",
        "else rest > 2 * self.unsplit:",
        "tests/arithmetic/test_replay.py::test_a_rest_of_up_to_1_mib_stays_with_a_large_block",
        "test_replay.py::test_a_rest_of_up_to_1_mib_stays_with_a_large_block",
    ),
    Mutation(
        "activations",
        "arithmetic/replay/generation.py",
        "        product = self.take(inner)",
        "        product = self.take(inner // 2)",
        "tests/arithmetic/test_live_bytes.py::test_a_prompt_at_once",
        "test_replay.py::test_the_closed_form_and_the_replay_agree",
    ),
    Mutation(
        "bytes of the KV cache",
        "spec/kv_formats.py",
        "levels = _LEVEL_BYTES * (",
        "levels = 2 * (",
        "tests/arithmetic/test_measured_loader.py",
        "test_measured_loader.py",
    ),
    Mutation(
        "slots of streamed layers",
        "arithmetic/weights.py",
        "3 if pause else 2)",
        "2)",
        "tests/runtime/offload/test_streaming.py::test_resident_layers_and_slots_are_what_was_predicted",
        "test_streaming.py::test_resident_layers_and_slots_are_what_was_predicted",
    ),
    Mutation(
        "the margin of a session",
        "arithmetic/session.py",
        "_FRAGMENT = 0.04",
        "_FRAGMENT = 0.0",
        "tests/arithmetic/test_session.py::test_no_smaller_workload_needs_more_than_the_session",
        "test_session.py::test_no_smaller_workload_needs_more_than_the_session",
    ),
    Mutation(
        "the order of the search",
        "planning/search/savers.py",
        'Saver({"weights": "nf4", "dequantization": "tiled"}, "4-bit weights"),\n',
        "",
        "tests/planning/test_planning.py",
        "test_planning.py",
    ),
    Mutation(
        "refusals",
        "spec/rules/table.py",
        "lambda model: _computes(model) and FORMATS[model.profile.weights].has_outliers,",
        "lambda model: _computes(model) and FORMATS[model.profile.weights].bits == 3,",
        "tests/runtime/offload/test_host_layers.py::test_int8_is_refused_by_name",
        "test_host_layers.py::test_int8_is_refused_by_name",
    ),
    Mutation(
        "tiers of offloaded layers",
        "planning/search/offload_tiers.py",
        "        return streaming(layers - resident)\n",
        "        return streaming(layers)\n",
        "tests/planning/test_planning.py",
        "test_planning.py",
    ),
    Mutation(
        "the split over GPUs",
        "planning/capacity/gpu_split.py",
        "        if following is best:\n",
        "        if following is not None:\n",
        "tests/arithmetic/test_split.py",
        "test_split.py",
    ),
    Mutation(
        "config.json",
        "spec/config/reader.py",
        'key_value_heads = heads if given is None else self.size("num_key_value_heads")',
        "key_value_heads = heads",
        "tests/spec/test_architecture.py",
        "test_architecture.py",
    ),
    Mutation(
        "headers of safetensors files",
        "checkpoints/files/safetensors_header.py",
        "    if size != 8 + length + end:\n",
        "    if size < 8 + length + end:\n",
        "tests/runtime/loading/test_bad_input.py::test_a_shard_that_is_too_long",
        "test_bad_input.py::test_a_shard_that_is_too_long",
    ),
    Mutation(
        "files of a hub's repository",
        "checkpoints/hub/files.py",
        "    if (folder / AUTO_GPTQ_CONFIG).is_file():\n        single, index",
        "    if (folder / AUTO_AWQ_CONFIG).is_file():\n        single, index",
        "tests/checkpoints/test_quantized.py::test_auto_gptqs_own_names_are_found",
        "test_quantized.py::test_auto_gptqs_own_names_are_found",
    ),
    Mutation(
        "what an adapter keeps on the device",
        "checkpoints/adapters/kept_tensors.py",
        "if tensor.name in kept]",
        "if tensor.name not in kept]",
        "tests/lora/test_adapter_beside.py",
        "test_adapter_beside.py",
    ),
    Mutation(
        "the scale of a LoRA",
        "checkpoints/adapters/scaling.py",
        "return alpha / math.sqrt(rank) if settings.use_rslora",
        "return alpha / rank if settings.use_rslora",
        "tests/lora/test_lora_random.py::test_a_random_adapter",
        "test_lora_random.py::test_a_random_adapter",
    ),
    Mutation(
        "rounding of a merge",
        "lora/delta.py",
        "        if abs(math.frexp(scale)[0]) != 0.5:\n",
        "        if scale == 0:\n",
        "tests/lora/test_lora_random.py::test_a_random_adapter",
        "test_lora_random.py::test_a_random_adapter",
    ),
    Mutation(
        "the 4-bit codec of a merge",
        "lora/codecs/bnb_4bit.py",
        "quantize_blockwise(scales - offset, blocksize",
        "quantize_blockwise(scales, blocksize",
        "tests/lora/test_lora_quantize.py",
        "test_lora_quantize.py",
    ),
    Mutation(
        "tiles of 4-bit matrices",
        "runtime/linear/tiled.py",
        "torch.addmm(bias[start:end], x,",
        "torch.addmm(bias[: end - start], x,",
        "tests/runtime/linear/test_tiled_linear.py",
        "test_tiled_linear.py",
    ),
    Mutation(
        "outlier columns of int8",
        "runtime/linear/tiled_int8.py",
        "    if columns is None or not columns.numel():\n",
        "    if columns is not None:\n",
        "tests/runtime/linear/test_tiled_int8.py",
        "test_tiled_int8.py",
    ),
    Mutation(
        "packing of int4",
        "runtime/linear/int4_packing.py",
        "return codes[:, ::2] << 4 | codes[:, 1::2]",
        "return codes[:, 1::2] << 4 | codes[:, ::2]",
        "tests/runtime/linear/test_weight_only.py",
        "test_weight_only.py",
    ),
    Mutation(
        "int8 matrices scaled by row",
        "runtime/linear/int8_fp8.py",
        "scale[start:end] = _scale(rows, _LARGEST_INT8)",
        "scale[start:end] = _scale(rows, 64)",
        "tests/runtime/linear/test_weight_only.py",
        "test_weight_only.py",
    ),
    Mutation(
        "attention in parts",
        "runtime/attention/split_kv.py",
        "        sums = both\n",
        "        pass\n",
        "tests/runtime/attention/test_joined_attention.py",
        "test_joined_attention.py",
    ),
    Mutation(
        "the quantized cache",
        "runtime/kv_cache/quantized.py",
        "(most - least.float()) / self.stored.largest_code)",
        "(most - least.float()) / (self.stored.largest_code + 1))",
        "tests/runtime/kv_cache/test_quantized_cache.py",
        "test_quantized_cache.py",
    ),
    Mutation(
        "the slot that a layer computes with",
        "runtime/offload/streamer.py",
        "        block.bind(slot.index)\n        return inputs\n",
        "        block.bind(0)\n        return inputs\n",
        "tests/runtime/offload/test_streaming.py::test_logits_are_those_of_the_resident_model",
        "test_streaming.py::test_logits_are_those_of_the_resident_model",
    ),
    Mutation(
        "positions of decode steps",
        "runtime/decoding/graph_step.py",
        "for counter in (self.positions, self.slots, self.filled):",
        "for counter in (self.slots, self.filled):",
        "tests/runtime/decoding/test_decode_steps.py::test_steps_give_the_tokens_of_the_ordinary_path",
        "test_decode_steps.py::test_steps_give_the_tokens_of_the_ordinary_path",
    ),
    Mutation(
        "ranges of sampling options",
        "runtime/requests/sampling.py",
        '"top_p": _Range("a number from 0 to 1", 0, 1),',
        '"top_p": _Range("a number from 0 to 1", 0, 2),',
        "tests/runtime/requests/test_chat_options.py",
        "test_chat_options.py",
    ),
    Mutation(
        "the choice of a chat template",
        "runtime/requests/template.py",
        'if options.get("tools") and "tool_use" in named',
        'if "tool_use" in named',
        "tests/runtime/requests/test_conversations.py::test_a_template_is_chosen_by_its_name",
        "test_conversations.py::test_a_template_is_chosen_by_its_name",
    ),
    Mutation(
        "saving a quantized model",
        "runtime/saving/save.py",
        'config |= {"tie_word_embeddings": model.config.tie_word_embeddings, ',
        "config |= {",
        "tests/runtime/saving/test_save_quantized.py::test_it_loads_again_bit_for_bit_with_no_knob",
        "test_save_quantized.py::test_it_loads_again_bit_for_bit_with_no_knob",
    ),
    Mutation(
        "the check of a plan",
        "runtime/loading/verify.py",
        "measured > predicted * (1 + _TOLERANCE) + _SLACK",
        "measured > 2 * predicted + _SLACK",
        "tests/runtime/loading/test_verify.py",
        "test_verify.py",
    ),
    Mutation(
        "options of the command line",
        "cli/chat.py",
        "enable_thinking=thinking,",
        "enable_thinking=None,",
        "tests/runtime/requests/test_conversations.py::test_options_are_checked_before_weights_load",
        "test_conversations.py::test_options_are_checked_before_weights_load",
    ),
    Mutation(
        "torch's default dtype",
        "runtime/loading/load.py",
        "@float32_by_default()\ndef _build(",
        "def _build(",
        "tests/runtime/loading/test_default_dtype.py",
    ),
    Mutation(
        "graphs between streamed layers",
        "runtime/decoding/graph_step.py",
        "if first < number or not number:",
        "if first < number:",
        "tests/runtime/decoding/test_streamed_steps.py",
    ),
    Mutation(
        "the log of a monitor",
        "monitor/log.py",
        "            if written < len(line):\n                self._cut()\n",
        "            if written < len(line):\n",
        "tests/monitor/test_monitor.py::test_a_full_disk_leaves_whole_lines",
    ),
    Mutation(
        "the share of memory from which the doctor advises to quantize",
        "diagnosis/checks/weights.py",
        "if model.is_quantized or subject.own < _CROWDED * subject.memory:",
        "if model.is_quantized or subject.own < 0:",
        "tests/diagnosis/test_models.py::test_nothing_is_found_in_good_models",
    ),
    Mutation(
        "the doctor's cost of a compute dtype",
        "diagnosis/checks/weights.py",
        "most = converted + result * inner + max(",
        "most = result * inner + max(",
        "tests/diagnosis/test_models.py",
    ),
    Mutation(
        "removal of tokens from a report",
        "diagnosis/redaction.py",
        '    text = _FORMS.sub("<token>", text)\n',
        "",
        "tests/diagnosis/test_report.py",
    ),
    Mutation(
        "KL divergence",
        "quality/distance.py",
        "kl = (one.exp() * (one - other))",
        "kl = (other.exp() * (other - one))",
        "tests/quality/test_distance.py::test_one_document_is_as_torch_computes_it",
    ),
    Mutation(
        "percentiles of resampled documents",
        "quality/distance.py",
        "place = share * (ranks[:, -1:].double() - 1)",
        "place = share * (ranks[:1, -1:].double() - 1)",
        "tests/quality/test_distance.py",
    ),
    Mutation(
        "the word for a distance",
        "quality/verdict.py",
        "if mean_kl.high < most",
        "if mean_kl.value < most",
        "tests/quality/test_intervals.py",
    ),
    Mutation(
        "reading the log of a monitor",
        "monitor/log.py",
        'enumerate(text.split(b"\\n")[:-1], start=1)',
        "enumerate(text.splitlines(), start=1)",
        "tests/monitor/test_monitor.py",
    ),
    Mutation(
        "the newest row of a benchmark's file",
        "benchmark/results.py",
        "{row.key: row for row in rows}",
        "{row.key: row for row in reversed([*rows])}",
        "tests/benchmark/test_table.py::test_a_file_keeps_the_newest_of_each_row",
    ),
    Mutation(
        "tokens that become old beside a captured step",
        "runtime/kv_cache/quantized.py",
        "count, left = older - quantized, held - older\n",
        "count, left = older - quantized, held - older - 1\n",
        "tests/runtime/decoding/test_quantized_steps.py::test_a_step_that_writes_a_token_leaves_what_an_update_leaves",
    ),
)
