"""Names of the files in a checkpoint folder."""

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The settings of an adapter, as PEFT saves them.
ADAPTER_CONFIG = "adapter_config.json"
# The key of config.json that names another file or index of weights. Source: transformers 5.23, from_pretrained.
NAMED_WEIGHTS = "transformers_weights"
# AutoGPTQ's own names: gptq_model-4bit-128g.safetensors, alone or in shards with an index, and its settings in a file
# apart. Source: AutoGPTQ 0.7.1, auto_gptq/modeling/_base.py, save_quantized.
AUTO_GPTQ_SINGLE = "gptq_model-*.safetensors"
AUTO_GPTQ_CONFIG = "quantize_config.json"
# AutoAWQ's settings before it wrote them into config.json. Source: AutoAWQ 0.1.8, awq/models/base.py, save_quantized.
AUTO_AWQ_CONFIG = "quant_config.json"
