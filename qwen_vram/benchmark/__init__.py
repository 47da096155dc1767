"""Benchmarks: configurations of a model in fresh processes, predicted beside measured.

Modules:
    bench           `bench()`: configurations of a model in fresh processes, predicted beside measured.
    case            A case, and the figures of its row that all libraries have in common.
    configurations  Configurations: the article's three, plain `transformers`, profiles and plans.
    own             This library: measurement of `load` and of two generations.
    plain           Plain `transformers`: measurement of `from_pretrained` and `generate`.
    plot            A picture: memory and times of each row, predicted beside measured.
    process         A case in a fresh process, with a time limit.
    results         Results in a file: a line of JSON for each row, which is whole or absent.
    row             A row: one configuration and workload, with predicted and measured figures.
    table           Tables: as cells for the terminal, and as Markdown with the article's figures.
    token_times     Times of single tokens, by a streamer, and the energy of a GPU between them.
    worker          The process of one case, which it reads and answers as one line of JSON.
"""
