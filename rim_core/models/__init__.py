"""Models loaded, checked, run in batches, read and written by hooks. Read in this order:

- `loading`: from a name to a checked model, `load` and `roles`; what is packed, and on which devices.
- `model`: class `Model`, one base in memory, its adapters swapped in place.
- `adapters`: how PEFT's modules are put in and taken out.
- `layout`: where each family keeps its modules, the shapes, and the readout.
- `norms`: norms as linear maps.
- `checks`: the identities that tools rest on, measured on each model.
- `hooks`: reading and editing while the model runs.
- `capture`: activations of many texts.
- `padding`: positions, padding, and beginnings that prompts share; `batching`: batches of what fits in memory.
- `decoding`: rows that are decoded side by side; `arms`: each with its own edits; `small_passes`: sooner on a CPU.
- `remembering`: what lower layers made of a batch, kept while upper ones change.
- `tokens`: tokens by name, and where a fragment lies.
- `remote`: nnsight, and models that run at NDIF.
"""

import logging


def _told(record: logging.LogRecord) -> bool:
    """Whether bitsandbytes says anything but that it misses a kernel, one for repacked weights alone: here none are."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


# It speaks when it is first imported, by whomever.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_told)
