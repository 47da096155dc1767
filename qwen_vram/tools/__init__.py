"""Tools that measure this machine and the accuracy of predictions.

Modules:
    accuracy         Measurement of memory on this machine's GPU, to compare with the predictions.
    accuracy_report  Tables of `docs/accuracy.md`, made from measured rows.
    calibrate        `qwen-vram calibrate`: measure this machine once, for every later estimate.
    calibrate_steps  Steps of `qwen-vram calibrate`: each measures one thing in its process.
    disk_rate        Rate at which a disk is read without the page cache, as disk layers are read.
    fresh_process    Calls of a function in fresh processes, each with a new CUDA context and allocator.
    launch_times     Measurement of launches on a GPU: a layer by Python, and a small kernel in a CUDA graph.
    product_rates    Measurement of this CPU's products with one row (decode steps) and many rows (prefills).
    walkthrough      `qwen-vram demo`: estimate, load, ask and measure the bundled checkpoint, offline.
"""
