"""Reading of LoRA adapters: folder, settings, tensors, and changes to the base.

Modules:
    base_name        Comparison of the base that an adapter names with the base that it is given.
    blocks           Block-diagonal factors of BD-LoRA.
    changes          Changes that an adapter makes to its base, tensor by tensor.
    errors           The error that refuses an adapter.
    folder           The folder of an adapter, or the refusal of a folder that holds none.
    kept_tensors     Tensors that PEFT keeps in memory for an adapter beside its base.
    keys             Tensors of an adapter's file, sorted by the module that they belong to.
    replication      Order of the base's layers in an adapter's model (`layer_replication`).
    scaling          Scale of an adapter's update, from rank and alpha of each module.
    settings         Settings of adapter_config.json that change the adapter's arithmetic.
    settings_reader  Reader of adapter_config.json, which checks every setting.
    tables           Changes that an adapter makes to token embeddings and head, tied or not.
    targets          Modules that an adapter's settings name, found by the rules of PEFT.
    tokenizer        Choice of the tokenizer for a base with adapters.
"""
