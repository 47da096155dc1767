"""GPU memory over time, with the plans of this library's processes beside it.

Modules:
    log       Logs of a monitor: a file of JSON lines, of which each is whole or absent.
    monitor   `Monitor`: samples in a thread, while a program does its work.
    plot      A picture of a log: used memory over time, with what plans promised as lines.
    run       `qwen-vram run`: a program that is watched while it runs.
    sample    A sample of this machine: GPUs, processes, the host, and the plans of loaded models.
    summary   Peaks of a log.
    tables    Samples as rows of CSV, and as tables for the terminal.
    terminal  The controlling terminal: its foreground group, lent to a program and taken back.
"""
