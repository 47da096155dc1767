"""Files of a checkpoint folder: names, JSON and safetensors headers, with clear errors.

Modules:
    absent              Errors for missing config.json or weights, by the files that are there instead.
    contents            Recognition of files whose contents are not of the kind that their name says.
    json_text           Parsing of JSON from UTF-8, with the cause, line and column of an error.
    local               A checkpoint folder: its config.json, its set of weights, and their headers.
    names               Names of the files in a checkpoint folder.
    place               Location of a model: a local folder, or a name in the catalog or on the hub.
    safetensors_header  The header of one safetensors file, checked before anything is allocated.
    same_bytes          Comparison of two ranges of bytes in files, one piece after the other.
    sidecars            Files beside the weights: tokenizer, chat template, generation settings, licence.
    state               State of a folder's files, which shows if earlier results of reading are still valid.
"""
