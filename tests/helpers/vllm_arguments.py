"""Run by vLLM's own Python: parse commands as `vllm serve` does, and print what each argument became.

Standard input is JSON: a list of commands, each without the program. The last line of standard output is a list with an
object for each: the fields of `AsyncEngineArgs`, the server's own, and parts of the configuration that they make.
"""

import contextlib
import io
import json
import sys


def parsed(words):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser")).set_defaults(dispatch_function=command.cmd)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args(words)
            command.validate(found)
    except SystemExit as ended:
        return {"error": said.getvalue(), "status": ended.code}
    found.model = found.model_tag
    engine = AsyncEngineArgs.from_cli_args(found)
    fields = {name: getattr(engine, name) for name in vars(engine)}
    result = {"engine": fields, "server": {name: one for name, one in vars(found).items() if name not in fields}}
    # Several machines, Ray and fp8 need what is not on this one.
    if not (engine.nnodes > 1 or engine.quantization or engine.distributed_executor_backend == "ray"):
        config = engine.create_engine_config()
        result["config"] = {
            "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
            "max_model_len": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype),
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
            "enforce_eager": config.model_config.enforce_eager,
        }
    return result


if __name__ == "__main__":
    print(json.dumps([parsed(words) for words in json.load(sys.stdin)], default=str))
