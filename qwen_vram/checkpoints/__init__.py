"""Reading of checkpoints, adapters and machine files, from folders and the hub.

All that opens files or asks the hub is here. The modules do not import torch.

Modules:
    adapters/      Reading of LoRA adapters: folder, settings, tensors, and changes to the base.
    checkpoint     The reader of checkpoint folders: config.json, weights, names and shapes, read once.
    cpu_info       The CPU of this machine, as Linux describes it in /proc and /sys.
    files/         Files of a checkpoint folder: names, JSON and safetensors headers, with clear errors.
    hub/           Checkpoints on the hub, and errors of the hub as errors of this library.
    machine_file   The file of measured machines in the user's cache folder.
    output/        Output of a new checkpoint: its layout, and a folder that appears only when complete.
    own_adapter    Detection of an adapter that is already merged into the model of its own folder.
    prequantized   The architecture of a checkpoint, from config.json and the headers if needed.
    resolve        Resolution of a caller's model (name, folder or config) to an `Architecture`.
    running_plans  Files from which a monitor reads the plans of running processes.
    tensors/       Checks of a checkpoint's tensors against the model that config.json describes.
"""
