"""PLM as a GGUF file, as llama.cpp's own converter writes it, and back.

Tensors are those of the released checkpoints: rotary rows interleaved, latent attention's up projection in one piece.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from edgeattn.core.errors import ConversionFailed, UsageError
from edgeattn.core.numerics import Array
from edgeattn.models.plm import PLMConfig, reordered
from edgeattn.targets.gguf.blocks import F16, F32, Q4_0, Q4_K, Q8_0, Kind, byte_shape, decode, encode, fitting
from edgeattn.targets.gguf.layout import ARCH, names, shape
from edgeattn.targets.gguf.vocabulary import Vocabulary

#: What llama.cpp calls a file most of whose matrices are of a kind.
_FILE_TYPES = {
    F32: gguf.LlamaFileType.ALL_F32,
    F16: gguf.LlamaFileType.MOSTLY_F16,
    Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_S,
}
#: Largest number in float16, which blocks' scales are stored in too.
_LARGEST = 65504.0


def _weight(state: Mapping[str, Tensor], module: str, config: PLMConfig) -> Array:
    """A module's weight, out of either form, as the released checkpoints have it.

    Raises:
        ConversionFailed: it is missing, has another shape, holds NaN or infinity, or numbers too large for float16.
    """
    name, wanted = f"{module}.weight", shape(module, config)
    if name in state:
        value = state[name]
    elif f"{module}.up_k" in state:  # absorbed: what makes keys and what makes values, apart
        value = torch.cat([state[f"{module}.up_k"], state[f"{module}.up_v"]], dim=1).flatten(0, 1)
    else:
        raise ConversionFailed("a weight of PLM is missing", value=name, why=f"llama.cpp's arch {ARCH} needs it")
    if tuple(value.shape) != wanted:
        raise ConversionFailed(
            "a weight has another shape than PLM's", value=f"{name} {tuple(value.shape)}", why=f"wanted is {wanted}"
        )
    array: Array = reordered(name, value.detach().float(), config, split=False).numpy()
    largest = max(array.max(), -array.min())
    if not largest <= _LARGEST:
        raise ConversionFailed(
            "a weight cannot be stored",
            value=f"{name}: largest {largest:g}",
            why=f"numbers must be finite, and in float16 at most {_LARGEST:g}",
            fix="look for what went wrong in training, or export for another target",
        )
    return array


def _add_sizes(writer: gguf.GGUFWriter, config: PLMConfig) -> None:
    """What llama.cpp's arch ``plm`` reads, and what its converter writes beside it."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def write_gguf(
    state: Mapping[str, Tensor],
    config: PLMConfig,
    vocabulary: Vocabulary | None,
    kind: Callable[[str], Kind],
    out: Path,
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """Write ``out`` tensor by tensor: of no more than one of them there is a copy in memory.

    Args:
        state: PLM's weights by name, half-split, of the training or the deploy form.
        vocabulary: None for a file that can be computed with, but knows no text.
        kind: of a matrix, by the path of its module, where the width of its rows allows it. Norms are float32.
        metadata: noted as ``edgeattn.KEY``; ``recipe`` and ``author`` under llama.cpp's own names too.

    Returns:
        ``tensors`` and ``weight_bytes`` by kind, and ``fallbacks``: matrices stored otherwise than asked for, and why.

    Raises:
        ConversionFailed: a weight is missing, of another shape or too large; the vocabulary is larger than the model's.
    """
    writer = gguf.GGUFWriter(out, ARCH)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(metadata.get("recipe", ""))
    writer.add_author(metadata.get("author", ""))
    for key, text in metadata.items():
        writer.add_string(f"edgeattn.{key}", text)
    _add_sizes(writer, config)
    stored: dict[str, Kind] = {}
    fallbacks, matrices, weight_bytes = [], Counter[Kind](), Counter[str]()
    for module, name in names(config).items():
        sizes = shape(module, config)
        wanted = kind(module) if len(sizes) > 1 else F32
        stored[module] = own = fitting(wanted, sizes[-1])
        if own != wanted:
            why = f"rows of {sizes[-1]} numbers are not cut into blocks of {wanted.name}"
            fallbacks.append({"tensor": name, "kind": own.name, "wanted": wanted.name, "why": why})
        matrices.update([own] if len(sizes) > 1 else [])
        in_bytes = byte_shape(sizes, own)
        weight_bytes[own.name] += math.prod(in_bytes)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), own)
    writer.add_file_type(_FILE_TYPES[matrices.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.write(writer, config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for module, own in stored.items():
        writer.write_tensor_data(encode(_weight(state, module, config), own))
    writer.close()
    tensors = Counter(own.name for own in stored.values())
    return {"tensors": dict(tensors), "weight_bytes": dict(weight_bytes), "fallbacks": fallbacks}


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader of the file; tensors stay on the disk.

    Raises:
        UsageError: it is damaged, or of another model.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        fix = "copy it again, or export anew"
        raise UsageError("the GGUF file cannot be read", value=path, why=str(error), fix=fix) from error
    arch = reader.get_field("general.architecture")
    if arch is None or arch.contents() != ARCH:
        said = arch.contents() if arch else "none"
        raise UsageError("the GGUF file is of another model", value=f"{path}: {said}", why=f"wanted is {ARCH}")
    return reader


def sizes_of(reader: gguf.GGUFReader) -> PLMConfig:
    """The model's sizes.

    Raises:
        UsageError: one is missing.
    """

    def of(key: str) -> Any:
        field = reader.get_field(f"{ARCH}.{key}")
        if field is None:
            raise UsageError("the GGUF file lacks a size", value=f"{ARCH}.{key}", where=str(reader.data.filename))
        value = field.contents()
        # A float32: its shortest decimal is the number that was written.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    rope = of("rope.dimension_count")
    return PLMConfig(
        vocab_size=of("vocab_size"),
        hidden_size=of("embedding_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=of("attention.head_count"),
        kv_lora_rank=of("attention.kv_lora_rank"),
        qk_nope_head_dim=of("attention.key_length") - rope,
        qk_rope_head_dim=rope,
        v_head_dim=of("attention.value_length"),
        intermediate_size=of("feed_forward_length"),
        max_position_embeddings=of("context_length"),
        rope_theta=of("rope.freq_base"),
        rms_norm_eps=of("attention.layer_norm_rms_epsilon"),
    )


def read_gguf(path: Path) -> tuple[PLMConfig, dict[str, Array]]:
    """Sizes, and all weights as the float32 numbers that they stand for, as a released checkpoint has them.

    Raises:
        UsageError: the file is damaged, of another model, or lacks a tensor.
    """
    reader = open_gguf(path)
    config = sizes_of(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state: dict[str, Array] = {}
    for module, name in names(config).items():
        if name not in tensors:
            raise UsageError("the GGUF file lacks a tensor", value=name, where=str(path))
        tensor = tensors[name]
        state[f"{module}.weight"] = decode(tensor.data, tensor.tensor_type).reshape(shape(module, config))
    return config, state
