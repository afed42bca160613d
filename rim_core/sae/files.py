"""Sparse autoencoders on disk, in the format of SAELens 6."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rim_core.errors import InputError
from rim_core.paths import put_whole
from rim_core.sae.autoencoder import SparseAutoencoder

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
# SAELens' word for each kind of activation function.
_ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
# The version of the format that is written: SAELens takes a file without one for an older format.
_FORMAT = "6.0.0"


def save_sae(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write a sparse autoencoder as SAELens 6 does: `cfg.json` and `sae_weights.safetensors`; all or nothing.

    Args:
        sae: of any kind.
        folder: a new one.

    Raises:
        InputError: the folder exists or cannot be written, or the metadata cannot be written as JSON.

    Example:
        >>> x = rim.capture(model, texts, "resid_post")["resid_post"][:, 1]
        >>> folder = rim.save_sae(rim.train_sae(x, steps=5, progress=False), "dictionary")
        >>> rim.load_sae(folder).d_in == model.d_model
        True
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists: give save_sae a new folder, or remove that one")
    config = {
        "architecture": _ARCHITECTURES[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _FORMAT, "sae_lens_training_version": None, **sae.metadata},
    }
    if sae.kind == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise InputError(f"save_sae: the metadata cannot be written as JSON: {error}") from None
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sae.tensors().items()}
    with put_whole(folder) as made:
        save_file(tensors, made / WEIGHTS_FILE)
        (made / CONFIG_FILE).write_text(text, encoding="utf-8")
    return folder


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """Read a sparse autoencoder that `save_sae` or SAELens 6 wrote; in float32 on the CPU.

    Architectures "standard", "topk" and "jumprelu" are read. A topk file whose latents are scaled by the decoder's
    norms is read with the norms folded in, which is the same function.

    Args:
        folder: with the two files that `save_sae` writes.

    Raises:
        InputError: files missing or damaged, an older format, or a setting that changes the function and is not
            supported; it names the setting.

    Example:
        >>> x = rim.capture(model, texts, "resid_post")["resid_post"][:, 1]
        >>> sae = rim.train_sae(x, steps=5, progress=False)
        >>> bool((rim.load_sae(rim.save_sae(sae, "dictionary"))(x) == sae(x)).all())
        True
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except OSError:
        raise InputError(f"{folder} holds no sparse autoencoder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    kind = _kind(folder / CONFIG_FILE, config)
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    shapes = {"W_enc": [d_in, d_sae], "b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    if kind == "jumprelu":
        shapes["threshold"] = [d_sae]
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise InputError(f"{folder / WEIGHTS_FILE}: {name} should be {shape}, and there is {found}")
        if not tensors[name].isfinite().all():
            raise InputError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity: the file is damaged")
    parts: dict[str, Any] = {name: tensors[name].float() for name in shapes}
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm", False):
        norms = parts["W_dec"].norm(dim=1).clamp(min=1e-8)
        parts |= {"W_enc": parts["W_enc"] * norms, "b_enc": parts["b_enc"] * norms}
        parts["W_dec"] = parts["W_dec"] / norms[:, None]
    try:
        return SparseAutoencoder(
            **parts,
            kind=kind,
            k=config.get("k") if kind == "topk" else None,
            apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
            metadata=config["metadata"],
        )
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from None


def _kind(where: Path, config: Any) -> str:
    """The kind that a configuration describes, once everything that would change the function is ruled out."""
    metadata = config.get("metadata") if isinstance(config, dict) else None
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    major = str(version).split(".")[0]
    if not major.isdecimal() or int(major) < 6:
        raise InputError(f"{where} is not SAELens 6's format: load it with SAELens 6 and save it again")
    for key in ("normalize_activations", "reshape_activations"):
        if (found := config.get(key, "none")) != "none":
            # The file doesn't hold the factor by which these activations were scaled.
            factor = "; fold the factor in with SAELens' fold_activation_norm_scaling_factor and save again"
            remedy = factor if found == "expected_average_only_in" else ""
            raise InputError(f"{where}: {key} {found!r} is not supported, only 'none'{remedy}")
    kinds = {architecture: kind for kind, architecture in _ARCHITECTURES.items()}
    architecture = config.get("architecture")
    if architecture not in kinds:
        raise InputError(f"{where}: architecture {architecture!r} is not supported; these are: {', '.join(kinds)}")
    return kinds[architecture]
