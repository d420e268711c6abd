"""Translate other libraries' names of the encoder's tensors and settings; derive a configuration from shapes.

The key maps are tables; nothing here reads a file.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ser.convert.pickles import Namespace
from ser.errors import ConfigError, ModelFolderError, brief_repr, shorten, summary

# ---------------------------------------------------------------------------------------------- renaming

# Module (or parameter) of a fairseq checkpoint -> ours. "*" is the number of a layer.
FAIRSEQ = {
    "mask_emb": "masked_spec_embed",
    "feature_extractor.conv_layers.*.0": "feature_extractor.conv_layers.*.conv",
    "feature_extractor.conv_layers.*.2": "feature_extractor.conv_layers.*.layer_norm",  # the group norm
    "feature_extractor.conv_layers.*.2.1": "feature_extractor.conv_layers.*.layer_norm",  # between transpositions
    "layer_norm": "feature_projection.layer_norm",
    "post_extract_proj": "feature_projection.projection",
    "encoder.pos_conv.0": "encoder.pos_conv_embed.conv",
    "encoder.layer_norm": "encoder.layer_norm",
    "encoder.layers.*.self_attn.q_proj": "encoder.layers.*.attention.q_proj",
    "encoder.layers.*.self_attn.k_proj": "encoder.layers.*.attention.k_proj",
    "encoder.layers.*.self_attn.v_proj": "encoder.layers.*.attention.v_proj",
    "encoder.layers.*.self_attn.out_proj": "encoder.layers.*.attention.out_proj",
    "encoder.layers.*.self_attn_layer_norm": "encoder.layers.*.layer_norm",
    "encoder.layers.*.fc1": "encoder.layers.*.feed_forward.intermediate_dense",
    "encoder.layers.*.fc2": "encoder.layers.*.feed_forward.output_dense",
    "encoder.layers.*.final_layer_norm": "encoder.layers.*.final_layer_norm",
    "proj": "lm_head",
}
FAIRSEQ_PRETRAINING = ("quantizer.", "project_q.", "final_proj.", "target_glu.", "label_embs_concat")

# Beginnings of torchaudio's keys -> ours; the rest of a key is the same.
TORCHAUDIO = {
    "feature_extractor.": "feature_extractor.",
    "encoder.feature_projection.": "feature_projection.",
    "encoder.transformer.": "encoder.",
    "aux.": "lm_head.",
}

# kind -> a key that only this kind has, after any prefix. The order matters: torchaudio's key ends with the last.
MARKS = {
    "fairseq": "feature_extractor.conv_layers.0.0.weight",
    "torchaudio": "encoder.feature_projection.projection.weight",
    "hugging-face": "feature_projection.projection.weight",
}


def recognised(path: Path, keys: Iterable[str]) -> tuple[str, str]:
    """Return the kind of a state dict, and the prefix of the encoder's keys."""
    keys = list(keys)
    for kind, mark in MARKS.items():
        prefixes = sorted({key.removesuffix(mark) for key in keys if key.endswith(mark)}, key=len)
        if prefixes:
            if len(prefixes) > 1:
                raise ModelFolderError(f"{path}: holds {len(prefixes)} encoders, under {summary(prefixes)}")
            return kind, prefixes[0]
    raise ModelFolderError(
        f"{path}: is no state dict of wav2vec 2.0, HuBERT, WavLM or data2vec that fairseq, torchaudio, "
        f"speechbrain or transformers would save; it holds {shorten(summary(keys))}"
    )


def renamed_fairseq(key: str) -> str | None:
    """Return our name for a key of a fairseq model without its prefix, or None."""
    numbers = re.findall(r"(?<=layers\.)\d+", key)
    pattern = re.sub(r"(?<=layers\.)\d+", "*", key)
    module, _, parameter = pattern.rpartition(".")
    name = FAIRSEQ.get(pattern) or (f"{FAIRSEQ[module]}.{parameter}" if module in FAIRSEQ else None)
    return name.replace("*", numbers[0]) if name and numbers else name


def renamed_torchaudio(key: str) -> str | None:
    """Return our name for a key of a torchaudio model, or None."""
    for theirs, ours in TORCHAUDIO.items():
        if key.startswith(theirs):  # its WavLM wraps the attention of torch
            return (ours + key.removeprefix(theirs)).replace(".attention.attention.", ".attention.")
    return None


def with_split_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split query, key and value, which torchaudio's WavLM has in one ``in_proj``, into three tensors."""
    split = {}
    for name, tensor in tensors.items():
        module, joined, kind = name.partition(".in_proj_")
        if joined:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{module}.{part}_proj.{kind}"] = rows.clone()
        else:
            split[name] = tensor
    return split


# ---------------------------------------------------------------------------------------------- configuration


def settings_of(value: Any) -> dict:
    """Return the entries of a Namespace or a mapping whose names are strings; for anything else, none."""
    entries = vars(value) if type(value) is Namespace else value
    return {k: v for k, v in entries.items() if isinstance(k, str)} if isinstance(entries, Mapping) else {}


def whole_number(node: ast.AST) -> int:
    """Return the value of an expression that is a whole number; ValueError for any other expression."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError


def written_layer(node: ast.AST) -> tuple[int, int, int]:
    """Return ``(channels, kernel, stride)`` from an expression; ValueError for any other expression."""
    if not isinstance(node, ast.List | ast.Tuple):
        raise ValueError
    channels, kernel, stride = (whole_number(each) for each in node.elts)
    return channels, kernel, stride


def written_layers(node: ast.AST) -> list[tuple[int, int, int]]:
    """Return the layers in lists that are joined by + and repeated by *; ValueError for any other expression."""
    if isinstance(node, ast.List | ast.Tuple):
        return [written_layer(each) for each in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return written_layers(node.left) + written_layers(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number_first = isinstance(node.left, ast.Constant)
        number, list_node = (node.left, node.right) if number_first else (node.right, node.left)
        layers, times = written_layers(list_node), whole_number(number)
        if len(layers) * times <= 64:
            return layers * times
    raise ValueError


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Read ``"[(512, 10, 5)] + [(512, 3, 2)] * 4"``, channels, kernel and stride of each, without running it."""
    try:
        if len(text) > 2000:
            raise ValueError
        return written_layers(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ConfigError(
            f"conv_feature_layers is {brief_repr(text, 200)}; expected lists of (channels, kernel, stride), "
            "joined by + and repeated by *"
        ) from None


# Settings of fairseq -> ours. mask_prob is left out, since its 0.65 of the frames is for pre-training.
FAIRSEQ_SETTINGS = {
    "extractor_mode": "feat_extract_norm",
    "conv_bias": "conv_bias",
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    # Fine-tuning has its own values of these.
    "dropout_input": "feat_proj_dropout",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "final_dropout": "final_dropout",
    "encoder_layerdrop": "layerdrop",
    "layerdrop": "layerdrop",
}
FAIRSEQ_NORMS = {"default": "group", "layer_norm": "layer"}  # values of extractor_mode
FAIRSEQ_SUPPORTED = {"activation_fn": "gelu", "layer_type": "transformer", "pos_conv_depth": 1}


def refuse_unsupported(path: Path, settings: Mapping) -> None:
    """Raise ModelFolderError if a fairseq model's settings are not supported by this package."""
    for key, supported in FAIRSEQ_SUPPORTED.items():
        value = settings.get(key, supported)
        if type(value) is not type(supported) or value != supported:
            raise ModelFolderError(
                f"{path}: {key} is {brief_repr(value, 80)}; supported in fairseq's models: {supported}"
            )


def renamed_settings(path: Path, settings: Mapping) -> dict:
    """Return the settings of a fairseq model by our names, with three lists for its convolutions."""
    values = {ours: settings[key] for key, ours in FAIRSEQ_SETTINGS.items() if settings.get(key) is not None}
    norm = values.get("feat_extract_norm")
    if isinstance(norm, str):
        values["feat_extract_norm"] = FAIRSEQ_NORMS.get(norm, norm)
    text = settings.get("conv_feature_layers")
    if isinstance(text, str):
        try:
            layers = conv_layers(text)
        except ConfigError as error:
            raise ModelFolderError(f"{path}: {error}") from None
        for i, name in enumerate(("conv_dim", "conv_kernel", "conv_stride")):
            values[name] = [layer[i] for layer in layers]
    architecture = settings.get("_name", settings.get("arch"))
    if isinstance(architecture, str) and architecture.startswith("hubert"):
        values["model_type"] = "hubert"
    return values


def fairseq_values(path: Path, checkpoint: Mapping) -> tuple[dict, bool | None]:
    """Return the settings in a fairseq checkpoint's ``cfg`` or ``args``, by our names, and do_normalize."""
    top = settings_of(checkpoint.get("cfg"))
    outer = settings_of(top.get("model")) or settings_of(checkpoint.get("args"))
    task = settings_of(top.get("task")) or outer
    # In a fine-tuned model the architecture is one level below, in a complete cfg or alone.
    inner = settings_of(outer.get("w2v_args"))
    inner = settings_of(inner.get("model")) or inner or outer
    if not inner:
        return {}, None
    refuse_unsupported(path, inner)
    dropouts = {key: value for key, value in outer.items() if "drop" in key}
    normalize = task.get("normalize")
    return renamed_settings(path, inner | dropouts), normalize if isinstance(normalize, bool) else None


# Hidden size -> number of attention heads, in every published model.
PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}


def derived_values(tensors: Mapping[str, Tensor]) -> tuple[dict, dict]:
    """Derive a configuration: settings that follow from the shapes of tensors, and settings of published models.

    Strides, attention heads and the place of the norms do not follow from shapes. In all of torchaudio's bundles,
    seven convolutions have the strides 5,2,2,2,2,2,2, and layer norms in the feature encoder come with a pre-norm
    transformer.
    """

    def count(pattern: str) -> int:
        return len({found[1] for name in tensors if (found := re.match(pattern, name))})

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    convolutions = [
        shapes.get(f"feature_extractor.conv_layers.{i}.conv.weight", ())
        for i in range(count(r"feature_extractor\.conv_layers\.(\d+)\."))
    ]
    projection = shapes.get("feature_projection.projection.weight", ())
    position = shapes.get("encoder.pos_conv_embed.conv.parametrizations.weight.original1", ())
    first = shapes.get("encoder.layers.0.feed_forward.intermediate_dense.weight", ())
    if not all(len(s) == 3 for s in (*convolutions, position)) or len(projection) != 2 or len(first) != 2:
        return {}, {}  # missing tensors are reported when the model is filled
    layer_norm = "feature_extractor.conv_layers.1.layer_norm.weight" in shapes
    told: dict[str, Any] = {
        "conv_dim": [shape[0] for shape in convolutions],
        "conv_kernel": [shape[2] for shape in convolutions],
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in shapes,
        "feat_extract_norm": "layer" if layer_norm else "group",
        "hidden_size": projection[0],
        "num_hidden_layers": count(r"encoder\.layers\.(\d+)\."),
        "intermediate_size": first[0],
        "num_conv_pos_embeddings": position[2],
        "num_conv_pos_embedding_groups": position[0] // position[1] if position[1] else 0,
    }
    assumed: dict[str, Any] = {"do_stable_layer_norm": layer_norm}
    if len(convolutions) == 7:
        assumed["conv_stride"] = [5, 2, 2, 2, 2, 2, 2]
    table = shapes.get("encoder.layers.0.attention.rel_attn_embed.weight", ())
    if len(table) == 2:
        told |= {"model_type": "wavlm", "num_buckets": table[0], "num_attention_heads": table[1]}
        assumed["max_bucket_distance"] = 800
    elif projection[0] in PUBLISHED_HEADS:
        assumed["num_attention_heads"] = PUBLISHED_HEADS[projection[0]]
    return told, assumed
