"""Values of a config.json, with the defaults and the types of `transformers`.

Modules:
    keys    Keys of config.json: their defaults and accepted values in `transformers`.
    reader  Checked values of a config.json, with the defaults of `transformers` for its family.
"""
